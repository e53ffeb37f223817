"""The packed dataset: one schema, one writer, one reader, and the order in which training reads it.

A directory of fixed-size-record `.npy` files (memory-mapped by the reader) and a manifest, `dataset.json`, written last.
Record i of shard k is row i of each of its files. Fields:

    moments        (2C, h, w) float16   mean and scaled standard deviation of the VAE posterior (see MOMENTS_STD_SCALE)
    label          ()         int64
    pixels         (H, W, 3)  uint8     the crop; only if the encoder is to run in the training step
    class_token.K  (D_K,)     float16   of encoder K = 0, 1, ...; only if the tokens are cached
    patch_tokens.K (T, D_K)   float16   likewise
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from models import philox

SCHEMA = 1
MANIFEST = "dataset.json"
# SD-VAE's standard deviations go down to exp(-15) = 3e-7, below float16's smallest normal number (6e-5). Stored times
# 2**10 they keep all 11 bits between 6e-8 and 64. The writer measures the error and puts it in the manifest.
MOMENTS_STD_SCALE = 1024.0
_SHUFFLE = 2  # philox purpose of the data order


class Batch(NamedTuple):
    """N records. moments: (N, 2C, h, w) float16 as stored, for `decode_moments`. label: (N,) int64. index: (N,) int64,
    record numbers. Either pixels: (N, H, W, 3) uint8, or class_token and patch_tokens: one (N, D_k) and one (N, T, D_k)
    float16 tensor for each cached encoder; what the dataset (or the reader's `fields`) lacks is None or empty."""

    moments: Tensor
    label: Tensor
    index: Tensor
    pixels: Tensor | None
    class_token: tuple[Tensor, ...]
    patch_tokens: tuple[Tensor, ...]


@dataclass(frozen=True)
class EncoderInfo:
    """name: what `--enc-type` takes. dim: token width. grid: patch tokens form a grid x grid square."""

    name: str
    dim: int
    grid: int


@dataclass
class Manifest:
    """What `dataset.json` holds. shards: one {"count": n, "files": {field: {"file", "sha256"}}} each, in record order."""

    count: int
    shard_size: int  # records in every shard but the last
    resolution: int  # pixels, H = W
    fields: dict[str, dict[str, Any]]  # name => {"dtype": "float16", "shape": [8, 32, 32]}
    classes: list[str]  # class names; a label is an index into them
    vae: dict[str, Any]  # {"name", "normalization": {...}, "factor"}
    encoders: list[EncoderInfo]
    shards: list[dict[str, Any]]
    moments: dict[str, Any] = field(default_factory=lambda: {"kind": "mean_std", "std_scale": MOMENTS_STD_SCALE})
    crop: str = "adm_center"
    source: dict[str, Any] = field(default_factory=dict)  # provenance and counts, for people
    class_means: str | None = None  # `.npy` (classes, D) float32: mean class token of each class, encoder 0
    schema: int = SCHEMA


def encode_moments(moments: np.ndarray) -> np.ndarray:
    """(N, 2C, h, w) float32 mean and std => the stored float16 form.

    Raises ValueError where a value does not fit float16 (|mean| or 1024 std beyond 65504) or is not finite.
    """
    scaled = moments.astype(np.float32, copy=True)
    scaled[:, scaled.shape[1] // 2 :] *= MOMENTS_STD_SCALE
    bad = ~(np.abs(scaled) <= np.finfo(np.float16).max)
    if bad.any():
        record = int(np.argwhere(bad)[0, 0])
        raise ValueError(f"the VAE moments of record {record} of this batch do not fit float16 or are not finite")
    return scaled.astype(np.float16)


def decode_moments(moments: Tensor) -> Tensor:
    """Stored moments (N, 2C, h, w) float16 => float32 mean and std, on whichever device they are."""
    mean, std = moments.float().chunk(2, dim=1)
    return torch.cat([mean, std / MOMENTS_STD_SCALE], dim=1)


# ---------------------------------------------------------------------------------------------------------- writing


def write_shard(directory: Path, number: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write shard `number` so that it is either whole or absent; returns its manifest entry.

    arrays: field => (n, ...) array. Each file appears by rename after fsync; the entry is kept beside them as
    `shard-00000.json`, written last, so that an interrupted packing knows what is done.
    """
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1:
        raise ValueError(f"the fields of a shard must have equally many records, got {counts}")
    entry: dict[str, Any] = {"count": counts.pop(), "files": {}}
    for name, array in arrays.items():
        file = directory / f"{name}-{number:05d}.npy"
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        entry["files"][name] = {"file": file.name, "sha256": sha256(temporary)}
        temporary.rename(file)
    write_json(directory / f"shard-{number:05d}.json", entry)
    return entry


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `dataset.json`, which makes the directory a dataset."""
    write_json(directory / MANIFEST, asdict(manifest))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------- reading


def read_manifest(directory: Path) -> Manifest:
    """Read `dataset.json`. Raises FileNotFoundError or ValueError, in one sentence with the mend."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise FileNotFoundError(f"dataset folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a packed dataset: no {MANIFEST} (packing unfinished? run it again)")
    try:
        content = json.loads(path.read_text())
        if content.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}: pack the data again")
        content["encoders"] = [EncoderInfo(**encoder) for encoder in content["encoders"]]
        return Manifest(**content)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); pack the data again") from error


class PackedDataset(Dataset):
    """Random access to a packed dataset, a whole batch at a time: `dataset[indices]` => Batch.

    Use with DataLoader(dataset, sampler=StepSampler(...), batch_size=None). Files are mapped on first use, in the process
    that uses them; a worker holds no copy of the manifest's records.
    """

    def __init__(self, directory: Path | str, fields: Sequence[str] | None = None) -> None:
        """fields: which ones to read (default: all). Raises FileNotFoundError or ValueError naming the file at fault."""
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.fields = tuple(fields if fields is not None else self.manifest.fields)
        missing = [name for name in self.fields if name not in self.manifest.fields]
        if missing:
            raise ValueError(
                f"{self.directory} has no field {missing[0]!r}, only {', '.join(self.manifest.fields)}; pack it again"
            )
        self._ends = np.cumsum([shard["count"] for shard in self.manifest.shards])
        if len(self._ends) == 0 or self._ends[-1] != self.manifest.count:
            raise ValueError(f"{self.directory / MANIFEST}: the shards do not add up to count {self.manifest.count}")
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        for number in range(len(self.manifest.shards)):
            for name in self.fields:
                self._check_size(number, name)

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Gather records. indices: (N,) integers in [0, count)."""
        indices = np.asarray(indices, dtype=np.int64)
        get = {name: torch.from_numpy(self._gather(name, indices)) for name in self.fields}
        encoders = range(len(self.manifest.encoders))
        return Batch(
            moments=get["moments"],
            label=get["label"],
            index=torch.from_numpy(indices),
            pixels=get.get("pixels"),
            class_token=tuple(get[f"class_token.{k}"] for k in encoders if f"class_token.{k}" in get),
            patch_tokens=tuple(get[f"patch_tokens.{k}"] for k in encoders if f"patch_tokens.{k}" in get),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a spawned worker maps the files itself

    def labels(self) -> np.ndarray:
        """(count,) int64 labels of all records."""
        return np.concatenate([self.map(number, "label") for number in range(len(self.manifest.shards))])

    def map(self, number: int, name: str) -> np.ndarray:
        """The read-only memory map of one field of one shard."""
        if (number, name) not in self._maps:
            path = self.directory / self.manifest.shards[number]["files"][name]["file"]
            self._maps[number, name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._maps[number, name]

    def _gather(self, name: str, indices: np.ndarray) -> np.ndarray:
        spec = self.manifest.fields[name]
        out = np.empty((len(indices), *spec["shape"]), dtype=spec["dtype"])
        shards = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shards):
            rows = np.flatnonzero(shards == number)
            start = self._ends[number] - self.manifest.shards[number]["count"]
            out[rows] = self.map(number, name)[indices[rows] - start]
        return out

    def _check_size(self, number: int, name: str) -> None:
        """A shard file must exist and be exactly as long as its header and records: catches truncation at start-up."""
        shard, spec = self.manifest.shards[number], self.manifest.fields[name]
        path = self.directory / shard["files"][name]["file"]
        if not path.is_file():
            raise FileNotFoundError(f"shard file {path} is missing; pack the data again (finished shards are kept)")
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"shard file {path} is truncated or damaged ({error}); pack the data again") from error
        expected = (shard["count"], *spec["shape"])
        if mapped.shape != expected or mapped.dtype != np.dtype(spec["dtype"]):
            raise ValueError(
                f"shard file {path} holds {mapped.dtype} {mapped.shape}, {MANIFEST} says {spec['dtype']} {expected}"
            )


# ------------------------------------------------------------------------------------------------------------ order


class StepSampler(Sampler):
    """The order of training, a function of (seed, epoch, position): yields the record numbers of one micro-batch after
    another, for one process, for ever.

    Step s consumes positions [s B, (s + 1) B) of the endless row of epochs, each a shuffle of all records; B is the global
    batch. A process takes contiguous positions of it, micro-batch after micro-batch, so the row is the same for any
    number of processes and micro-batches, and resuming needs the step alone.
    """

    def __init__(
        self, count: int, global_batch: int, *, seed: int, rank: int = 0, world: int = 1, micro: int = 1, start_step: int = 0
    ) -> None:
        """micro: micro-batches a step. Raises ValueError if the batch does not divide evenly."""
        if count < 1:
            raise ValueError("the dataset is empty")
        if global_batch < 1 or global_batch % (world * micro):
            raise ValueError(
                f"batch size {global_batch} must be divisible by {world} processes x {micro} accumulation steps"
            )
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.rank, self.micro, self.start_step = rank, micro, start_step
        self.local = global_batch // (world * micro)
        self._epoch: tuple[int, np.ndarray] | None = None

    def positions(self, micro_step: int) -> np.ndarray:
        """(local,) int64 positions within the global batch of this process's micro-batch: the index of its draws."""
        start = (self.rank * self.micro + micro_step) * self.local
        return np.arange(start, start + self.local, dtype=np.int64)

    def indices(self, step: int, micro_step: int) -> np.ndarray:
        """(local,) int64 record numbers of this process's micro-batch."""
        row = step * self.global_batch + self.positions(micro_step)
        epochs = row // self.count
        out = np.empty_like(row)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._permutation(int(epoch))[row[chosen] % self.count]
        return out

    def _permutation(self, epoch: int) -> np.ndarray:
        """Shuffle by sorting random 64-bit keys: stable across library versions, unlike their shuffles."""
        if self._epoch is None or self._epoch[0] != epoch:
            keys = philox.uniform(self.seed, _SHUFFLE, epoch, torch.arange(self.count), 2)
            self._epoch = (epoch, torch.argsort(keys[:, 0] + keys[:, 1] * 2.0**-32, stable=True).numpy())
        return self._epoch[1]

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.start_step
        while True:
            for micro_step in range(self.micro):
                yield self.indices(step, micro_step)
            step += 1
