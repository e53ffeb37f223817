"""The format of a packed dataset: its manifest, and how its files are named, laid out and checked.

Every JSON file carries a checksum of its own content, every shard file a SHA-256, and every record of it a CRC-32, so that
damage can be located down to the record.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.arrays import read_npy
from common.files import plain_name, read_sealed, sha256, write_sealed
from common.typed import build
from config import MissingFile, UserError

SCHEMA = 1
MANIFEST = "dataset.json"
CRC = "crc"  # the file of a shard that holds (records, fields) CRC-32, fields in alphabetical order
# SD-VAE's standard deviations go down to exp(-15) = 3e-7, below float16's smallest normal number (6e-5). Stored times
# 2**10 they keep all 11 bits between 6e-8 and 64. The writer measures the error and puts it in the manifest.
MOMENTS_STD_SCALE = 1024.0
FORMS = {  # type and number of axes of the records of each field; "patch_tokens.1" is of patch_tokens' form
    "moments": ("float16", 3),
    "label": ("int64", 0),
    "pixels": ("uint8", 3),
    "class_token": ("float16", 1),
    "patch_tokens": ("float16", 2),
}
_LARGEST = 2**40  # of any count or size
REPAIR = "repair it with `python -m preprocessing.pack --repair` and the flags that it was packed with"


@dataclass(frozen=True)
class EncoderInfo:
    """name: what `--enc-type` takes. dim: token width. grid: patch tokens form a grid x grid square. weights: SHA-256 of
    the network's parameters, or "" where it was not computed."""

    name: str
    dim: int
    grid: int
    weights: str = ""


@dataclass
class Manifest:
    """What `dataset.json` holds. shards: one {"count": n, "files": {field: {"file", "sha256"}}} each, in record order."""

    count: int
    shard_size: int  # records in every shard but the last of each part, less those whose image was skipped
    resolution: int  # pixels, H = W
    fields: dict[str, dict[str, Any]]  # name => {"dtype": "float16", "shape": [8, 32, 32]}
    classes: list[str]  # class names; a label is an index into them
    vae: dict[str, Any]  # {"name", "normalization": {...}, "factor", "weights": SHA-256 or ""}
    encoders: list[EncoderInfo]
    shards: list[dict[str, Any]]
    moments: dict[str, Any] = field(default_factory=lambda: {"kind": "mean_std", "std_scale": MOMENTS_STD_SCALE})
    crop: str = "adm_center"
    source: dict[str, Any] = field(default_factory=dict)  # provenance and counts, for people
    class_means: str | None = None  # `.npy` (classes, D) float32: mean class token of each class, encoder 0
    files: dict[str, str] = field(default_factory=dict)  # further files of the folder => SHA-256
    schema: int = SCHEMA


def entry_file(directory: Path, number: int) -> Path:
    """Where the manifest entry of a finished shard is kept."""
    return directory / f"shard-{number:05d}.json"


class Field(NamedTuple):
    """One field of a dataset: type and shape of a record."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "Field":
        """From a value of Manifest.fields."""
        return cls(np.dtype(spec["dtype"]), tuple(spec["shape"]))

    @property
    def record_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def header(self, count: int) -> bytes:
        """The .npy header of `count` records: equally long for all counts: numpy leaves space for a growing first axis."""
        stream, kind = io.BytesIO(), np.lib.format.dtype_to_descr(self.dtype)
        shape = (count, *self.shape)
        np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
        return stream.getvalue()

    def file_bytes(self, count: int) -> int:
        """Size of a shard file of `count` records."""
        return len(self.header(count)) + count * self.record_bytes


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `dataset.json`, which makes the directory a dataset."""
    write_sealed(directory / MANIFEST, asdict(manifest))


