"""The class token as a product: which class it names, how well it fits its label, and where a given one comes from."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(tokens: Tensor, class_means: Tensor) -> Tensor:
    """Cosine of each token with each class's mean token: (N, D), (K, D) => (N, K) float32."""
    return F.normalize(tokens.float(), dim=1) @ F.normalize(class_means.to(tokens.device).float(), dim=1).T


def nearest_class(tokens: Tensor, class_means: Tensor) -> Tensor:
    """(N,) int64: the class each token names."""
    return cosines(tokens, class_means).argmax(1)


def agreement(tokens: Tensor, label: Tensor, class_means: Tensor) -> Tensor:
    """(N,): cosine with the own class's mean minus the largest with another's; positive: the token names its label."""
    similar = cosines(tokens, class_means)
    own = similar.gather(1, label[:, None])[:, 0]
    return own - similar.scatter(1, label[:, None], -torch.inf).amax(1)


def between(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """On the way from token a to token b, both (D,): directions on the great circle, lengths linearly. weight: (N,)."""
    length = torch.lerp(a.norm(), b.norm(), weight)[:, None]
    angle = torch.arccos((F.normalize(a, dim=0) @ F.normalize(b, dim=0)).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, weight[:, None])
    w = weight[:, None]
    direction = torch.sin((1 - w) * angle) * F.normalize(a, dim=0) + torch.sin(w * angle) * F.normalize(b, dim=0)
    return length * direction / torch.sin(angle)


def read_tokens(sources: tuple[str, ...], dim: int, encoder: str, resolution: int, grid: int) -> Tensor:
    """The tokens that `--like` names: (K, D) float32.

    sources: image files, encoded by the model's own encoder after the training crop; .npy files of tokens (a row, or all
    rows), FILE.npy:I for row I. Raises FileNotFoundError or ValueError naming the source.
    """
    rows = [
        _rows_of_file(source, dim) if ".npy" in source else _encode(Path(source), dim, encoder, resolution, grid)
        for source in sources
    ]
    return torch.cat(rows)


def _rows_of_file(source: str, dim: int) -> Tensor:
    name, _, row = source.rpartition(":") if source.rpartition(":")[2].isdecimal() else (source, "", "")
    if not Path(name).is_file():
        raise FileNotFoundError(f"--like {source}: no such file")
    try:
        tokens = np.load(name, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--like {source}: not an .npy file of numbers ({error})") from error
    tokens = np.atleast_2d(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != dim or not np.issubdtype(tokens.dtype, np.floating):
        raise ValueError(f"--like {source}: holds {tokens.dtype} {tokens.shape}, the model's tokens have width {dim}")
    if row:
        if int(row) >= len(tokens):
            raise ValueError(f"--like {source}: the file has rows 0 to {len(tokens) - 1}")
        tokens = tokens[int(row) : int(row) + 1]
    return torch.from_numpy(tokens.astype(np.float32))


def _encode(path: Path, dim: int, encoder: str, resolution: int, grid: int) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    from models.encoder import load_encoder
    from preprocessing.crop import center_crop

    try:
        with Image.open(path) as image:
            pixels = center_crop(image.convert("RGB"), resolution)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--like {path}: no such file") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--like {path}: neither an image nor an .npy file of tokens ({error})") from error
    token = load_encoder(encoder, grid)(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]).class_token.float()
    if token.shape[1] != dim:
        raise ValueError(f"--like {path}: encoder {encoder} gives tokens of width {token.shape[1]}, the model has {dim}")
    return token
