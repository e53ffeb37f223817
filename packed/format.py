"""The format of a packed dataset: its manifest, and how its files are named, laid out and checked.

Every JSON file carries a checksum of its own content, every shard file a SHA-256, and every record of it a CRC-32, so that
damage can be located down to the record.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import files
from config import MissingFile, UserError

SCHEMA = 1
MANIFEST = "dataset.json"
CRC = "crc"  # the file of a shard that holds (records, fields) CRC-32, fields in alphabetical order
# SD-VAE's standard deviations go down to exp(-15) = 3e-7, below float16's smallest normal number (6e-5). Stored times
# 2**10 they keep all 11 bits between 6e-8 and 64. The writer measures the error and puts it in the manifest.
MOMENTS_STD_SCALE = 1024.0
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
    write_json(directory / MANIFEST, asdict(manifest))


def read_manifest(directory: Path | str) -> Manifest:
    """Read `dataset.json`. Raises UserError, in one sentence that says what to do."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise MissingFile(f"dataset folder {path.parent} does not exist")
    if not path.is_file():
        raise MissingFile(f"{path.parent} is not a packed dataset: no {MANIFEST} (packing unfinished? run it again)")
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}: pack the data again")
    try:
        content["encoders"] = [EncoderInfo(**encoder) for encoder in content["encoders"]]
        return Manifest(**content)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); {REPAIR}") from error


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
    if files.sha256(path) != manifest.files.get(path.name, files.sha256(path)):
        raise UserError(f"{path} does not match its checksum; {REPAIR}")
    return np.load(path, allow_pickle=False)


def shard_file(field: str, number: int) -> str:
    """Name of the file that holds a field of shard `number`."""
    return f"{field}-{number:05d}.npy"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its content, whole or not at all."""
    files.write_json(path, {**content, "checksum": files.fingerprint(content)})


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises UserError if it is missing or is not what was written."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing; {REPAIR}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {REPAIR}") from error
    if checksum != files.fingerprint(content):
        raise UserError(f"{path} was edited or damaged: its checksum does not match; {REPAIR}")
    return content
