"""Nearest-neighbour metrics of two feature sets: precision, recall, density, coverage, nearest reference images.

All distances are squared Euclidean. Rule "adm" repeats the ADM evaluator, whose TensorFlow graph works in float16:
inputs, squares, their sums, the product and both additions are each rounded to float16, in blocks of 10,000 x 10,000;
a block that overflows is computed in float32. Rule "fp32" is the plain formula.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from config import UserError
from models.choices import DISTANCE_RULES

BLOCK = 10_000  # ADM's block: whether float16 overflows is decided block by block
HALF_MAX = 65504.0


class PrecisionRecall(NamedTuple):
    """Fractions (Kynkaanniemi et al. 2019) and the squared k-NN radii (N,) float32 they come from."""

    precision: float
    recall: float
    radii_reference: torch.Tensor
    radii_samples: torch.Tensor


class DensityCoverage(NamedTuple):
    """Naeem et al. 2020: `density` may exceed 1, `coverage` is a fraction."""

    density: float
    coverage: float


class Nearest(NamedTuple):
    """Of every sample: squared distance (M,) float32 to its nearest reference point, and that point's index (M,)."""

    distances: torch.Tensor
    indices: torch.Tensor


def precision_recall(
    reference: torch.Tensor, samples: torch.Tensor, *, k: int = 3, rule: str = "adm"
) -> PrecisionRecall:
    """Precision: share of samples within the k-NN ball of a reference image; recall: the reverse.

    Args:
        reference: (N, D) features.
        samples: (M, D) features, on the same device.
        k: number of nearest neighbours.
        rule: arithmetic of the distances, "adm" or "fp32".

    Raises:
        UserError: a set has at most k points, the dimensions differ, or the rule is unknown.
    """
    radii_reference, radii_samples = (neighbour_radii(points, k=k, rule=rule) for points in (reference, samples))
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for tile in _cross_tiles(reference, samples, rule):
        distances = tile.distances()
        inside[tile.columns] |= (distances <= radii_reference[tile.rows, None]).any(0)
        covered[tile.rows] |= (distances <= radii_samples[None, tile.columns]).any(1)
    precision, recall = inside.double().mean().item(), covered.double().mean().item()
    return PrecisionRecall(precision, recall, radii_reference, radii_samples)


def density_coverage(reference: torch.Tensor, samples: torch.Tensor, *, k: int = 5) -> DensityCoverage:
    """Density: reference balls around a sample, over k; coverage: share of reference balls that hold a sample."""
    radii = neighbour_radii(reference, k=k, rule="fp32")
    hits = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for tile in _cross_tiles(reference, samples, "fp32"):
        inside = tile.distances() <= radii[tile.rows, None]
        hits += int(inside.sum())
        covered[tile.rows] |= inside.any(1)
    return DensityCoverage(hits / (k * len(samples)), covered.double().mean().item())


def nearest(reference: torch.Tensor, samples: torch.Tensor) -> Nearest:
    """The nearest reference point of every sample, in float32."""
    distances = torch.full((len(samples),), torch.inf, device=samples.device)
    indices = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    for tile in _cross_tiles(reference, samples, "fp32"):
        smallest, row = tile.distances().min(0)
        closer = smallest < distances[tile.columns]
        distances[tile.columns] = torch.where(closer, smallest, distances[tile.columns])
        indices[tile.columns] = torch.where(closer, row + tile.rows.start, indices[tile.columns])
    return Nearest(distances, indices)


def neighbour_radii(points: torch.Tensor, *, k: int, rule: str) -> torch.Tensor:
    """Squared distance (N,) float32 of every point to its k-th nearest other point."""
    if len(points) <= k:
        raise UserError(f"{k} nearest neighbours need more than {k} images in each set, got {len(points)}")
    # k + 1 because the point itself is among them; duplicates give radius 0, as in the published evaluator
    smallest = torch.full((len(points), k + 1), torch.inf, device=points.device)
    side = _Points(points, rule)
    for rows in _slices(0, len(points), BLOCK):
        for columns in _slices(rows.start, len(points), BLOCK):
            for tile in _tiles(side, side, rows, columns):
                if tile.rows.start <= tile.columns.start:
                    _keep_smallest(smallest[tile.rows], tile.distances())
                if tile.rows.start < tile.columns.start:
                    _keep_smallest(smallest[tile.columns], tile.mirrored().T)
    return smallest.amax(1)


def _keep_smallest(smallest: torch.Tensor, distances: torch.Tensor) -> None:
    """Merge distances (R, C) into the running smallest (R, k + 1), in place."""
    rows = (distances.amin(1) < smallest.amax(1)).nonzero()[:, 0]
    if len(rows):
        merged = torch.cat([smallest[rows], distances[rows]], 1)
        smallest[rows] = merged.topk(smallest.shape[1], dim=1, largest=False, sorted=False).values


