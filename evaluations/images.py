"""Sets of images to evaluate: npz files, image folders, packed datasets; read in pieces, never whole."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from evaluations.npz import Array, members
from evaluations.statistics import Statistics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
READABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class ImageSet:
    """N images of one size.

    `read(start, stop)` gives uint8 (stop - start, H, W, 3); `digest()` the SHA-256 of the content; `labels` (N,) int64
    or None; `statistics` what the file itself records of a larger set (ADM's mu, sigma: "pooled"; mu_s, sigma_s:
    "spatial"); `sidecar` how the images were made, from the JSON beside them; `grouped`: the order is that of folders or
    shards, so a part of the set is taken evenly from it all and not from its beginning.
    """

    name: str
    shape: tuple[int, int, int, int]
    read: Callable[[int, int], np.ndarray]
    digest: Callable[[], str]
    labels: np.ndarray | None = None
    statistics: dict[str, Statistics] | None = None
    sidecar: dict | None = None
    grouped: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (len(indices), H, W, 3): single images, in the order asked for."""
        found = {int(index): self.read(int(index), int(index) + 1)[0] for index in sorted(set(map(int, indices)))}
        return np.stack([found[int(index)] for index in indices])


def open_images(paths: Sequence[Path], limit: int | None = None) -> ImageSet:
    """Open one or several npz files, image folders or packed datasets as one set, in the order given.

    limit: keep the first so many. Raises FileNotFoundError or ValueError with a sentence naming the file.
    """
    parts = [_open(Path(path)) for path in paths]
    if not parts:
        raise ValueError("no images were named")
    images = parts[0] if len(parts) == 1 else _concatenate(parts)
    if limit is not None and limit < len(images):
        if limit < 1:
            raise ValueError(f"the number of images must be at least 1, got {limit}")
        labels = None if images.labels is None else images.labels[:limit]
        digest = images.digest
        images = replace(
            images,
            name=f"{images.name} (first {limit})",
            shape=(limit, *images.shape[1:]),
            digest=lambda: _sha(digest(), f"first {limit}"),
            labels=labels,
            statistics=None,
        )
    return images


def _open(path: Path) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return open_packed(path) if (path / "dataset.json").is_file() else open_folder(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} is no .npz file, image folder or packed dataset")
    return open_npz(path)


def _concatenate(parts: list[ImageSet]) -> ImageSet:
    for part in parts[1:]:
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{part.name} has images of {part.shape[1]} x {part.shape[2]}, {parts[0].name} of "
                f"{parts[0].shape[1]} x {parts[0].shape[2]}; they cannot be one set"
            )
    ends = np.cumsum([len(part) for part in parts])

    def read(start: int, stop: int) -> np.ndarray:
        pieces = []
        for part, end in zip(parts, ends, strict=True):
            first = end - len(part)
            if start < end and stop > first:
                pieces.append(part.read(max(start - first, 0), min(stop, end) - first))
        return np.concatenate(pieces)

    labels = None
    if all(part.labels is not None for part in parts):
        labels = np.concatenate([part.labels for part in parts])
    return ImageSet(
        " + ".join(part.name for part in parts),
        (int(ends[-1]), *parts[0].shape[1:]),
        read,
        lambda: _sha(*(part.digest() for part in parts)),
        labels,
        sidecar=_common([part.sidecar or {} for part in parts]),
        grouped=any(part.grouped for part in parts),
    )


