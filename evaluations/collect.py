"""One pass over a set of images: features, their statistics and a check of the images, over any number of processes.

Process r of w takes the r-th of w equal stretches of the set; sums are reduced in float64, kept rows meet on rank 0.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common import reporting
from config import UserError
from evaluations.features import Extractor
from evaluations.images import ImageSet
from evaluations.metrics import InceptionScore
from evaluations.statistics import Moments, Statistics, jackknife_groups


class Collected(NamedTuple):
    """What one extractor gives for one set; on ranks other than 0 only the sums are whole.

    `moments`: per feature kind ("pooled", "spatial") the jackknife groups; pooled features have one, since they are kept.
    `pooled`: `keep` rows (K, D) float32, the first ones or, of a grouped set, evenly spaced ones. `predictions`: (N,)
    most likely class of each image, where there are logits.
    """

    moments: dict[str, list[Moments]]
    pooled: torch.Tensor
    score: InceptionScore | None
    predictions: torch.Tensor | None

    def whole(self, kind: str) -> Moments:
        """All groups together."""
        total = Moments(len(self.moments[kind][0].mean), self.moments[kind][0].mean.device)
        for group in self.moments[kind]:
            total.merge(group)
        return total

    def statistics(self, kind: str) -> Statistics:
        return self.whole(kind).statistics()


class Audit(NamedTuple):
    """Of a set: numbers of constant images and of copies of earlier ones, and the range of all pixel values."""

    constant: int
    duplicates: int
    lowest: int
    highest: int


class Auditor:
    """Looks at every image once as it passes."""

    def __init__(self) -> None:
        self.constant, self.lowest, self.highest = 0, 255, 0
        self._hashes: list[int] = []

    def update(self, images: np.ndarray) -> None:
        flat = images.reshape(len(images), -1)
        low, high = flat.min(1), flat.max(1)
        self.constant += int((low == high).sum())
        self.lowest, self.highest = min(self.lowest, int(low.min())), max(self.highest, int(high.max()))
        for image in flat:
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()
            self._hashes.append(int.from_bytes(digest, "little", signed=True))

    def result(self) -> Audit:
        """Of all processes; whole on rank 0."""
        hashes = gather_rows(torch.tensor(self._hashes, dtype=torch.int64))
        ends = torch.tensor([self.constant, -self.lowest, self.highest])
        if dist.is_initialized():
            dist.all_reduce(ends[:1])
            dist.all_reduce(ends[1:], op=dist.ReduceOp.MAX)
        return Audit(int(ends[0]), len(hashes) - len(hashes.unique()), -int(ends[1]), int(ends[2]))


def collect(
    images: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int,
    groups: int = 1,
    keep: int | None = None,
    split: int = 5000,
    auditor: Auditor | None = None,
    progress: str | None = None,
) -> Collected:
    """Run `extractor` over `images`. groups: of spatial features, by jackknife_groups. keep: rows of pooled
    features to return (None: all). split: chunk of the Inception Score."""
    moments: dict[str, list[Moments]] = {}
    start, stop = _stretch(images)
    wanted = kept_rows(images, keep, torch.arange(start, stop))
    pooled, filled = torch.zeros(0, 0), 0  # allocated once: a list and its concatenation would take twice the memory
    predictions, score = [], None
    for first, pixels in _batches(images, batch_size, progress):
        if auditor is not None:
            auditor.update(pixels)
        # NHWC -> NCHW as a view; contiguous on the device that computes
        features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        rows = torch.arange(first, first + len(pixels))
        for kind in ("pooled", "spatial"):
            values = getattr(features, kind)
            if values is None:
                continue
            if kind not in moments:
                count = groups if kind == "spatial" else 1
                moments[kind] = [Moments(values.shape[1], values.device) for _ in range(count)]
            for number, group in enumerate(moments[kind]):
                chosen = values[jackknife_groups(rows, len(moments[kind])) == number]
                if len(chosen):
                    group.update(chosen)
        if filled == 0:
            pooled = torch.empty(int(wanted.sum()), features.pooled.shape[1])
        chosen = features.pooled[wanted[rows - start]]
        pooled[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
        if features.logits is not None:
            if score is None:
                score = InceptionScore(len(images), features.logits.shape[1], split, features.logits.device)
            score.update(features.logits.double().log_softmax(1), first)
            predictions.append(features.logits.argmax(1).cpu())
    if dist.is_initialized():
        for group in (group for kind in sorted(moments) for group in moments[kind]):
            group.all_reduce()
        if score is not None:
            score.all_reduce()
    return Collected(
        moments,
        gather_rows(pooled),
        score,
        gather_rows(torch.cat(predictions)) if predictions else None,
    )


def statistics_of(batches: Iterable[torch.Tensor], extractor: Extractor) -> Statistics:
    """Statistics of the pooled features of images that are not an ImageSet, such as those of a sampler.

    Args:
        batches: the uint8 images of this rank, (B, 3, H, W) each.
        extractor: a network of evaluations/features.py.

    Returns:
        The statistics over all ranks, on every rank.

    Raises:
        UserError: this rank has no images, or all ranks together have fewer than 2.
    """
    moments = None
    for pixels in batches:
        pooled = extractor(pixels).pooled
        moments = moments or Moments(pooled.shape[1], pooled.device)
        moments.update(pooled)
    if moments is None:
        raise UserError("there are fewer images than ranks that share them")
    if dist.is_initialized():
        moments.all_reduce()
    return moments.statistics()


def kept_rows(images: ImageSet, keep: int | None, rows: torch.Tensor) -> torch.Tensor:
    """Which of `rows` (indices of images) belong to the part of `keep` images that neighbour metrics use: (B,) bool."""
    if keep is None or keep >= len(images):
        return torch.ones_like(rows, dtype=torch.bool)
    if not images.grouped:
        return rows < keep
    return (rows + 1) * keep // len(images) > rows * keep // len(images)


def _batches(images: ImageSet, size: int, progress: str | None) -> Iterator[tuple[int, np.ndarray]]:
    """This process's images: (index of the first, uint8 (B, H, W, 3))."""
    start, stop = _stretch(images)
    quiet = progress is None or (dist.is_initialized() and dist.get_rank() > 0)
    with reporting.progress(stop - start, unit="image", description=progress, shown=not quiet) as bar:
        for first in range(start, stop, size):
            pixels = np.array(images.read(first, min(first + size, stop)))  # torch wants memory it may write
            yield first, pixels
            bar.update(len(pixels))


def _stretch(images: ImageSet) -> tuple[int, int]:
    """First and last + 1 of this process's images."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, stop = len(images) * rank // world, len(images) * (rank + 1) // world
    if start == stop:
        raise UserError(f"{images.name} has {len(images)} images, too few for {world} processes")
    return start, stop


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (N_r, ...) on the CPU of every process, in order of rank, on rank 0; elsewhere the process's own."""
    if not dist.is_initialized():
        return rows
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    longest = max(int(count) for count in counts)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    pieces = [torch.zeros_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, pieces)
    if pieces is None:
        return rows
    return torch.cat([piece[: int(count)] for piece, count in zip(pieces, counts, strict=True)])
