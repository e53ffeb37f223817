"""Sets of images to evaluate: npz files, image folders, packed datasets; read in pieces, never whole."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.arrays import Array, members
from common.crop import center_crop
from common.files import sha256
from common.images import BadImage, decode_image, image_size, list_images
from common.processes import rank
from common.reporting import progress, say
from config import MissingFile, UserError
from evaluations.sidecars import common_sidecar, read_sidecar
from evaluations.statistics import Statistics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")  # of the files of a folder that are measured
_AT_ONCE = 10_000  # headers read between two updates of the progress bar, which smaller folders do not have


Read = Callable[[int, int], np.ndarray]  # images from number `start` to before `stop`, (stop - start, H, W, 3) uint8


@dataclass(frozen=True)
class ImageSet:
    """N images of one size.

    `read(start, stop)` gives uint8 (stop - start, H, W, 3); `digest()` the SHA-256 of the content; `labels` (N,) int64
    or None; `statistics` what the file itself records of a larger set (ADM's mu, sigma: "pooled"; mu_s, sigma_s:
    "spatial"); `sidecar` how the images were made, from the JSON beside them; `grouped`: the order is that of folders or
    shards, so a part of the set is taken evenly from it all and not from its beginning; `sizes` (N, 2) height and width
    in the file, where some images are cropped as they are read.
    """

    name: str
    shape: tuple[int, int, int, int]
    read: Read
    digest: Callable[[], str]
    labels: np.ndarray | None = None
    statistics: dict[str, Statistics] | None = None
    sidecar: dict | None = None
    grouped: bool = False
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def cropped(self) -> int:
        """How many of the images are cropped."""
        return 0 if self.sizes is None else int((self.sizes != self.shape[1:3]).any(1).sum())

    @property
    def enlarged(self) -> int:
        """How many of the images are enlarged to be cropped."""
        return 0 if self.sizes is None else int((self.sizes.min(1) < self.shape[1]).sum())

    def first(self, count: int) -> "ImageSet":
        """The set of the first `count` images; itself if it has no more."""
        if count >= len(self):
            return self
        return replace(
            self,
            name=f"{self.name} (first {count})",
            shape=(count, *self.shape[1:]),
            digest=lambda: _sha(self.digest(), f"first {count}"),
            labels=None if self.labels is None else self.labels[:count],
            statistics=None,
            sizes=None if self.sizes is None else self.sizes[:count],
        )

    def pick(self, indices: Iterable[int]) -> np.ndarray:
        """Single images, uint8 (len(indices), H, W, 3), in the order of the indices."""
        numbers = [int(index) for index in indices]
        found = {number: self.read(number, number + 1)[0] for number in sorted(set(numbers))}
        return np.stack([found[number] for number in numbers])


class SeveralSizes(UserError):
    """A folder holds images of several sizes, and nothing says to which size they are to be cropped."""


def open_images(
    paths: Sequence[Path], limit: int | None = None, *, resolution: int | None = None, fallback: int | None = None
) -> ImageSet:
    """Open one or several npz files, image folders or packed datasets as one set, in the order given.

    Args:
        paths: at least one.
        limit: keep only the first `limit` images.
        resolution: crop every image that is not of this size (height and width) as for training; a message says how many.
        fallback: without `resolution`, what a folder of several sizes is cropped to, unless a set beside it is of one size.

    Raises:
        SeveralSizes: there is such a folder and nothing gives the size.
        UserError: a file cannot be used; the message names it.
    """
    found = [_open(Path(path)) for path in paths]
    beside = {part.shape[1:3] for part in found if part.shape is not None}
    if len(beside) == 1 and len(set(*beside)) == 1:
        fallback = beside.pop()[0]
    parts = [part.open(resolution, fallback) if isinstance(part, Folder) else _crop(part, resolution) for part in found]
    images = parts[0] if len(parts) == 1 else _concatenate(parts)
    images = images if limit is None else images.first(limit)
    if images.cropped:
        enlarged = f" ({images.enlarged:,} of them enlarged)" if images.enlarged else ""
        say(
            f"{images.cropped:,} of {len(images):,} images of {images.name} are cropped to "
            f"{images.shape[1]} x {images.shape[2]}, as for training{enlarged}"
        )
    return images


def _open(path: Path) -> "ImageSet | Folder":
    try:
        if not path.exists():
            raise MissingFile(f"{path} does not exist")
        if path.is_dir():
            return open_packed(path) if (path / "dataset.json").is_file() else find_images(path)
        if path.suffix != ".npz":
            raise UserError(f"{path} is not an .npz file, an image folder or a packed dataset")
        return open_npz(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}: {error.filename})") from error


def _crop(images: ImageSet, size: int | None) -> ImageSet:
    """A set of another size, cropped as it is read; statistics that came with it are not of the crops and are dropped."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    return replace(
        images,
        shape=(len(images), size, size, 3),
        read=lambda start, stop: np.stack([center_crop(Image.fromarray(x), size) for x in images.read(start, stop)]),
        digest=cache(lambda: _sha(images.digest(), f"cropped to {size}")),
        statistics=None,
        sizes=np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1)),
    )


