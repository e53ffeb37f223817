"""The packed dataset: its fields, its reader, and the order in which training reads it.

A folder of `.npy` files of fixed-size records and a manifest, `dataset.json`, written last (packed/format.py). Record i of
shard k is row i of each of its files. Fields:

    moments        (2C, h, w) float16   mean and scaled standard deviation of the VAE posterior (see MOMENTS_STD_SCALE)
    label          ()         int64
    pixels         (H, W, 3)  uint8     the crop; only if the encoder is to run in the training step
    class_token.K  (D_K,)     float16   of encoder K = 0, 1, ...; only if the tokens are cached
    patch_tokens.K (T, D_K)   float16   likewise
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common.files import sha256
from config import UserError
from models import philox
from models.noise import Stream
from packed import checks
from packed.format import CRC, MANIFEST, MOMENTS_STD_SCALE, REPAIR, Field, read_manifest
from packed.memory import Buffers, copy_records, map_file

_UNMAP = 16 * 2**30  # bytes read after which files are mapped anew: page tables of a whole epoch would take 1 GB


class Batch(NamedTuple):
    """N records; what the dataset (or the reader's `fields`) lacks is None or empty.

    moments: (N, 2C, h, w) float16 as stored, for `decode_moments`. label: (N,) int64. index: (N,) int64, record numbers.
    pixels: (N, H, W, 3) uint8. class_token, patch_tokens: one (N, D_k) and one (N, T, D_k) float16 tensor for each cached
    encoder.
    """

    moments: Tensor
    label: Tensor
    index: Tensor
    pixels: Tensor | None
    class_token: tuple[Tensor, ...]
    patch_tokens: tuple[Tensor, ...]


def encode_moments(moments: np.ndarray) -> np.ndarray:
    """(N, 2C, h, w) float32 mean and standard deviation => the stored float16 form.

    Raises:
        UserError: a value does not fit float16 (|mean| or 1024 std beyond 65504) or is not finite.
    """
    scaled = moments.astype(np.float32, copy=True)
    scaled[:, scaled.shape[1] // 2 :] *= MOMENTS_STD_SCALE
    bad = ~(np.abs(scaled) <= np.finfo(np.float16).max)
    if bad.any():
        record = int(np.argwhere(bad)[0, 0])
        raise UserError(f"the VAE moments of record {record} of this batch do not fit float16 or are not finite")
    return scaled.astype(np.float16)


def decode_moments(moments: Tensor) -> Tensor:
    """Stored moments (N, 2C, h, w) float16 => float32 mean and std, on whichever device they are."""
    mean, std = moments.float().chunk(2, dim=1)
    return torch.cat([mean, std / MOMENTS_STD_SCALE], dim=1)


class PackedDataset(Dataset):
    """Random access to a packed dataset, a whole batch at a time: `dataset[indices]` => Batch.

    Read it by `read_ahead`, or by DataLoader(dataset, sampler=StepSampler(...), batch_size=None). What a process holds
    grows with the number of shards, never with that of records.
    """

    def __init__(self, directory: Path | str, fields: Sequence[str] | None = None) -> None:
        """Read the manifest and check that all files are there, at their full size, and each label is a class.

        Args:
            directory: of the dataset.
            fields: which ones to read; None: all.

        Raises:
            UserError: names the file that is missing or damaged, or the record whose label is not a class.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.fields = tuple(fields if fields is not None else self.manifest.fields)
        missing = [name for name in self.fields if name not in self.manifest.fields]
        if missing:
            raise UserError(
                f"{self.directory} has no field {missing[0]!r}, only {', '.join(self.manifest.fields)}; pack it again"
            )
        counts = np.array([shard["count"] for shard in self.manifest.shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        if len(self._ends) == 0 or self._ends[-1] != self.manifest.count:
            raise UserError(f"{self.directory / MANIFEST}: the shards do not add up to count {self.manifest.count}")
        self._specs = {name: Field.of(spec) for name, spec in self.manifest.fields.items()}
        self._specs[CRC] = checks.crc_field(self.manifest)
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._mapped_bytes = 0
        self._buffers = Buffers()
        checks.check_sizes(self.directory, self.manifest, self.fields)
        if "label" in self.fields:
            self.labels()
        self._checks = checks.RecordChecks(self.directory, self.manifest, self.fields)

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Gather records at `indices`, (N,) integers in [0, count).

        Raises:
            IndexError: one is outside of it.
            UserError: a record is not what was written. Each is compared with its CRC-32 when it is read for the first time.
        """
        return self.read(indices)

    def read(self, indices: Sequence[int] | np.ndarray, *, pin_memory: bool = False) -> Batch:
        """`self[indices]`; with pin_memory directly into pinned memory, for asynchronous copies to a GPU."""
        if self._mapped_bytes > _UNMAP:
            self._maps, self._mapped_bytes = {}, 0
        indices = np.asarray(indices, dtype=np.int64)
        records = indices.tolist()
        if records and not 0 <= min(records) <= max(records) < len(self):
            raise IndexError(f"record {min(records)} or {max(records)} is not in [0, {len(self)})")
        shards = np.searchsorted(self._ends, indices, side="right")
        places = list(zip(shards.tolist(), (indices - self._starts[shards]).tolist()))
        get = {name: self._gather(name, places, pin_memory) for name in self.fields}
        self._checks.check(indices, places, get, lambda number: self.records(number, CRC))
        encoders = range(len(self.manifest.encoders))
        return Batch(
            moments=get.get("moments"),
            label=get.get("label"),
            index=torch.from_numpy(indices).pin_memory() if pin_memory else torch.from_numpy(indices),
            pixels=get.get("pixels"),
            class_token=tuple(get[f"class_token.{k}"] for k in encoders if f"class_token.{k}" in get),
            patch_tokens=tuple(get[f"patch_tokens.{k}"] for k in encoders if f"patch_tokens.{k}" in get),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_buffers": Buffers()}  # a spawned worker maps the files itself

    def labels(self) -> np.ndarray:
        """(count,) int64 labels of all records. Raises UserError if one is not a class, or not what was written."""
        return checks.read_labels(self.directory, self.manifest)

    def records(self, number: int, name: str) -> np.ndarray:
        """One field of one shard, (records, ...), mapped read-only; records are not compared with their checksums.

        Raises:
            UserError: the header is not that of the field, or the CRC-32 themselves do not match their checksum.
        """
        mapped = self._maps.get((number, name))
        if mapped is None:
            shard, field = self.manifest.shards[number], self._specs[name]
            path, count = self.directory / shard["files"][name]["file"], shard["count"]
            mapped = map_file(path, field, count)
            if mapped is None:
                raise UserError(
                    f"shard file {path} does not hold {count} records of {field.dtype} {field.shape}; {REPAIR}"
                )
            if name == CRC and sha256(path) != shard["files"][CRC]["sha256"]:
                raise UserError(f"shard file {path} does not match its checksum; {REPAIR}")
            self._maps[number, name] = mapped
        return mapped

    def _gather(self, name: str, places: list[tuple[int, int]], pin_memory: bool) -> Tensor:
        """One field of the records at `places`: (shard, row of it) each."""
        dtype, shape = self._specs[name]
        if pin_memory:  # torch keeps such memory itself, and knows when copies from it are done
            tensor = torch.empty((len(places), *shape), dtype=_torch_dtype(dtype), pin_memory=True)
            out = tensor.numpy()
        else:
            out = self._buffers.take((len(places), *shape), dtype)
            tensor = torch.from_numpy(out)
        self._mapped_bytes += out.nbytes
        maps = {number: self.records(number, name) for number in {number for number, _ in places}}
        copy_records(out, [maps[number][row : row + 1] for number, row in places])
        return tensor


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def read_ahead(
    dataset: PackedDataset,
    order: Iterable[np.ndarray],
    *,
    threads: int = 2,
    depth: int = 4,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Read batches by threads before they are needed, onto a device.

    Threads, not processes: copying and waiting for the disk release the interpreter lock, while a batch of another process
    is copied twice more. To a GPU they copy from pinned memory on a stream of their own, while the steps before compute.

    Args:
        dataset: to read.
        order: record numbers of each batch.
        threads: that read; 0: each batch is read when it is asked for.
        depth: batches ahead at most, on the device.
        device: of the batches.

    Returns:
        The batches, in the given order, for use on the stream that is current when they are taken.
    """
    device = torch.device(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(indices: np.ndarray) -> tuple[Batch, torch.cuda.Event | None]:
        batch = dataset.read(indices, pin_memory=stream is not None)
        if stream is None:
            return batch, None
        with torch.cuda.stream(stream):
            return each_tensor(batch, lambda x: x.to(device, non_blocking=True)), stream.record_event()

    if threads == 0:
        for indices in order:
            yield _arrived(*fetch(indices), device)
        return
    orders = iter(order)
    waiting: deque[Future[tuple[Batch, torch.cuda.Event | None] | None]] = deque()
    with ThreadPoolExecutor(1) as orderer, ThreadPoolExecutor(threads) as readers:

        def read(indices: Future[np.ndarray | None]) -> tuple[Batch, torch.cuda.Event | None] | None:
            found = indices.result()
            return None if found is None else fetch(found)

        try:
            while True:
                # the order of an epoch takes a second at ImageNet's size: not in this thread
                while len(waiting) < depth:
                    waiting.append(readers.submit(read, orderer.submit(next, orders, None)))
                fetched = waiting.popleft().result()
                if fetched is None:
                    return
                yield _arrived(*fetched, device)
        finally:
            for future in waiting:
                future.cancel()


def _arrived(batch: Batch, copied: torch.cuda.Event | None, device: torch.device) -> Batch:
    """The batch, for the current stream, which waits for the copy; the host does not."""
    if copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        each_tensor(
            batch, lambda x: x.record_stream(current)
        )  # not used again for a copy before this stream is done with it
    return batch


def each_tensor(batch: Batch, change: Callable[[Tensor], Any]) -> Batch:
    """`change` of each tensor of a batch."""

    def one(x: Any) -> Any:
        return tuple(map(one, x)) if isinstance(x, tuple) else None if x is None else change(x)

    return Batch(*map(one, batch))


class StepSampler(Sampler):
    """The order of training, a function of (seed, epoch, position): endless, one micro-batch of one rank at a time.

    Step s consumes positions [s B, (s + 1) B) of the concatenated epochs, each a shuffle of all records; B is the global
    batch. A rank takes contiguous positions of it, micro-batch after micro-batch, so the order is the same for any number
    of ranks and micro-batches, and resuming needs the step alone.
    """

    def __init__(
        self,
        count: int,
        global_batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 1,
        start_step: int = 0,
    ) -> None:
        """Divide the global batch.

        Args:
            count: records of the dataset.
            global_batch: records per step, over all ranks.
            seed: of the shuffles.
            rank, world: of this process, and the number of processes.
            micro: micro-batches per step and rank.
            start_step: where iteration begins.

        Raises:
            UserError: the dataset is empty, or the batch cannot be divided evenly.
        """
        if count < 1:
            raise UserError("the dataset is empty")
        if global_batch < 1 or global_batch % (world * micro):
            raise UserError(
                f"batch size {global_batch} must be divisible by {world} processes x {micro} accumulation steps"
            )
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.rank, self.micro, self.start_step = rank, micro, start_step
        self.local = global_batch // (world * micro)
        self._epoch: tuple[int, np.ndarray] | None = None

    def positions(self, micro_step: int) -> np.ndarray:
        """(local,) int64 positions within the global batch of this rank's micro-batch: the index of its draws."""
        start = (self.rank * self.micro + micro_step) * self.local
        return np.arange(start, start + self.local, dtype=np.int64)

    def indices(self, step: int, micro_step: int) -> np.ndarray:
        """(local,) int64 record numbers of this rank's micro-batch."""
        start = step * self.global_batch + (self.rank * self.micro + micro_step) * self.local
        parts, stop = [], start + self.local
        while start < stop:
            epoch, offset = divmod(start, self.count)
            parts.append(self._permutation(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        """Shuffle by sorting random 64-bit keys: stable across library versions, unlike their shuffles."""
        if self._epoch is None or self._epoch[0] != epoch:
            keys = philox.uniform(self.seed, Stream.DATA_ORDER, epoch, torch.arange(self.count), 2)
            self._epoch = (epoch, torch.argsort(keys[:, 0] + keys[:, 1] * 2.0**-32, stable=True).numpy())
        return self._epoch[1]

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.start_step
        while True:
            for micro_step in range(self.micro):
                yield self.indices(step, micro_step)
            step += 1
