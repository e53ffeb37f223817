"""Records of shard files, read into memory that is used again."""

import os
import weakref
from collections.abc import Sequence

import numpy as np

_AT_ONCE = 32  # records asked for before they are read: few enough for the limit of open files
_KEPT = 8  # buffers of one shape that wait to be used again


def read_records(places: Sequence[tuple[str, int]], out: np.ndarray) -> None:
    """Fill the rows of a contiguous array with bytes of files.

    By pread: it takes about twice the CPU time of a copy from a memory map, but neither page tables nor descriptors add up
    over thousands of files. The kernel is first asked for several records, which it then reads from a disk side by side.

    Args:
        places: (path, offset) of each row.
        out: (len(places), ...).

    Raises:
        EOFError: a file ends before its record does.
    """
    size = out[:1].nbytes
    for start in range(0, len(places), _AT_ONCE):
        group = places[start : start + _AT_ONCE]
        descriptors: list[int] = []
        try:
            for path, offset in group:
                descriptors.append(os.open(path, os.O_RDONLY))
                os.posix_fadvise(descriptors[-1], offset, size, os.POSIX_FADV_WILLNEED)
            for row, (descriptor, (path, offset)) in enumerate(zip(descriptors, group), start):
                if os.preadv(descriptor, [out[row : row + 1].data], offset) != size:
                    raise EOFError(path)
        finally:
            for descriptor in descriptors:
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