def _concatenate(parts: list[ImageSet]) -> ImageSet:
    for part in parts[1:]:
        if part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"{part.name} has images of {part.shape[1]} x {part.shape[2]}, {parts[0].name} of "
                f"{parts[0].shape[1]} x {parts[0].shape[2]}; they cannot be one set"
            )
    labels, sizes = None, None
    if all(part.labels is not None for part in parts):
        labels = np.concatenate([part.labels for part in parts])
    if any(part.sizes is not None for part in parts):
        sizes = np.concatenate(
            [np.tile(part.shape[1:3], (len(part), 1)) if part.sizes is None else part.sizes for part in parts]
        )
    return ImageSet(
        " + ".join(part.name for part in parts),
        (sum(map(len, parts)), *parts[0].shape[1:]),
        _joined([(len(part), part.read) for part in parts]),
        lambda: _sha(*(part.digest() for part in parts)),
        labels,
        sidecar=common_sidecar([part.sidecar or {} for part in parts]),
        grouped=any(part.grouped for part in parts),
        sizes=sizes,
    )


def _joined(parts: Sequence[tuple[int, Read]]) -> Read:
    """Read from several sets as from one. parts: number of images and reader of each."""
    ends = np.cumsum([count for count, _ in parts])

    def read(start: int, stop: int) -> np.ndarray:
        pieces = []
        for (count, read_part), end in zip(parts, ends):
            first = end - count
            if start < end and stop > first:
                pieces.append(read_part(max(start - first, 0), min(stop, end) - first))
        return np.concatenate(pieces)

    return read


def open_npz(path: Path) -> ImageSet:
    """ADM's sample file: `arr_0` (N, H, W, 3) uint8, optionally `arr_1` (N,) labels and mu, sigma, mu_s, sigma_s.

    Stored members are read in place, compressed ones streamed; pickled content is refused.
    """
    arrays = members(path)
    if "arr_0" not in arrays:
        raise UserError(f"{path} has no array arr_0 (found: {', '.join(sorted(arrays)) or 'nothing'})")
    images = arrays["arr_0"]
    if images.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {images.dtype}, images must be uint8 (0 .. 255)")
    if len(images.shape) != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: arr_0 has shape {images.shape}, images must be (N, H, W, 3)")
    if not np.prod(images.shape):
        raise UserError(f"{path}: arr_0 holds no images, its shape is {images.shape}")
    labels = _labels(path, arrays["arr_1"], images.shape[0]) if "arr_1" in arrays else None
    statistics = {}
    for space, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mean in arrays and covariance in arrays:
            values = [arrays[key].all().astype(np.float64) for key in (mean, covariance)]
            if values[0].ndim != 1 or values[1].shape != (len(values[0]),) * 2:
                raise UserError(f"{path}: {mean} {values[0].shape} and {covariance} {values[1].shape} do not fit")
            statistics[space] = Statistics(0, *values)
    digest = cache(partial(sha256, path))
    return ImageSet(path.name, images.shape, images.rows, digest, labels, statistics or None, read_sidecar(path))


def _labels(path: Path, array: Array, count: int) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,):
        raise UserError(f"{path}: arr_1 is {array.dtype} {array.shape}, labels must be {count} integers")
    return array.all().astype(np.int64)


