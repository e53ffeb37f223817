"""Metrics recorded with the ADM evaluator: recorded activations through our statistics and metrics."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations.metrics import Estimate, InceptionScore, frechet_distance
from evaluations.neighbours import precision_recall
from evaluations.statistics import compute_statistics


class Line(NamedTuple):
    """max_rel: largest |ours - recorded| over the largest |recorded|; a value passes when it is at most `limit`."""

    name: str
    max_abs: float
    max_rel: float
    limit: float


def inception_score(log_probabilities: np.ndarray | torch.Tensor, split: int = 5000) -> Estimate:
    """Inception Score of log p (N, K) held in memory."""
    score = InceptionScore(*log_probabilities.shape, split)
    score.update(torch.as_tensor(log_probabilities).double(), 0)
    return score.estimate()


def check(path: Path) -> list[Line]:
    """Every metric that `path` records. Raises ValueError naming the file when it is not of the format."""
    with np.load(path, allow_pickle=False) as stream:
        recorded = dict(stream)
    lines = list(_lines(path, recorded))
    if not lines:
        raise ValueError(f"{path.name} records no metric that is known here (fid, sfid, inception_score_split_*, ...)")
    return lines


def _lines(path: Path, recorded: dict[str, np.ndarray]) -> Iterator[Line]:
    def need(name: str) -> np.ndarray:
        if name not in recorded:
            raise ValueError(f"{path.name} has no entry {name!r}")
        return recorded[name]

    def compare(name: str, ours: np.ndarray | float, limit: float, how: str = "") -> Line:
        theirs, ours = np.asarray(need(name), dtype=np.float64), np.asarray(ours, dtype=np.float64)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return Line(f"{path.stem} {name}{how}", float("inf"), float("inf"), limit)
        largest = float(np.abs(ours - theirs).max())
        return Line(f"{path.stem} {name}{how}", largest, largest / max(float(np.abs(theirs).max()), 1e-30), limit)

    for name, space in (("fid", "pool"), ("sfid", "spatial")):
        if name in recorded:
            pair = [compute_statistics(need(f"{side}_{space}")) for side in ("ref", "sample")]
            yield compare(name, frechet_distance(*pair), 1e-5, " with means in float64")
            # The evaluator averages float32 features in float32, which moves the distance by more the more images
            # there are; with its means the rest must agree closely.
            means = [np.mean(need(f"{side}_{space}"), axis=0) for side in ("ref", "sample")]
            pair = [stats._replace(mean=mean) for stats, mean in zip(pair, means, strict=True)]
            yield compare(name, frechet_distance(*pair), 1e-6)
    prefix = "inception_score_split_"
    for name in sorted(name for name in recorded if name.startswith(prefix)):
        score = inception_score(np.log(need("probs")), int(name.removeprefix(prefix)))
        yield compare(name, score.value, 1e-10)
    if "precision" in recorded:
        result = precision_recall(torch.from_numpy(need("ref_pool")), torch.from_numpy(need("sample_pool")))
        yield compare("precision", result.precision, 0.0)
        yield compare("recall", result.recall, 0.0)
        yield compare("radii_ref_squared", result.radii_reference.numpy(), 0.0)
        yield compare("radii_sample_squared", result.radii_samples.numpy(), 0.0)
