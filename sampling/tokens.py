"""Given class tokens: what `--like` means."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.arrays import read_npy
from common.contents import Item
from common.crop import center_crop
from common.images import BadImage, decode_image
from common.listing import list_contents
from common.members import Members
from config import MissingFile, UserError
from evaluations.sidecars import check_recorded
from models.encoder import VisionEncoder, load_encoder
from models.local_networks import open_network
from models.model_file import Model


def read_tokens(sources: Sequence[str], model: Model) -> Tensor:
    """The tokens that `--like` means, (K, D) float32.

    Args:
        sources: image files, folders, zips or tars of images, encoded by the model's own encoder after the training crop;
            .npy files of tokens (all rows); FILE.npy:I for row I.
        model: whose tokens they are.

    Raises:
        UserError: names the source and what is wrong with it.
    """
    info, encoder = model.info, None
    rows: list[Tensor] = []
    for source in sources:
        if ".npy" in source:
            rows.append(_rows_of_file(source, info.network.class_token_dim))
            continue
        if not info.encoders:
            raise UserError("--like: the model file names no encoder; give tokens as .npy")
        crops = _crops(source, info.resolution)  # the images are looked at before the encoder is loaded
        encoder = encoder or _own_encoder(model)
        rows += [encoder(crop).class_token.float() for crop in crops]
        width, expected = rows[-1].shape[1], info.network.class_token_dim
        if width != expected:
            raise UserError(
                f"--like {source}: encoder {encoder.name} gives tokens of width {width}, the model has {expected}"
            )
    return torch.cat(rows)


def _own_encoder(model: Model) -> VisionEncoder:
    """The encoder whose class tokens the model makes."""
    info = model.info
    load = partial(load_encoder, grid=info.network.input_size // info.network.patch_size)
    return open_network(
        info.encoders[0], (*info.encoder_weights, "")[0], model.path, load, "--like FILE.npy (its tokens)"
    )


def _rows_of_file(source: str, dim: int) -> Tensor:
    name, _, row = source.rpartition(":") if source.rpartition(":")[2].isdecimal() else (source, "", "")
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingFile(f"--like {source}: no such file")
    try:
        check_recorded(path)
        tokens = read_npy(path)
    except UserError as error:
        raise UserError(f"--like {source}: {error}") from error
    tokens = np.atleast_2d(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != dim or not np.issubdtype(tokens.dtype, np.floating):
        raise UserError(f"--like {source}: holds {tokens.dtype} {tokens.shape}, the model's tokens have width {dim}")
    if row:
        if int(row) >= len(tokens):
            raise UserError(f"--like {source}: the file has rows 0 to {len(tokens) - 1}")
        tokens = tokens[int(row) : int(row) + 1]
    return torch.from_numpy(tokens.astype(np.float32))


def _crops(source: str, resolution: int) -> list[Tensor]:
    """The centre crops of an image file, or of all images of a folder or archive: (1, 3, H, W) uint8 each."""
    path = Path(source).expanduser()
    items, members = [Item("", None)], Members("folder", path, [""])
    if not path.is_file() or path.suffix in (".zip", ".tar"):
        try:
            contents = list_contents(path)
        except UserError as error:
            raise type(error)(f"--like {error}") from error
        items, members = sorted(contents.items), Members(contents.kind, contents.root, contents.files)
        if not items:
            raise UserError(f"--like {source}: holds no images")
    crops = []
    for item in items:
        try:
            crop = center_crop(decode_image(members.read(item)), resolution)
        except BadImage as error:
            where = path / item.name
            raise UserError(f"--like {where}: neither an image nor an .npy file of tokens ({error})") from error
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None])
    return crops
