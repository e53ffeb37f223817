"""Records in memory-mapped files, copied out as fast as memory goes."""

import ctypes
import math
import os
import time
import weakref
from pathlib import Path

import numpy as np
import torch

from shards import npy_header

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LINE = 64  # bytes of a cache line
_WILLNEED = 3  # of madvise
_KEPT = 8  # buffers of one shape that wait to be used again
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_file(path: Path, dtype: np.dtype, shape: tuple[int, ...], count: int) -> np.ndarray | None:
    """The records of a shard file, (count, *shape), read-only; None if its header says otherwise.

    By torch: numpy and mmap keep a descriptor open for each file, and a dataset may have thousands.
    """
    header = npy_header(dtype, shape, count)
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    if content[: len(header)].tobytes() != header:
        return None
    records = content[len(header) :].view(dtype).reshape(count, *shape)
    records.flags.writeable = False
    return records


def copy_records(out: np.ndarray, records: list[np.ndarray]) -> None:
    """Copy records, (1, ...) views of maps, to the rows of out, each once and straight from its map.

    As soon as one is slow, because it is not in memory, the kernel is told of all that follow: it then reads them side by
    side and whole, 20 times as fast as page by page when they are touched. (Telling it always costs a quarter.)
    """
    if out.nbytes < _PAGE * len(records):
        np.concatenate(records, out=out)
        return
    slow = 30e-6 + out[0].nbytes / 200e6  # seconds
    before = time.perf_counter()
    for number, record in enumerate(records):
        out[number] = record
        now = time.perf_counter()
        if now - before > slow:
            _will_need(records[number + 1 :])
            slow = math.inf
        before = now


def _will_need(records: list[np.ndarray]) -> None:
    for record in records:
        begin = record.ctypes.data
        aligned = begin - begin % _PAGE
        _madvise(aligned, begin - aligned + record.nbytes, _WILLNEED)


class Buffers:
    """Memory for batches, used again once nobody holds the batch: fresh pages cost as much as the copy into them."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of arbitrary content; when it and all tensors that share its memory are gone, the memory is free."""
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()
        except IndexError:  # asked for forgiveness, as other threads take from the list too
            memory = _aligned(shape, dtype)
        lent = memory[:]
        weakref.finalize(lent, _give_back, free, memory).atexit = False
        return lent


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts at a cache line: large copies into it are an eighth faster than where np.empty puts it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _KEPT:
        free.append(memory)