def open_npz(path: Path) -> ImageSet:
    """ADM's sample file: `arr_0` (N, H, W, 3) uint8, optionally `arr_1` (N,) labels and mu, sigma, mu_s, sigma_s.

    Stored members are read in place, compressed ones streamed; pickled content is refused.
    """
    arrays = members(path)
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0 (found: {', '.join(sorted(arrays)) or 'nothing'})")
    images = arrays["arr_0"]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {images.dtype}, images must be uint8 (0 .. 255)")
    if len(images.shape) != 4 or images.shape[3] != 3:
        raise ValueError(f"{path}: arr_0 has shape {images.shape}, images must be (N, H, W, 3)")
    if not np.prod(images.shape):
        raise ValueError(f"{path}: arr_0 holds no images, its shape is {images.shape}")
    labels = _labels(path, arrays["arr_1"], images.shape[0]) if "arr_1" in arrays else None
    statistics = {}
    for space, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mean in arrays and covariance in arrays:
            values = [arrays[key].all().astype(np.float64) for key in (mean, covariance)]
            if values[0].ndim != 1 or values[1].shape != (len(values[0]),) * 2:
                raise ValueError(f"{path}: {mean} {values[0].shape} and {covariance} {values[1].shape} do not fit")
            statistics[space] = Statistics(0, *values)
    digest = cache(partial(_file_sha, path))
    return ImageSet(path.name, images.shape, images.rows, digest, labels, statistics or None, _sidecar(path))


def _labels(path: Path, array: Array, count: int) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,):
        raise ValueError(f"{path}: arr_1 is {array.dtype} {array.shape}, labels must be {count} integers")
    return array.all().astype(np.int64)


def open_folder(path: Path) -> ImageSet:
    """All images below a folder, in order of their paths. One level of subfolders gives the labels: 0, 1, ... by name."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)}) and is no packed dataset")
    height, width = _decode(files[0]).shape[:2]

    def decode(file: Path) -> np.ndarray:
        image = _decode(file)
        if image.shape[:2] != (height, width):
            raise ValueError(
                f"{file} is {image.shape[0]} x {image.shape[1]}, {files[0]} {height} x {width}; crop the images to one "
                "size first (preprocessing/pack.py does)"
            )
        return image

    def read(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(8) as pool:  # decoding leaves the interpreter lock
            return np.stack(list(pool.map(decode, files[start:stop])))

    def digest() -> str:
        return _sha(*(f"{file.relative_to(path)} {_file_sha(file)}" for file in files))

    classes = sorted({file.relative_to(path).parts[0] for file in files})
    labels = None
    if all(len(file.relative_to(path).parts) == 2 for file in files):
        labels = np.array([classes.index(file.relative_to(path).parts[0]) for file in files], dtype=np.int64)
    shape = (len(files), height, width, 3)
    return ImageSet(path.name, shape, read, cache(digest), labels, sidecar=_sidecar(path), grouped=True)


def _decode(file: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{file} is animated; a still image is needed")
            if image.mode not in READABLE_MODES:
                raise ValueError(f"{file} has pixel type {image.mode}; 8 bits a channel are needed")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def open_packed(path: Path) -> ImageSet:
    """The pixels of a packed dataset. Raises ValueError for one that holds tokens instead of pixels."""
    from dataset import PackedDataset

    dataset = PackedDataset(path, fields=("pixels", "label"))
    shards = range(len(dataset.manifest.shards))
    counts = [shard["count"] for shard in dataset.manifest.shards]
    starts = np.concatenate([[0], np.cumsum(counts)])

    def read(start: int, stop: int) -> np.ndarray:
        pieces = []
        for number in shards:
            low, high = max(start, starts[number]) - starts[number], min(stop, starts[number + 1]) - starts[number]
            if low < high:
                pieces.append(np.array(dataset.map(number, "pixels")[low:high]))
        return np.concatenate(pieces)

    def digest() -> str:  # the manifest holds the checksum of every shard
        return _sha(*(shard["files"]["pixels"]["sha256"] for shard in dataset.manifest.shards))

    shape = tuple(dataset.manifest.fields["pixels"]["shape"])
    return ImageSet(path.name, (len(dataset), *shape), read, digest, dataset.labels(), grouped=True)


def _sidecar(path: Path) -> dict | None:
    file = path.with_suffix(".json") if path.is_file() else path / "samples.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); it should say how {path.name} was made") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; it should say how {path.name} was made")
    return content


def _common(sidecars: list[dict]) -> dict | None:
    """What all sidecars agree on; a key on which they differ becomes "mixed"."""
    keys = sorted(set().union(*sidecars))
    mixed = {
        key: sidecars[0].get(key) if all(side.get(key) == sidecars[0].get(key) for side in sidecars) else "mixed"
        for key in keys
    }
    return mixed or None


def _file_sha(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
