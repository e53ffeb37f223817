"""Agreement of a generated class token with its generated image (REG's "coherent image-class pairs").

The token that was denoised beside an image is compared with the token that the encoder computes from that image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import read_npy
from config import MissingFile, UserError
from evaluations.collect import collect, kept_rows
from evaluations.features import Extractor, Features
from evaluations.image_sets import ImageSet
from evaluations.metrics import Estimate, share
from evaluations.sidecars import check_recorded

RETRIEVAL = 10_000  # pairs among which the retrieval looks, at most


def token_metrics(
    generated: torch.Tensor, read: torch.Tensor, class_means: torch.Tensor | None = None
) -> tuple[Estimate, Estimate | None, Estimate | None, Estimate | None]:
    """Agreement of the class tokens of N images.

    Args:
        generated, read: (N, D) tokens of the same images, from the sampler and from the encoder.
        class_means: (C, D) mean encoder token of each class.

    Returns:
        mean cosine; mean cosine of tokens of different images, the baseline; share of generated tokens whose nearest
        encoder token is that of their own image; share of pairs that are nearest to the same class mean. None where it
        cannot be computed.

    Raises:
        UserError: the shapes differ.
    """
    if generated.shape != read.shape:
        raise UserError(f"class tokens have shape {tuple(generated.shape)}, the encoder's {tuple(read.shape)}")
    a, b = (F.normalize(tokens.double(), dim=1) for tokens in (generated, read))
    n = len(a)
    cosines = (a * b).sum(1)
    shuffled, retrieval, agreement = None, None, None
    if n > 1:
        shuffled = Estimate(((a.sum(0) @ b.sum(0) - cosines.sum()) / (n * (n - 1))).item(), None)
        nearest = torch.cat([(rows @ b[:RETRIEVAL].T).argmax(1) for rows in a[:RETRIEVAL].split(1000)])
        retrieval = _share(nearest == torch.arange(len(nearest), device=a.device))
    if class_means is not None:
        centres = F.normalize(class_means.double(), dim=1)
        agreement = _share((a @ centres.T).argmax(1) == (b @ centres.T).argmax(1))
    cosine = Estimate(cosines.mean().item(), (cosines.std() / n**0.5).item() if n > 1 else None)
    return cosine, shuffled, retrieval, agreement


def _share(hits: torch.Tensor) -> Estimate:
    return share(hits.double().mean().item(), len(hits))


def load_tokens(path: Path, count: int) -> torch.Tensor:
    """Class tokens (count, D) float32 from class_tokens.npy.

    Raises:
        UserError: names the file; MissingFile if it does not exist.
    """
    if not path.is_file():
        raise MissingFile(f"{path} does not exist; generate.py writes it when asked for class tokens")
    check_recorded(path)
    tokens = read_npy(path)
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
    """Mean encoder token of each class (C, D), on rank 0; None without labels.

    Args:
        reference: the images, of which the class means are computed unless `paths` is a packed dataset that stores them.
        paths: what `reference` was opened from.
        reader: the encoder, see `load_reader`.
        batch_size: images per batch.
        keep: number of reference images to use.
    """
    from packed.format import MANIFEST, read_class_means, read_manifest

    if len(paths) == 1 and (paths[0] / MANIFEST).is_file():
        stored = read_class_means(paths[0], read_manifest(paths[0]))
        if stored is not None:
            return torch.from_numpy(stored)
    if reference.labels is None:
        return None
    found = collect(reference, reader, batch_size=batch_size, keep=keep, progress="reference, class tokens")
    labels = torch.from_numpy(reference.labels)[kept_rows(reference, keep, torch.arange(len(reference)))]
    if len(found.pooled) != len(labels):  # not rank 0
        return None
    return torch.stack([found.pooled[labels == label].mean(0) for label in labels.unique()])
