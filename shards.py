"""The files of a packed dataset: what the manifest says, and how a shard is written so that it is whole or absent.

Read through `dataset.py`, which re-exports what readers need. Every JSON file carries a checksum of its own content, every
shard file a SHA-256, and every record of it a CRC-32, so that damage can be told down to the record.
"""

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SCHEMA = 1
MANIFEST = "dataset.json"
CRC = "crc"  # the file of a shard that holds (records, fields) CRC-32, fields in alphabetical order
# SD-VAE's standard deviations go down to exp(-15) = 3e-7, below float16's smallest normal number (6e-5). Stored times
# 2**10 they keep all 11 bits between 6e-8 and 64. The writer measures the error and puts it in the manifest.
MOMENTS_STD_SCALE = 1024.0


@dataclass(frozen=True)
class EncoderInfo:
    """name: what `--enc-type` takes. dim: token width. grid: patch tokens form a grid x grid square. weights: SHA-256 of
    the network's parameters, or "" where nobody computed it."""

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


class ShardWriter:
    """Writes one shard batch by batch, in bounded memory: `append` any number of times, then `finish`.

    Files appear under their names by rename after fsync, the entry `shard-00000.json` last: a killed process leaves
    `.tmp` files, which the next one overwrites.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number
        self.count = 0
        self._streams: dict[str, BinaryIO] = {}
        self._specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._crc: list[np.ndarray] = []

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add n records; field => (n, ...) array, the same fields, types and shapes in every call."""
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise ValueError(f"the fields of a shard must have equally many records, got {counts}")
        specs = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
        if not self._streams:
            self._specs = specs
            for name in arrays:
                self._streams[name] = self._file(name).with_suffix(".tmp").open("wb")
                self._streams[name].write(npy_header(*specs[name], 0))
        elif specs != self._specs:
            raise ValueError(f"the records of a shard must be alike, got {specs} after {self._specs}")
        crc = np.empty((counts.pop(), len(arrays)), np.uint32)
        for column, name in enumerate(sorted(arrays)):
            array = np.ascontiguousarray(arrays[name])
            for row in range(len(array)):
                crc[row, column] = zlib.crc32(array[row].data if array.ndim > 1 else array[row].tobytes())
            self._streams[name].write(array.data)
        self._crc.append(crc)
        self.count += len(crc)

    def finish(self, notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make the shard appear; returns its manifest entry, {"count", "files", **notes}."""
        entry: dict[str, Any] = {"count": self.count, "files": {}}
        for name, stream in self._streams.items():
            stream.seek(0)
            stream.write(npy_header(*self._specs[name], self.count))
            entry["files"][name] = self._commit(name, stream)
        if self.count:
            stream = self._file(CRC).with_suffix(".tmp").open("wb")
            np.save(stream, np.concatenate(self._crc), allow_pickle=False)
            entry["files"][CRC] = self._commit(CRC, stream)
        entry |= notes or {}
        write_json(entry_file(self.directory, self.number), entry)
        return entry

    def abandon(self) -> None:
        """Close and delete what was begun."""
        for name, stream in self._streams.items():
            stream.close()
            self._file(name).with_suffix(".tmp").unlink(missing_ok=True)
        self._streams = {}

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}-{self.number:05d}.npy"

    def _commit(self, name: str, stream: BinaryIO) -> dict[str, str]:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        file = self._file(name)
        temporary = file.with_suffix(".tmp")
        digest = sha256(temporary)
        temporary.replace(file)
        return {"file": file.name, "sha256": digest}


def write_shard(directory: Path, number: int, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write shard `number` in one go; field => (n, ...) array. Returns its manifest entry."""
    writer = ShardWriter(directory, number)
    writer.append(arrays)
    return writer.finish()


def entry_file(directory: Path, number: int) -> Path:
    """Where the manifest entry of a finished shard is kept."""
    return directory / f"shard-{number:05d}.json"


def npy_header(dtype: np.dtype, shape: tuple[int, ...], count: int) -> bytes:
    """The .npy header of `count` records; equally long for every count, since numpy leaves room for a growing first axis."""
    stream = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def npy_size(dtype: np.dtype, shape: tuple[int, ...], count: int) -> int:
    """Bytes of a shard file of `count` records."""
    return len(npy_header(dtype, shape, count)) + count * dtype.itemsize * math.prod(shape)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `dataset.json`, which makes the directory a dataset."""
    write_json(directory / MANIFEST, asdict(manifest))


def read_manifest(directory: Path | str) -> Manifest:
    """Read `dataset.json`. Raises FileNotFoundError or ValueError, in one sentence with the mend."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise FileNotFoundError(f"dataset folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a packed dataset: no {MANIFEST} (packing unfinished? run it again)")
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}: pack the data again")
    try:
        content["encoders"] = [EncoderInfo(**encoder) for encoder in content["encoders"]]
        return Manifest(**content)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); repair it with preprocessing/pack.py --repair") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its content: the file is the old one or the new one, whole, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump({**content, "checksum": fingerprint(content)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises ValueError if it is no JSON or not what was written."""
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); repair it with preprocessing/pack.py --repair") from error
    if checksum != fingerprint(content):
        raise ValueError(f"{path} was edited or damaged: its checksum does not match; repair it with --repair")
    return content


def fingerprint(content: Mapping[str, Any]) -> str:
    """Hex SHA-256 of JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
