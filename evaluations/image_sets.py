"""Sets of images to evaluate: npz files, folders and archives of images, packed datasets; read in pieces, never whole."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.arrays import Array, members
from common.crop import center_crop
from common.files import read_json, sha256
from common.reporting import say
from config import UserError
from evaluations.image_folder import Folder, find_images
from evaluations.image_set import ImageSet, by_class, by_runs, joined, sha
from evaluations.sidecars import common_sidecar, read_sidecar
from evaluations.statistics import Statistics
from packed.format import MANIFEST


def open_images(
    paths: Sequence[Path],
    limit: int | None = None,
    *,
    resolution: int | None = None,
    fallback: int | None = None,
    statistics: bool = False,
) -> ImageSet:
    """Open one or several npz files, folders or archives of images, or packed datasets as one set, in the order given.

    Args:
        paths: at least one.
        limit: keep only so many images, as `ImageSet.part` chooses them.
        resolution: crop every image that is not of this size (height and width) as for training; a message says how many.
        fallback: without `resolution`, what a folder of several sizes is cropped to, unless a set beside it is of one size.
        statistics: whether a file of mu and sigma without images will do.

    Raises:
        SeveralSizes: there is such a folder and nothing gives the size.
        UserError: a file cannot be used; the message names it.
    """
    found = [_open(Path(path)) for path in paths]
    for part in found:
        if isinstance(part, ImageSet) and not len(part) and not (statistics and len(found) == 1):
            raise UserError(
                f"{part.name} holds statistics (mu, sigma) and no images: it can be --reference, on its own"
            )
    beside = {part.shape[1:3] for part in found if part.shape is not None}
    if len(beside) == 1 and len(set(*beside)) == 1:
        fallback = beside.pop()[0]
    parts = [part.open(resolution, fallback) if isinstance(part, Folder) else _crop(part, resolution) for part in found]
    images = parts[0] if len(parts) == 1 else _concatenate(parts)
    images = images if limit is None else images.part(limit)
    if images.cropped:
        enlarged = f" ({images.enlarged:,} of them enlarged)" if images.enlarged else ""
        say(
            f"{images.cropped:,} of {len(images):,} images of {images.name} are cropped to "
            f"{images.shape[1]} x {images.shape[2]}, as for training{enlarged}"
        )
    return images


def _open(path: Path) -> "ImageSet | Folder":
    try:
        if (path / MANIFEST).is_file() and not _announces_labels(path / MANIFEST):
            return open_packed(path)
        if path.is_dir() and (path / "samples.npz").is_file():  # what generate.py writes, with pictures beside it
            return open_npz(path / "samples.npz")
        if path.suffix == ".npz" and path.is_file():
            return open_npz(path)
        return find_images(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}: {error.filename})") from error


def _announces_labels(path: Path) -> bool:
    """Whether a dataset.json is that of EDM's tools, not the manifest of a packed dataset."""
    try:
        return "labels" in read_json(path)
    except (UserError, TypeError):
        return False


def _crop(images: ImageSet, size: int | None) -> ImageSet:
    """A set of another size, cropped as it is read; statistics that came with it are not of the crops and are dropped."""
    if size is None or images.shape[1:3] == (size, size) or not len(images):
        return images
    return replace(
        images,
        shape=(len(images), size, size, 3),
        take=lambda numbers: np.stack([center_crop(Image.fromarray(x), size) for x in images.take(numbers)]),
        digest=cache(lambda: sha(images.digest(), f"cropped to {size}")),
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
        joined([(len(part), part.take) for part in parts]),
        lambda: sha(*(part.digest() for part in parts)),
        labels,
        sidecar=common_sidecar([part.sidecar or {} for part in parts]),
        grouped=any(part.grouped for part in parts),
        sizes=sizes,
    )


def open_npz(path: Path) -> ImageSet:
    """ADM's sample file: `arr_0` (N, H, W, 3) uint8, optionally `arr_1` (N,) labels and mu, sigma, mu_s, sigma_s.

    A file of mu and sigma alone, as pytorch-fid and others write them, is a set of no images with statistics.
    Stored members are read in place, compressed ones streamed; pickled content is refused.
    """
    arrays, digest = members(path), cache(partial(sha256, path))
    statistics = _statistics(path, arrays)
    if "arr_0" not in arrays and "pooled" in statistics:
        return ImageSet(
            path.name, (0, 0, 0, 3), lambda _: np.zeros((0, 0, 0, 3), np.uint8), digest, statistics=statistics
        )
    if "arr_0" not in arrays:
        raise UserError(f"{path} has no array arr_0 (found: {', '.join(sorted(arrays)) or 'nothing'})")
    images = arrays["arr_0"]
    if images.order != "C":
        raise UserError(f"{path}: arr_0 is in Fortran order; save it with np.ascontiguousarray")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {images.dtype}, images must be uint8 (0 .. 255)")
    if len(images.shape) != 4 or images.shape[3] != 3:
        raise UserError(f"{path}: arr_0 has shape {images.shape}, images must be (N, H, W, 3)")
    if not np.prod(images.shape):
        raise UserError(f"{path}: arr_0 holds no images, its shape is {images.shape}")
    labels = _labels(path, arrays["arr_1"], images.shape[0]) if "arr_1" in arrays else None
    return ImageSet(
        path.name,
        images.shape,
        by_runs(images.rows),
        digest,
        labels,
        statistics or None,
        read_sidecar(path),
        by_class(labels),
    )


def _statistics(path: Path, arrays: dict[str, Array]) -> dict[str, Statistics]:
    """The mean and covariance of Inception's features that a file records, by kind."""
    statistics = {}
    for space, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mean in arrays and covariance in arrays:
            values = [arrays[key].all().astype(np.float64) for key in (mean, covariance)]
            if values[0].ndim != 1 or values[1].shape != (len(values[0]),) * 2:
                raise UserError(f"{path}: {mean} {values[0].shape} and {covariance} {values[1].shape} do not fit")
            statistics[space] = Statistics(0, *values)
    return statistics


def _labels(path: Path, array: Array, count: int) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,):
        raise UserError(f"{path}: arr_1 is {array.dtype} {array.shape}, labels must be {count} integers")
    return array.all().astype(np.int64)


def open_packed(path: Path) -> ImageSet:
    """The pixels of a packed dataset.

    Raises:
        UserError: it holds tokens instead of pixels.
    """
    from dataset import PackedDataset

    dataset = PackedDataset(path, fields=("pixels", "label"))

    def take(numbers: Sequence[int]) -> np.ndarray:
        pixels = dataset[numbers].pixels
        assert pixels is not None
        return pixels.numpy()

    def digest() -> str:  # the manifest holds the checksum of every shard
        return sha(*(shard["files"]["pixels"]["sha256"] for shard in dataset.manifest.shards))

    shape = dataset.manifest.fields["pixels"]["shape"]
    return ImageSet(path.name, (len(dataset), *shape), take, digest, dataset.labels(), grouped=True)
