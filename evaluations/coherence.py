"""Do generated class token and generated image tell the same story? (REG's "coherent image-class pairs")

The token that was denoised beside an image is compared with the token that the encoder reads off that image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import MissingFile, UserError
from evaluations.collect import collect
from evaluations.features import Extractor, Features
from evaluations.images import ImageSet
from evaluations.results import Metric

RETRIEVAL = 10_000  # pairs among which the retrieval looks, at most


def token_metrics(
    generated: torch.Tensor, read: torch.Tensor, class_means: torch.Tensor | None = None
) -> dict[str, Metric]:
    """generated, read: (N, D) class tokens of the same images, from the sampler and from the encoder.

    token_cosine: mean cosine; token_cosine_shuffled: between tokens of different images, the floor; token_retrieval:
    share of generated tokens whose nearest encoder token is their own image's; token_class_agreement: share where
    both are nearest to the same row of class_means (C, D). Raises ValueError when shapes differ.
    """
    if generated.shape != read.shape:
        raise UserError(f"class tokens have shape {tuple(generated.shape)}, the encoder's {tuple(read.shape)}")
    a, b = (F.normalize(tokens.double(), dim=1) for tokens in (generated, read))
    n = len(a)
    cosines = (a * b).sum(1)
    values = {"token_cosine": (cosines.mean().item(), (cosines.std() / n**0.5).item() if n > 1 else None)}
    if n > 1:
        others = (a.sum(0) @ b.sum(0) - cosines.sum()) / (n * (n - 1))
        values["token_cosine_shuffled"] = others.item(), None
        values["token_retrieval"] = _share(_retrieved(a[:RETRIEVAL], b[:RETRIEVAL]))
    if class_means is not None:
        centres = F.normalize(class_means.double(), dim=1)
        values["token_class_agreement"] = _share((a @ centres.T).argmax(1) == (b @ centres.T).argmax(1))
    return {key: Metric(*value, "class token", n) for key, value in values.items()}


def _retrieved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    nearest = torch.cat([(rows @ b.T).argmax(1) for rows in a.split(1000)])
    return nearest == torch.arange(len(a), device=a.device)


def _share(hits: torch.Tensor) -> tuple[float, float]:
    share = hits.double().mean().item()
    return share, (share * (1 - share) / len(hits)) ** 0.5


def load_tokens(path: Path, count: int) -> torch.Tensor:
    """(count, D) float32 from class_tokens.npy. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise MissingFile(f"{path} does not exist; generate.py writes it when asked for class tokens")
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is no .npy file of numbers: {error}") from error
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.floating) or len(tokens) < count:
        raise UserError(f"{path} holds {tokens.dtype} {tokens.shape}, not one float vector for each of {count} samples")
    return torch.from_numpy(tokens[:count].astype(np.float32))


def load_reader(name: str, grid: int, device: torch.device) -> Extractor:
    """The training encoder as an extractor of class tokens, over its published input path."""
    from models.encoder import load_encoder

    encoder = load_encoder(name, grid).to(device)
    return Extractor(name, name, lambda pixels: Features(encoder(pixels).class_token), device)


def class_means(
    reference: ImageSet, paths: Sequence[Path], reader: Extractor, batch_size: int, keep: int
) -> torch.Tensor | None:
    """(classes, D) mean encoder token of each class: from a packed dataset that stores them, or from labelled reference
    images; None without labels."""
    from packed.format import MANIFEST, read_manifest

    if len(paths) == 1 and (paths[0] / MANIFEST).is_file():
        stored = read_manifest(paths[0]).class_means
        if stored is not None:
            return torch.from_numpy(np.load(paths[0] / stored, allow_pickle=False))
    if reference.labels is None:
        return None
    from evaluations.collect import kept_rows

    found = collect(reference, reader, batch_size=batch_size, keep=keep, progress="reference, class tokens")
    labels = torch.from_numpy(reference.labels)[kept_rows(reference, keep, torch.arange(len(reference)))]
    if len(found.pooled) != len(labels):  # not rank 0
        return None
    return torch.stack([found.pooled[labels == label].mean(0) for label in labels.unique()])
