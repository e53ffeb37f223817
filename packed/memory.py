"""Records of shard files, read into memory that is used again."""

import os
import weakref

import numpy as np

_KEPT = 8  # buffers of one shape that wait to be used again


def read_record(path: str, offset: int, out: np.ndarray) -> None:
    """Fill `out`, which is contiguous, with the bytes of a file from `offset` on.

    By pread and not by a memory map: as fast where the file is in the page cache, one large read where it is not, and
    neither page tables nor descriptors add up over thousands of files.

    Raises:
        EOFError: the file ends before.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.preadv(descriptor, [out.data], offset) != out.nbytes:
            raise EOFError(path)
    finally:
        os.close(descriptor)


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
