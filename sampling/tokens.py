"""The class tokens that `--like` names."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import MissingFile, UserError


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
        raise MissingFile(f"--like {source}: no such file")
    try:
        tokens = np.load(name, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"--like {source}: not an .npy file of numbers ({error})") from error
    tokens = np.atleast_2d(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != dim or not np.issubdtype(tokens.dtype, np.floating):
        raise UserError(f"--like {source}: holds {tokens.dtype} {tokens.shape}, the model's tokens have width {dim}")
    if row:
        if int(row) >= len(tokens):
            raise UserError(f"--like {source}: the file has rows 0 to {len(tokens) - 1}")
        tokens = tokens[int(row) : int(row) + 1]
    return torch.from_numpy(tokens.astype(np.float32))


def _encode(path: Path, dim: int, encoder: str, resolution: int, grid: int) -> Tensor:
    from common.crop import center_crop
    from common.images import BadImage, decode_image
    from models.encoder import load_encoder

    if not path.is_file():
        raise MissingFile(f"--like {path}: no such file")
    try:
        pixels = center_crop(decode_image(path), resolution)
    except BadImage as error:
        raise UserError(f"--like {path}: neither an image nor an .npy file of tokens ({error})") from error
    token = load_encoder(encoder, grid)(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]).class_token.float()
    if token.shape[1] != dim:
        raise UserError(f"--like {path}: encoder {encoder} gives tokens of width {token.shape[1]}, the model has {dim}")
    return token