class _Points:
    """One set: float32 features (N, D) and squared norms (N,), and the same rounded to float16 under "adm"."""

    def __init__(self, features: torch.Tensor, rule: str):
        if rule not in DISTANCE_RULES:
            raise UserError(f"the distance rule must be one of {', '.join(DISTANCE_RULES)}, got {rule!r}")
        self.features = features.float()
        self.norms = self.features.square().sum(1)
        self.half = rule == "adm"
        if self.half:
            half = features.half()
            self.half_norms = _half_sum(half * half).float()
            self.half_features = half.float()


class _Tile(NamedTuple):
    """Inner products (R, C) of rows[i] and columns[j], from which the distances follow."""

    rows: slice
    columns: slice
    product: torch.Tensor
    row_norms: torch.Tensor
    column_norms: torch.Tensor
    half: bool

    def distances(self) -> torch.Tensor:
        """(R, C): of rows[i] to columns[j]."""
        return _distances(self.product, self.row_norms, self.column_norms, self.half)

    def mirrored(self) -> torch.Tensor:
        """(R, C): of columns[j] to rows[i]; rounding makes it differ from `distances` in float16."""
        return _distances(self.product, self.column_norms, self.row_norms, self.half)


def _distances(product: torch.Tensor, first: torch.Tensor, second: torch.Tensor, half: bool) -> torch.Tensor:
    """max((first - 2 product) + second, 0), each result rounded to float16 when `half`; float32 throughout."""
    if half:
        product = product.half().float()
        return torch.sub(first, product, alpha=2).half().float().add_(second).half().float().clamp_(min=0)
    return torch.sub(first, product, alpha=2).add_(second).clamp_(min=0)


def _cross_tiles(reference: torch.Tensor, samples: torch.Tensor, rule: str) -> Iterator[_Tile]:
    if reference.shape[1] != samples.shape[1]:
        raise UserError(f"feature dimensions differ: {reference.shape[1]} and {samples.shape[1]}")
    left, right = _Points(reference, rule), _Points(samples, rule)
    for rows in _slices(0, len(reference), BLOCK):
        for columns in _slices(0, len(samples), BLOCK):
            yield from _tiles(left, right, rows, columns)


def _tiles(left: _Points, right: _Points, rows: slice, columns: slice) -> Iterator[_Tile]:
    """One block in tiles that fit the cache; within one set only those on and above the diagonal."""
    half = left.half and _fits_half(left, right, rows, columns)
    size = 1000 if left.features.device.type == "cpu" else BLOCK
    for row in _slices(rows.start, rows.stop, size):
        for column in _slices(columns.start, columns.stop, size):
            if left is right and column.start < row.start:
                continue
            if half:
                product = left.half_features[row] @ right.half_features[column].T
                norms = left.half_norms[row, None], right.half_norms[None, column]
            else:
                product = left.features[row] @ right.features[column].T
                norms = left.norms[row, None], right.norms[None, column]
            yield _Tile(row, column, product, *norms, half)


def _fits_half(left: _Points, right: _Points, rows: slice, columns: slice) -> bool:
    """Whether ADM's float16 formula stays finite over the block."""
    largest = max(left.half_norms[rows].max().item(), right.half_norms[columns].max().item())
    if 4 * largest < HALF_MAX:  # |u - v|^2 and every partial result are at most 4 max |u|^2
        return True
    if not largest <= HALF_MAX:
        return False
    for row in _slices(rows.start, rows.stop, 1000):
        product = (left.half_features[row] @ right.half_features[columns].T).half()
        first, second = left.half_norms[row, None].half(), right.half_norms[None, columns].half()
        if not ((first - 2 * product) + second).isfinite().all():
            return False
    return True


def _half_sum(x: torch.Tensor) -> torch.Tensor:
    """Row sums (N,) of float16 x (N, D) in the order of TensorFlow's CPU kernel (Eigen), each addition rounded.

    Vectors of 8 lanes go to 4 running sums, left-over vectors to the first; the lanes are added in float32. More than
    1,600 columns are halved first.
    """
    n = x.shape[1]
    if n > 200 * 8:
        middle = 8 * -(-n // 16)
        return _half_sum(x[:, :middle]) + _half_sum(x[:, middle:])
    vectors = x[:, : n // 8 * 8].reshape(len(x), n // 8, 8)
    sums = torch.zeros(len(x), 4, 8, dtype=x.dtype, device=x.device)
    whole = n // 32 * 4
    for start in range(0, whole, 4):
        sums = sums + vectors[:, start : start + 4]
    lanes = ((sums[:, 0] + sums[:, 1]) + sums[:, 2]) + sums[:, 3]
    for vector in range(whole, n // 8):
        lanes = lanes + vectors[:, vector]
    wide = lanes.float()
    while wide.shape[1] > 1:
        wide = wide[:, : wide.shape[1] // 2] + wide[:, wide.shape[1] // 2 :]
    rest = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for column in range(n // 8 * 8, n):
        rest = rest + x[:, column]
    return rest + wide[:, 0].half()


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, stop)) for begin in range(start, stop, size))