def read_manifest(directory: Path | str) -> Manifest:
    """Read `dataset.json`, whose values are checked. Raises UserError, in one sentence that says what to do."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise MissingFile(f"dataset folder {path.parent} does not exist")
    if not path.is_file():
        raise MissingFile(f"{path.parent} is not a packed dataset: no {MANIFEST} (packing unfinished? run it again)")
    content = read_sealed(path, REPAIR)
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}: pack the data again")
    manifest = build(Manifest, content, str(path))
    for name in ("count", "shard_size", "resolution"):
        _check_number(getattr(manifest, name), f"{path}: {name}")
    for encoder in manifest.encoders:
        _check_number(encoder.dim, f"{path}: dim of encoder {encoder.name}")
        _check_number(encoder.grid, f"{path}: grid of encoder {encoder.name}")
    check_fields(manifest.fields, path)
    build(_Vae, manifest.vae, f"{path}: vae")
    for number, shard in enumerate(manifest.shards):
        _check_entry(shard, path, f"shard {number}")
        for name in manifest.fields.keys() - shard["files"].keys():
            raise UserError(f"{path}: shard {number} has no file of {name}; {REPAIR}")
    for name in (*manifest.files, *([manifest.class_means] if manifest.class_means else ())):
        plain_name(name, path)
    return manifest


def check_fields(fields: Any, path: Path) -> None:
    """Check {"moments": {"dtype": "float16", "shape": [8, 32, 32]}, ...}, read from `path`. Raises UserError."""
    if not isinstance(fields, dict) or not fields:
        raise UserError(f"{path}: fields has no entries; {REPAIR}")
    for name, spec in fields.items():
        dtype, axes = FORMS.get(name.split(".")[0], (None, None))
        if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape"} or not isinstance(spec["shape"], list):
            raise UserError(f"{path}: field {name} is not described by a dtype and a shape; {REPAIR}")
        for size in spec["shape"]:
            _check_number(size, f"{path}: field {name}")
        if spec["dtype"] not in ([dtype] if dtype else [each for each, _ in FORMS.values()]) or (
            axes not in (None, len(spec["shape"]))
        ):
            raise UserError(f"{path}: field {name} cannot be {str(spec['dtype'])[:20]} {spec['shape']}; {REPAIR}")


@dataclass
class _Vae:
    """Types of what the manifest says of the VAE. normalization: of models.autoencoder."""

    name: str = ""
    normalization: dict[str, Any] = field(default_factory=dict)
    factor: int = 1
    weights: str = ""


@dataclass
class _Entry:
    """Types of what the entry of a shard holds: the notes are those of packing. skipped: name and reason of each image."""

    count: int
    files: dict[str, dict[str, str]]
    plan: str = ""
    skipped: list[list[str]] = field(default_factory=list)
    enlarged: int = 0
    error: dict[str, float] = field(default_factory=dict)


def read_entry(directory: Path, number: int) -> dict[str, Any]:
    """The manifest entry of a finished shard, with the notes of its writer.

    Raises:
        UserError: it is damaged, or names files that are not those of this shard; MissingFile if it is not finished.
    """
    path = entry_file(directory, number)
    entry = read_sealed(path, REPAIR)
    build(_Entry, entry, str(path))
    _check_entry(entry, path, "the shard", empty=True)
    for name, file in entry["files"].items():
        if file["file"] != shard_file(name, number):
            raise UserError(f"{path} names {file['file']} in place of {shard_file(name, number)}; {REPAIR}")
    return entry


def _check_entry(entry: Any, path: Path, which: str, *, empty: bool = False) -> None:
    """Raise UserError unless the entry of a shard has a possible count, and files that only this format writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
        raise UserError(f"{path}: the entry of {which} lists no files; {REPAIR}")
    if not (empty and entry.get("count") == 0):
        _check_number(entry.get("count"), f"{path}: count of {which}")
    for name, file in entry["files"].items():
        if not isinstance(file, dict) or not all(isinstance(file.get(key), str) for key in ("file", "sha256")):
            raise UserError(f"{path}: {which} has no file and SHA-256 of {name}; {REPAIR}")
        plain_name(file["file"], path)
        if not re.fullmatch(rf"{re.escape(name)}-\d{{5,}}\.npy", file["file"]):
            raise UserError(f"{path}: {file['file']!r} is not the name of a file of {name}; {REPAIR}")


def _check_number(value: Any, what: str) -> None:
    if type(value) is not int or not 0 < value < _LARGEST:
        raise UserError(f"{what} is {str(value)[:40]!r}, not a possible number; {REPAIR}")


def read_class_means(directory: Path, manifest: Manifest) -> np.ndarray | None:
    """Mean class token of each class, (classes, D) float32, of encoder 0; None where the dataset has no class tokens.

    Raises:
        UserError: the file is missing, or is not the one that the manifest describes.
    """
    if manifest.class_means is None:
        return None
    path = directory / manifest.class_means
    if not path.is_file():
        raise MissingFile(f"{path} is missing; {REPAIR}")
    expected = manifest.files.get(path.name)  # the first datasets do not have it
    if expected is not None and sha256(path) != expected:
        raise UserError(f"{path} does not match its checksum; {REPAIR}")
    means = read_npy(path)
    shape = len(manifest.classes), manifest.encoders[0].dim if manifest.encoders else None
    if means.dtype != np.float32 or means.shape != shape:
        raise UserError(
            f"{path} holds {means.dtype} {means.shape}, not one float32 vector per class, {shape}; {REPAIR}"
        )
    return means


def shard_file(field: str, number: int) -> str:
    """Name of the file that holds a field of shard `number`."""
    return f"{field}-{number:05d}.npy"
