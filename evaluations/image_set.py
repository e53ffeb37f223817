"""A set of images of one size: what every metric reads."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from evaluations.statistics import Statistics

Take = Callable[[Sequence[int]], np.ndarray]  # ascending numbers of images => (B, H, W, 3) uint8


@dataclass(frozen=True)
class ImageSet:
    """N images of one size.

    `take(numbers)` gives uint8 (B, H, W, 3), for ascending numbers; `digest()` the SHA-256 of the content; `labels` (N,)
    int64 or None; `statistics` what the file itself records of a larger set (ADM's mu, sigma: "pooled"; mu_s, sigma_s:
    "spatial"); `sidecar` how the images were made, from the JSON beside them; `grouped`: images of a class lie together, as
    in folders, so a part of the set is taken evenly from it all and not from its beginning; `sizes` (N, 2) height and width
    in the file, where some images are cropped as they are read.
    """

    name: str
    shape: tuple[int, int, int, int]
    take: Take
    digest: Callable[[], str]
    labels: np.ndarray | None = None
    statistics: dict[str, Statistics] | None = None
    sidecar: dict | None = None
    grouped: bool = False
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def cropped(self) -> int:
        """How many of the images are cropped."""
        return 0 if self.sizes is None else int((self.sizes != self.shape[1:3]).any(1).sum())

    @property
    def enlarged(self) -> int:
        """How many of the images are enlarged to be cropped."""
        return 0 if self.sizes is None else int((self.sizes.min(1) < self.shape[1]).sum())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images from number `start` to before `stop`, (stop - start, H, W, 3) uint8."""
        return self.take(range(start, stop))

    def first(self, count: int) -> "ImageSet":
        """The set of the first `count` images; itself if it has no more."""
        return self if count >= len(self) else self._rows(np.arange(count), f"first {count}")

    def part(self, count: int) -> "ImageSet":
        """`count` of the images: the first ones, or evenly spaced ones where the images of a class lie together."""
        if count >= len(self) or not self.grouped:
            return self.first(count)
        return self._rows(np.arange(count) * len(self) // count, f"{count} of {len(self)}, evenly")

    def _rows(self, rows: np.ndarray, words: str) -> "ImageSet":
        return replace(
            self,
            name=f"{self.name} ({words})",
            shape=(len(rows), *self.shape[1:]),
            take=lambda numbers: self.take(rows[list(numbers)].tolist()),
            digest=lambda: sha(self.digest(), words),
            labels=None if self.labels is None else self.labels[rows],
            statistics=None,
            sizes=None if self.sizes is None else self.sizes[rows],
        )

    def pick(self, indices: Iterable[int]) -> np.ndarray:
        """Single images, uint8 (len(indices), H, W, 3), in the order of the indices."""
        numbers, places = np.unique([int(index) for index in indices], return_inverse=True)
        return self.take(numbers.tolist())[places]


def joined(parts: Sequence[tuple[int, Take]]) -> Take:
    """Read from several sets as from one. parts: number of images and reader of each."""
    ends = np.cumsum([count for count, _ in parts])

    def take(numbers: Sequence[int]) -> np.ndarray:
        wanted, pieces = np.asarray(numbers), []
        for (count, take_part), end in zip(parts, ends):
            here = wanted[(wanted >= end - count) & (wanted < end)]
            if len(here):
                pieces.append(take_part((here - (end - count)).tolist()))
        return np.concatenate(pieces)

    return take


def by_runs(rows: Callable[[int, int], np.ndarray]) -> Take:
    """Read consecutive images at once. rows: reads the images from number `start` to before `stop`."""

    def take(numbers: Sequence[int]) -> np.ndarray:
        cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
        pieces = [rows(numbers[a], numbers[b - 1] + 1) for a, b in pairwise([0, *cuts, len(numbers)])]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return take


def by_class(labels: np.ndarray | None) -> bool:
    """Whether images of a class lie together, in the order of their labels: (N,) int64."""
    steps = np.zeros(0) if labels is None else np.diff(labels)
    return bool((steps > 0).any() and (steps == 0).any() and (steps >= 0).all())


def sha(*parts: str) -> str:
    """Hex SHA-256 of lines of text, among them names of files, which may hold bytes that are not UTF-8."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
