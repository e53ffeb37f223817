"""The division of a sampling job into batches."""

from collections.abc import Sequence


def batches(done: Sequence[range], count: int, size: int, *, aligned: bool = False) -> list[range]:
    """Cut the samples of range(count) that are in no range of `done` into ranges of at most `size`, in order.

    aligned: every range ends at a multiple of `size` or where the next finished one starts, so that a sample always shares
    its batch with the same others.
    """
    found, edge = [], 0
    for finished in [*sorted(done, key=lambda r: r.start), range(count, count)]:
        while edge < min(finished.start, count):
            stop = min((edge // size + 1) * size if aligned else edge + size, finished.start, count)
            found.append(range(edge, stop))
            edge = stop
        edge = max(edge, finished.stop)
    return found
