"""Features of images and what the metrics need of them: sums, kept rows, predictions; over any number of ranks.

Rank r of w takes the r-th of w equal stretches of a set; sums are reduced in float64, kept rows are gathered on rank 0.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import reporting
from common.processes import gather_rows, rank, world
from config import UserError
from evaluations.audit import Auditor
from evaluations.features import Extractor, Features
from evaluations.image_sets import ImageSet
from evaluations.metrics import Estimate, InceptionScore, frechet_distance
from evaluations.statistics import Moments, Statistics, compute_moments, jackknife_error, jackknife_groups, without


class Collected(NamedTuple):
    """What one extractor gives for one set; on ranks other than 0 only the sums are whole.

    `moments`: per feature kind ("pooled", "spatial") the jackknife groups; pooled features have one, since they are kept.
    `pooled`: `keep` rows (K, D) float32, the first ones or, of a grouped set, evenly spaced ones. `predictions`: (N,)
    most likely class of each image, where there are logits.
    """

    moments: dict[str, list[Moments]]
    pooled: Tensor
    score: InceptionScore | None
    predictions: Tensor | None

    def whole(self, kind: str) -> Moments:
        """All groups together."""
        total = Moments(len(self.moments[kind][0].mean), self.moments[kind][0].mean.device)
        for group in self.moments[kind]:
            total.merge(group)
        return total

    def statistics(self, kind: str) -> Statistics:
        """Mean and covariance of one kind of features."""
        return self.whole(kind).statistics()

    def frechet(self, reference: Statistics, kind: str, groups: int) -> Estimate:
        """Frechet distance to `reference`, with its jackknife error over groups of samples.

        There is no error for 0 groups, and for fewer than 4 samples per group. Pooled features must have been kept all.
        """
        whole = self.whole(kind)
        value = frechet_distance(reference, whole.statistics())
        if groups == 0 or whole.n < 4 * groups:
            return Estimate(value, None)
        parts = self.moments[kind]
        if kind == "pooled":
            number = jackknife_groups(torch.arange(len(self.pooled)), groups)
            parts = [compute_moments(self.pooled[number == group].to(whole.mean.device)) for group in range(groups)]
        return Estimate(value, jackknife_error([frechet_distance(reference, without(whole, part)) for part in parts]))


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
    """Run `extractor` over `images` once.

    Args:
        images: the whole set; this rank reads its stretch.
        extractor: a network of evaluations/features.py.
        batch_size: images per batch.
        groups: jackknife groups of spatial features.
        keep: rows of pooled features to return; None: all.
        split: images per chunk of the Inception Score.
        auditor: sees every image.
        progress: description of the progress bar; None: no bar.
    """
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
        for kind, count in (("pooled", 1), ("spatial", groups)):
            values = getattr(features, kind)
            if values is None:
                continue
            if kind not in moments:
                moments[kind] = [Moments(values.shape[1], values.device) for _ in range(count)]
            number = jackknife_groups(rows, count)
            for group, sums in enumerate(moments[kind]):
                sums.update(values[number == group])
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
    if world() > 1:
        for kind in sorted(moments):
            for sums in moments[kind]:
                sums.all_reduce()
        if score is not None:
            score.all_reduce()
    classes = gather_rows(torch.cat(predictions)) if predictions else None
    return Collected(moments, gather_rows(pooled), score, classes)


def statistics_of(batches: Iterable[Tensor], extractor: Callable[[Tensor], Features]) -> Statistics:
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
        raise UserError(f"there are fewer images than the {world()} ranks that share them")
    if world() > 1:
        moments.all_reduce()
    return moments.statistics()


def kept_rows(images: ImageSet, keep: int | None, rows: Tensor) -> Tensor:
    """Which of `rows` (indices of images) belong to the part of `keep` images that neighbour metrics use: (B,) bool."""
    if keep is None or keep >= len(images):
        return torch.ones_like(rows, dtype=torch.bool)
    if not images.grouped:
        return rows < keep
    return (rows + 1) * keep // len(images) > rows * keep // len(images)


def _batches(images: ImageSet, size: int, progress: str | None) -> Iterator[tuple[int, np.ndarray]]:
    """The images of this rank: (index of the first, uint8 (B, H, W, 3))."""
    start, stop = _stretch(images)
    shown = progress is not None and rank() == 0
    with reporting.progress(stop - start, unit="image", description=progress, shown=shown) as bar:
        for first in range(start, stop, size):
            pixels = np.array(images.read(first, min(first + size, stop)))  # torch wants memory it may write
            yield first, pixels
            bar.update(len(pixels))


def _stretch(images: ImageSet) -> tuple[int, int]:
    """First and last + 1 of the images of this rank."""
    start, stop = len(images) * rank() // world(), len(images) * (rank() + 1) // world()
    if start == stop:
        raise UserError(f"{images.name} has {len(images)} images, too few for {world()} ranks")
    return start, stop
