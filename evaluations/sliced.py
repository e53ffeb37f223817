"""MIND: a sliced Wasserstein distance of features that a few thousand samples suffice for (arXiv 2605.06797)."""

import torch
from torch import Tensor

from config import UserError
from evaluations.metrics import Estimate


def mind(reference: Tensor, samples: Tensor, *, directions: int = 1000, seed: int = 0) -> Estimate:
    """MIND (arXiv 2605.06797): 3 D times the mean over directions of the squared 1-D Wasserstein-2 distance.

    Args:
        reference: (N, D) features.
        samples: (M, D) features.
        directions: number of random unit vectors.
        seed: of the directions.

    Returns:
        The value, and its standard error from the directions and from two halves of the samples together; the halves are
        biased alike, so that their difference measures the sampling alone.

    Raises:
        UserError: a set has fewer than two images.
    """
    if min(len(reference), len(samples)) < 2:
        raise UserError(f"MIND needs at least 2 images in each set, got {len(reference)} and {len(samples)}")
    dim = reference.shape[1]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(directions, dim, generator=generator, dtype=torch.float64))
    vectors = vectors.to(reference.device)
    a, b = (vectors @ side.double().T for side in (reference, samples))  # (L, N), (L, M)
    a = a.sort(1).values
    values = 3 * dim * _transport(a, b.sort(1).values)
    halves = [3 * dim * _transport(a, half.sort(1).values).mean() for half in (b[:, ::2], b[:, 1::2])]
    error = (values.var() / directions + ((halves[0] - halves[1]) / 2) ** 2).sqrt()
    return Estimate(values.mean().item(), error.item())


def _transport(a: Tensor, b: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance of two samples on a line: sorted (L, N) and (L, M) => (L,).

    The integral over u of the squared difference of the two quantile functions, which are steps; for N = M it is the mean
    squared difference of the sorted values.
    """
    n, m = a.shape[1], b.shape[1]
    # where either quantile function steps, times N M, so that integers decide which value holds
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(a.device)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return ((a[:, starts // m] - b[:, starts // n]) ** 2 * ((ends - starts).double() / (n * m))).sum(1)
