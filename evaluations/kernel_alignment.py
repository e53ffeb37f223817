"""Centred kernel nearest-neighbour alignment (CKNNA) of two representations of the same images."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError


class Side(NamedTuple):
    """One representation of N images, prepared for comparison: the k nearest others of each (N, k), their inner products
    (N, k) float64, and the alignment with itself."""

    nearest: Tensor
    kernel: Tensor
    own: float


def cknna(a: Tensor, b: Tensor, k: int = 10) -> float:
    """CKNNA of a (N, D) and b (N, E), Huh et al. 2024: 1 for equal neighbourhoods.

    Unbiased HSIC of the inner-product kernels of unit vectors, both masked to the pairs (i, j) where j is one of i's k
    nearest in a and in b; over the geometric mean of the same with a alone and b alone. Only masked entries are kept,
    so 10,000 images need no N x N matrix. 0 where the neighbourhoods of a or b carry no signal.

    Raises:
        UserError: the numbers of rows differ, N < 4, or k is not in [2, N - 2].
    """
    return compare(prepare(a, k), prepare(b, k))


def prepare(x: Tensor, k: int) -> Side:
    """Search the neighbours of x (N, D) once, for any number of comparisons."""
    if len(x) < 4 or not 2 <= k <= len(x) - 2:
        raise UserError(f"CKNNA needs at least 4 images and 2 <= k <= images - 2, got {len(x)} images and k = {k}")
    unit = F.normalize(x.double(), dim=1)
    single, nearest, kernels = unit.float(), [], []
    for start in range(0, len(x), 500):
        rows = slice(start, min(start + 500, len(x)))
        kernel = single[rows] @ single.T
        kernel[torch.arange(len(kernel)), torch.arange(rows.start, rows.stop)] = -torch.inf
        nearest.append(kernel.topk(k, dim=1).indices)
        kernels.append(torch.einsum("nd,nkd->nk", unit[rows], unit[nearest[-1]]))
    side = Side(torch.cat(nearest), torch.cat(kernels), 0.0)
    return side._replace(own=_similarity(side, side))


def compare(a: Side, b: Side) -> float:
    """CKNNA of two prepared sides."""
    if len(a.nearest) != len(b.nearest):
        raise UserError(f"CKNNA compares the same images: got {len(a.nearest)} and {len(b.nearest)} rows")
    own = a.own * b.own
    return _similarity(a, b) / own**0.5 if own > 0 else 0.0


def _similarity(a: Side, b: Side) -> float:
    i, slot, other = (a.nearest[:, :, None] == b.nearest[:, None, :]).nonzero(as_tuple=True)
    return _hsic(a.kernel[i, slot], b.kernel[i, other], i, a.nearest[i, slot], len(a.nearest))


def _hsic(kernel: Tensor, other: Tensor, i: Tensor, j: Tensor, n: int) -> float:
    """Unbiased HSIC (Song et al. 2012, equation 5) of two n x n kernels with zero diagonal and the entries (i, j)."""
    place, mirrored = i * n + j, j * n + i
    order = place.argsort()
    slot = torch.searchsorted(place[order], mirrored).clamp(max=max(len(place) - 1, 0))
    found = order[slot]
    trace = (kernel * other[found])[place[found] == mirrored].sum()
    columns = torch.zeros(n, dtype=kernel.dtype, device=kernel.device).index_add_(0, j, kernel)
    rows = torch.zeros_like(columns).index_add_(0, i, other)
    total = trace + kernel.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * (columns * rows).sum() / (n - 2)
    return (total / (n * (n - 3))).item()