class Folder(NamedTuple):
    """Image files below a folder, in order of their paths. sizes: (N, 2) height and width of each."""

    path: Path
    files: list[Path]
    sizes: np.ndarray

    @property
    def shape(self) -> tuple[int, ...] | None:
        """As ImageSet's; None for images of several sizes."""
        return (len(self.files), *self.sizes[0].tolist(), 3) if (self.sizes == self.sizes[0]).all() else None

    def open(self, resolution: int | None, fallback: int | None) -> ImageSet:
        """The images at their one size, or cropped: all to `resolution`, or those of several sizes to `fallback`.

        One level of subfolders gives the labels: 0, 1, ... by name.

        Raises:
            SeveralSizes: there is no size.
        """
        side = resolution or (fallback if self.shape is None else None)
        if side is None and self.shape is None:
            other = int((self.sizes != self.sizes[0]).any(1).argmax())
            names = (
                f"{self.files[i].relative_to(self.path)} is {' x '.join(map(str, self.sizes[i]))}" for i in (0, other)
            )
            raise SeveralSizes(
                f"{self.path} holds images of several sizes ({', '.join(names)}): give --resolution N, and they are cropped "
                "to N x N as for training"
            )
        height, width = (side, side) if side else self.sizes[0].tolist()
        whole = (self.sizes == (height, width)).all()
        path, files = self.path, self.files

        def read(start: int, stop: int) -> np.ndarray:
            with ThreadPoolExecutor(8) as pool:  # decoding leaves the interpreter lock
                return np.stack(list(pool.map(partial(_decode, size=(width, height), side=side), files[start:stop])))

        def digest() -> str:
            content = [f"{file.relative_to(path)} {sha256(file)}" for file in files]
            return _sha(*content, *([] if whole else [f"cropped to {side}"]))

        labels, places = None, [file.relative_to(path).parts for file in files]
        if all(len(place) == 2 for place in places):
            labels = np.unique([folder for folder, _ in places], return_inverse=True)[1]
        return ImageSet(
            path.name,
            (len(files), height, width, 3),
            read,
            cache(digest),
            labels,
            sidecar=read_sidecar(path),
            grouped=True,
            sizes=None if whole else self.sizes,
        )


def find_images(path: Path) -> Folder:
    """All images below a folder; their headers are read for the sizes.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    files = sorted(path / name for name in list_images(path) if name.lower().endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}) and is not a packed dataset")
    sizes: list[tuple[int, int]] = []
    shown = len(files) > _AT_ONCE and rank() == 0
    with (
        ThreadPoolExecutor(8) as pool,
        progress(len(files), unit="image", description=f"sizes, {path.name}", shown=shown) as bar,
    ):
        for start in range(0, len(files), _AT_ONCE):
            sizes += pool.map(_size, files[start : start + _AT_ONCE])
            bar.update(len(sizes) - start)
    return Folder(path, files, np.array(sizes, np.int32))


def _size(file: Path) -> tuple[int, int]:
    try:
        return image_size(file)
    except BadImage as error:
        raise UserError(f"{file}: {error}") from error


def _decode(file: Path, size: tuple[int, int], side: int | None) -> np.ndarray:
    """(H, W, 3) uint8 of an image of `size` (width, height); one of another size is cropped to a square of `side`."""
    try:
        image = decode_image(file, still_8_bit=True)
    except BadImage as error:
        raise UserError(f"{file}: {error}") from error
    if image.size == size:
        return np.asarray(image)
    if side is None:
        raise UserError(f"{file} has changed: it was {size[1]} x {size[0]} and is {image.height} x {image.width}")
    return center_crop(image, side)


def open_packed(path: Path) -> ImageSet:
    """The pixels of a packed dataset.

    Raises:
        UserError: it holds tokens instead of pixels.
    """
    from dataset import PackedDataset

    dataset = PackedDataset(path, fields=("pixels", "label"))

    def read(start: int, stop: int) -> np.ndarray:
        pixels = dataset[range(start, stop)].pixels
        assert pixels is not None
        return pixels.numpy()

    def digest() -> str:  # the manifest holds the checksum of every shard
        return _sha(*(shard["files"]["pixels"]["sha256"] for shard in dataset.manifest.shards))

    shape = dataset.manifest.fields["pixels"]["shape"]
    return ImageSet(path.name, (len(dataset), *shape), read, digest, dataset.labels(), grouped=True)


def _sha(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
