"""Crops, a batch at a time, from any source: what the worker processes of packing do."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.arrays import read_npy
from common.contents import Item
from common.crop import center_crop
from common.images import BadImage, decode_image, unread_format
from common.members import Members
from preprocessing.sources import LATENT_FOLDER, latent_name
from preprocessing.tables import Table


class Request(NamedTuple):
    """A batch to read: consecutive items of one shard. last: whether they end it."""

    shard: int
    items: list[Item]
    last: bool


class Crops(NamedTuple):
    """n images that could be read, of the request's; with --flip each is followed by its mirror image.

    pixels: (n, S, S, 3) uint8. moments: (n, 2C, h, w) float32 mean and std
    where the source has them. bad: (name, reason) of the others. enlarged: how many were smaller than the crop."""

    request: Request
    pixels: Tensor
    label: Tensor
    names: list[str]
    moments: Tensor | None
    bad: list[tuple[str, str]]
    enlarged: int


def crop_file(source: bytes | Path, size: int, max_pixels: int) -> tuple[np.ndarray, bool]:
    """Decode an image file and cut its centre square.

    Returns: the pixels, (size, size, 3) uint8, and whether the image was smaller than that.

    Raises:
        BadImage: it cannot be decoded, or is too large.
    """
    image = decode_image(source, max_pixels)
    shorter = min(image.size)
    scale = max(1.0, size / shorter)
    if image.width * scale * image.height * scale > max_pixels:
        raise BadImage(
            f"{image.width} x {image.height} pixels would be enlarged to more than --max-pixels {max_pixels} before the crop"
        )
    return center_crop(image, size), shorter < size


class Reader:
    """Encoded images of items; tables are opened on first use in the process that uses them."""

    def __init__(self, kind: str, root: str, files: list[str]) -> None:
        self.kind, self.root, self.files = kind, Path(root), files
        self._members = Members(kind, self.root, files)
        self._tables: dict[int, Table] = {}

    def read(self, item: Item) -> bytes | Path:
        """The encoded image, or the file that holds it. Raises BadImage if it cannot be had."""
        if self.kind not in ("parquet", "arrow"):
            return self._members.read(item)
        try:
            return self._table(item.file).image_bytes(item.offset, item.size) or b""
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror or error})") from error

    def moments(self, item: Item) -> np.ndarray:
        """(2C, h, w) float32 of the published layout. Raises BadImage if the file is not that."""
        path = self.root / LATENT_FOLDER / latent_name(item.name)
        try:
            moments = read_npy(path)
        except (OSError, ValueError) as error:
            raise BadImage(f"its moments {path.name} cannot be read ({error})") from error
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.dtype.kind != "f":
            raise BadImage(f"its moments {path.name} are {moments.dtype} {moments.shape}, expected (2C, h, w)")
        return moments.astype(np.float32)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def _table(self, number: int) -> Table:
        if number not in self._tables:
            while len(self._tables) >= 2:  # a table keeps a group of rows in memory
                del self._tables[next(iter(self._tables))]
            self._tables[number] = Table(self.root / self.files[number])
        return self._tables[number]


class CropDataset(Dataset):
    """dataset[request] => Crops; with DataLoader(sampler=requests, batch_size=None, collate_fn=as_is)."""

    def __init__(self, reader: Reader, resolution: int, max_pixels: int, *, flip: bool = False) -> None:
        self.reader, self.resolution, self.max_pixels, self.flip = reader, resolution, max_pixels, flip

    def __getitem__(self, request: Request) -> Crops:
        pixels, labels, names, moments, bad, enlarged = [], [], [], [], [], 0
        for item in request.items:
            try:
                crop, small = crop_file(self.reader.read(item), self.resolution, self.max_pixels)
                if self.reader.kind == "published":
                    moments.append(self.reader.moments(item))
            except BadImage as error:
                bad.append((item.name, unread_format(item.name) or str(error)))
                continue
            for copy, name in ((crop, item.name), (crop[:, ::-1], mirrored(item.name)))[: 1 + self.flip]:
                pixels.append(copy)
                labels.append(item.label)
                names.append(name)
            enlarged += small
        size = (0, self.resolution, self.resolution, 3)
        return Crops(
            request,
            torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(size, dtype=torch.uint8),
            torch.tensor(labels, dtype=torch.int64),
            names,
            torch.from_numpy(np.stack(moments)) if moments else None,
            bad,
            enlarged,
        )


def mirrored(name: str) -> str:
    """What the mirror image of an image is called in messages."""
    return f"{name}, mirrored"


def as_is(crops: Crops) -> Crops:
    """Collate function: a batch is made by the dataset already.

    A reading process puts it into shared memory here, where a lack of it is an error that reaches the first process; while
    the batch is sent it would be lost, and the first process would wait forever.
    """
    if get_worker_info() is not None:
        for tensor in (crops.pixels, crops.label, crops.moments):
            if tensor is not None:
                tensor.share_memory_()
    return crops
