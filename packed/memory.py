"""Records of shard files: mapped into memory, copied out into memory that is used again."""

import ctypes
import math
import os
import time
import weakref
from pathlib import Path

import numpy as np
import torch

from config import UserError
from packed.format import Field

_PAGE = os.sysconf("SC_PAGE_SIZE")
_WILLNEED = 3  # of madvise
_KEPT = 8  # buffers of one shape that wait to be used again
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_file(path: Path, field: Field, count: int) -> np.ndarray | None:
    """The records of a shard file, (count, *field.shape), mapped read-only; None if its header says otherwise.

    By torch: numpy and mmap keep a descriptor open for each file, and a dataset may have thousands. But torch's maps are
    private and writable, which some file systems lack, and a kernel that never overcommits memory.

    Raises:
        UserError: files cannot be mapped there at all.
    """
    header = field.header(count)
    try:
        content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    except RuntimeError:
        try:
            content = np.memmap(path, np.uint8, "r").view(np.ndarray)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{path} cannot be mapped into memory ({reason}): copy the dataset to another disk"
            ) from error
    if content[: len(header)].tobytes() != header:
        return None
    records = content[len(header) :].view(field.dtype).reshape(count, *field.shape)
    records.flags.writeable = False
    return records


def copy_records(out: np.ndarray, records: list[np.ndarray]) -> None:
    """Copy records, (1, ...) views of maps, to the rows of `out`, each once and straight from its map.

    As soon as one copy is slow, because the record is not in the page cache, the kernel is asked for all that follow: it
    then reads them side by side and whole instead of page by page. (Asking always would cost a quarter of the speed.)
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
    """Memory for batches, used again once no batch refers to it: fresh pages cost as much as the copy into them."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of arbitrary content; when it and all tensors that share its memory are gone, the memory is free."""
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()
        except IndexError:  # other threads take from the list too, so its length says nothing
            memory = np.empty(shape, dtype)
        lent = memory[:]
        weakref.finalize(lent, _give_back, free, memory).atexit = False
        return lent


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _KEPT:
        free.append(memory)
