"""Two methods over training seeds: paired differences, bootstrap intervals, and a refusal to rank what lies in the spread.

Retraining moves a metric more than resampling does (arXiv 2606.20536), so that one run of each method ranks nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

INTERVAL_FROM = 5  # values; of fewer the values themselves are shown
LEAST = 3  # values of each side: fewer rank nothing
DRAWS = 10_000  # of the bootstrap


class Mean(NamedTuple):
    """Mean of n values, and its 95 % bootstrap interval where there are at least INTERVAL_FROM values."""

    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None

    def text(self, digits: int) -> str:
        """The mean and its interval, or else the values."""
        if self.interval is None:
            return ", ".join(f"{value:.{digits}f}" for value in self.values)
        return f"{self.mean:.{digits}f} [{self.interval[0]:.{digits}f}, {self.interval[1]:.{digits}f}]"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean over seeds with its percentile bootstrap interval (Efron 1979), from a fixed seed.

    Args:
        values: one for each training seed, at least one.
    """
    array = np.asarray(values, dtype=np.float64)
    interval = None
    if len(array) >= INTERVAL_FROM:
        rows = np.random.default_rng(0).integers(0, len(array), (DRAWS, len(array)))
        low, high = np.percentile(array[rows].mean(1), (2.5, 97.5))
        interval = (float(low), float(high))
    return Mean(tuple(map(float, array)), float(array.mean()), interval)


def sign(a: Sequence[float], b: Sequence[float]) -> int:
    """Whether a method's values `a` are surely below (-1) or above (1) the values `b` of another one; 0: not known.

    With at least INTERVAL_FROM pairs the interval of the mean paired difference must leave 0 out. With fewer, but at least
    LEAST, all values of one side must lie below all of the other's.

    Args:
        a: of the one method, in the order of its seeds.
        b: of the other method, for the same seeds.

    Raises:
        ValueError: the numbers of seeds differ.
    """
    difference = mean_of([x - y for x, y in zip(a, b, strict=True)])
    if difference.interval is not None:
        low, high = difference.interval
        return 1 if low > 0 else -1 if high < 0 else 0
    if len(a) < LEAST:
        return 0
    return 1 if min(a) > max(b) else -1 if max(a) < min(b) else 0
