"""A folder or archive of image files as a set to evaluate."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.class_names import by_spelling, order_note, split_kinds
from common.contents import Item
from common.crop import center_crop
from common.files import sha256
from common.images import BadImage, decode_image, image_size
from common.labels import Announced, announced_labels
from common.listing import list_contents
from common.members import Members
from common.processes import rank
from common.reporting import progress, say
from config import UserError
from evaluations.image_set import ImageSet, sha
from evaluations.sidecars import read_sidecar

_AT_ONCE = 10_000  # headers read between two updates of the progress bar, which smaller folders do not have


class SeveralSizes(UserError):
    """A folder holds images of several sizes, and nothing says to which size they are to be cropped."""


class Folder(NamedTuple):
    """Image files below a folder or in an archive, in order of their paths. sizes: (N, 2) height and width of each."""

    path: Path
    members: Members
    items: list[Item]
    sizes: np.ndarray
    announced: Announced | None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """As ImageSet's; None for images of several sizes."""
        return (len(self.items), *self.sizes[0].tolist(), 3) if (self.sizes == self.sizes[0]).all() else None

    def open(self, resolution: int | None, fallback: int | None) -> ImageSet:
        """The images at their one size, or cropped: all to `resolution`, or those of several sizes to `fallback`.

        A dataset.json gives the labels, or one level of subfolders: 0, 1, ... by name.

        Raises:
            SeveralSizes: there is no size.
        """
        side = resolution or (fallback if self.shape is None else None)
        if side is None and self.shape is None:
            other = int((self.sizes != self.sizes[0]).any(1).argmax())
            names = (f"{self.items[i].name} is {' x '.join(map(str, self.sizes[i]))}" for i in (0, other))
            raise SeveralSizes(
                f"{self.path} holds images of several sizes ({', '.join(names)}): give --resolution N, and they are cropped "
                "to N x N as for training"
            )
        height, width = (side, side) if side else self.sizes[0].tolist()
        whole = (self.sizes == (height, width)).all()

        def take(numbers: Sequence[int]) -> np.ndarray:
            with ThreadPoolExecutor(8) as pool:  # decoding leaves the interpreter lock
                decode = partial(self._decode, size=(width, height), side=side)
                return np.stack(list(pool.map(decode, [self.items[number] for number in numbers])))

        def digest() -> str:
            content = [f"{item.name} {self._sha256(item)}" for item in self.items]
            return sha(*content, *([] if whole else [f"cropped to {side}"]))

        return ImageSet(
            self.path.name,
            (len(self.items), height, width, 3),
            take,
            cache(digest),
            self._labels(),
            sidecar=read_sidecar(self.path),
            grouped=True,
            sizes=None if whole else self.sizes,
        )

    def _labels(self) -> np.ndarray | None:
        if self.announced is not None:
            return None if self.announced.numbers is None else np.array(self.announced.numbers, np.int64)
        places = [item.name.split("/") for item in self.items]
        if any(len(place) != 2 for place in places):
            return None
        names = by_spelling((folder for folder, _ in places), str(self.path))
        if note := order_note(list(names)):
            say(f"{self.path}: {note}")
        number = {name: label for label, name in enumerate(names.values())}
        return np.array([number[folder] for folder, _ in places], np.int64)

    def size(self, item: Item) -> tuple[int, int]:
        """(height, width) by the header. Raises UserError that names the image."""
        try:
            return image_size(self.members.read(item))
        except BadImage as error:
            raise UserError(f"{self.path / item.name}: {error}") from error

    def _decode(self, item: Item, size: tuple[int, int], side: int | None) -> np.ndarray:
        """(H, W, 3) uint8 of an image of `size` (width, height); one of another size is cropped to a square of `side`."""
        try:
            image = decode_image(self.members.read(item), still_8_bit=True)
        except BadImage as error:
            raise UserError(f"{self.path / item.name}: {error}") from error
        if image.size == size:
            return np.asarray(image)
        if side is None:
            raise UserError(
                f"{self.path / item.name} has changed: it was {size[1]} x {size[0]} and is {image.height} x {image.width}"
            )
        return center_crop(image, side)

    def _sha256(self, item: Item) -> str:
        content = self.members.read(item)
        return sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


def find_images(path: Path) -> Folder:
    """All images of a folder or archive, listed as for packing; their headers are read for the sizes.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    contents = list_contents(path)
    if not contents.items:
        raise UserError(f"{path} holds no images, and is neither a packed dataset nor an .npz file")
    if contents.unreadable:
        raise UserError(f"{path}: {contents.refusal()}")
    if contents.left_out:
        say(f"left out of {path}: {contents.note()}")
    splits = split_kinds({item.name.split("/")[0] for item in contents.items})
    if len(splits) > 1:
        say(
            f"{path} holds {', '.join(sorted(splits))}: all of them are measured as one set; give one of them to measure it"
        )
    items = contents.items = sorted(contents.items, key=lambda item: item.name.split("/"))
    members = Members(contents.kind, contents.root, contents.files)
    images = Folder(path, members, items, np.zeros(0), announced_labels(contents))
    sizes: list[tuple[int, int]] = []
    shown = len(items) > _AT_ONCE and rank() == 0
    with (
        ThreadPoolExecutor(8) as pool,
        progress(len(items), unit="image", description=f"sizes, {path.name}", shown=shown) as bar,
    ):
        for start in range(0, len(items), _AT_ONCE):
            sizes += pool.map(images.size, items[start : start + _AT_ONCE])
            bar.update(len(sizes) - start)
    return images._replace(sizes=np.array(sizes, np.int32))
