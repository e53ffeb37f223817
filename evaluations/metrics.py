"""Numbers from features: Frechet distance (FID), Inception Score, kernel distances (KID, CMMD).

Distances are between a reference set and a sample set; nothing here reads images or runs a network.
Neighbour metrics (precision, recall, density, coverage) are in evaluations/neighbours.py.
"""

from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from evaluations.statistics import Statistics


class Estimate(NamedTuple):
    """A number and its standard error, None where there is none."""

    value: float
    error: float | None


def share(part: float, count: int) -> Estimate:
    """A share of `count` independent trials with its binomial standard error."""
    return Estimate(part, (part * (1 - part) / count) ** 0.5)


def frechet_distance(reference: Statistics, samples: Statistics) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al. 2017), in float64.

    Raises:
        UserError: the dimensions differ or a statistic is not finite.
    """
    for name, stats in (("reference", reference), ("sample", samples)):
        if not (np.isfinite(stats.mean).all() and np.isfinite(stats.covariance).all()):
            raise UserError(f"the {name} statistics hold NaN or infinite values; the features overflowed")
    if reference.mean.shape != samples.mean.shape:
        raise UserError(f"feature dimensions differ: {reference.mean.shape[0]} and {samples.mean.shape[0]}")
    shift = reference.mean - samples.mean
    traces = np.trace(reference.covariance) + np.trace(samples.covariance)
    distance = shift @ shift + traces - 2 * _root_trace(reference.covariance, samples.covariance)
    return max(float(distance), 0.0)  # rounding may leave -1e-13 for equal sets


def _root_trace(c1: np.ndarray, c2: np.ndarray) -> float:
    """tr (C1 C2)^(1/2): the sum of the singular values of F1^T F2 for any factors C = F F^T.

    Cholesky factors and the eigenvalues of the squared product are quick; their rounding error is bounded from the
    spectrum they give. Where the bound is poor (covariances of few images are singular), pivoted Cholesky factors drop
    the null space and an SVD gives the singular values, with the digits that a square root of C1 C2 loses.
    """
    tiny = np.finfo(np.float64).eps
    try:
        product = np.linalg.cholesky(c1).T @ np.linalg.cholesky(c2)
        squares = np.linalg.eigvalsh(product @ product.T)
    except np.linalg.LinAlgError:
        squares = np.zeros(1)
    if squares[0] > 0:
        values = np.sqrt(squares)
        if tiny * squares[-1] * np.sum(0.5 / values) < 1e-10 * values.sum():
            return float(values.sum())
    product = _thin_factor(c1).T @ _thin_factor(c2)
    return float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0


def _thin_factor(covariance: np.ndarray) -> np.ndarray:
    """F (D, r) with F F^T = covariance and r its numerical rank."""
    from scipy.linalg.lapack import dpstrf

    tolerance = len(covariance) * np.finfo(np.float64).eps * max(np.diagonal(covariance).max(), 0.0)
    lower, pivots, rank, _ = dpstrf(covariance, tol=tolerance, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


class InceptionScore:
    """Inception Score: exp of the mean KL(p(y|x) || p(y)), in chunks of `split` images in file order (Salimans et al. 2016).

    Streams: feed log-probabilities in any order with the image's index in the file. Only the last chunk may be short.
    """

    def __init__(self, n: int, classes: int, split: int = 5000, device: torch.device | str = "cpu"):
        self.split = split
        chunks = -(-n // split)
        self.count = torch.zeros(chunks, dtype=torch.float64, device=device)
        self.negative_entropy = torch.zeros(chunks, dtype=torch.float64, device=device)
        self.marginal = torch.zeros(chunks, classes, dtype=torch.float64, device=device)

    def update(self, log_probabilities: torch.Tensor, first: int) -> None:
        """Add log p (B, K), float64, of the images first .. first + B - 1 of the file."""
        probabilities = log_probabilities.exp()
        # exp underflows to 0 where log p < -745; 0 log 0 = 0, and a log p of -inf must not make it NaN
        terms = torch.where(probabilities > 0, probabilities * log_probabilities, 0.0).sum(1)
        chunk = torch.arange(first, first + len(terms), device=terms.device) // self.split
        self.count.index_add_(0, chunk, torch.ones_like(terms))
        self.negative_entropy.index_add_(0, chunk, terms)
        self.marginal.index_add_(0, chunk, probabilities)

    def all_reduce(self) -> None:
        """Sum over the ranks."""
        import torch.distributed as dist

        for tensor in (self.count, self.negative_entropy, self.marginal):
            dist.all_reduce(tensor)

    def estimate(self) -> Estimate:
        """Mean over the chunks; error: their standard deviation over the square root of their number."""
        marginal = self.marginal / self.count[:, None]
        entropy = torch.where(marginal > 0, marginal * marginal.log(), 0.0).sum(1)
        scores = (self.negative_entropy / self.count - entropy).exp()
        error = (scores.std() / len(scores) ** 0.5).item() if len(scores) > 1 else None
        return Estimate(scores.mean().item(), error)


def kernel_distance(
    reference: torch.Tensor, samples: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel distance: unbiased MMD^2 with kernel (x.y/D + 1)^3 over random subsets (Binkowski et al. 2018).

    It is called KID on Inception's features, KDD on DINOv2's.

    Args:
        reference: (N, D) features.
        samples: (M, D) features.
        subsets: their number; the error is that of their mean.
        subset_size: images of each side; fewer where a set has fewer.
        seed: of their choice.

    Raises:
        UserError: a set has fewer than two images.
    """
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise UserError(f"the kernel distance needs at least 2 images in each set, got {size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = reference[torch.randperm(len(reference), generator=generator)[:size].to(reference.device)].double()
        y = samples[torch.randperm(len(samples), generator=generator)[:size].to(samples.device)].double()
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    error = float(np.std(values, ddof=1) / subsets**0.5) if subsets > 1 else None
    return Estimate(float(np.mean(values)), error)


def clip_mmd(reference: torch.Tensor, samples: torch.Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD (Jayasumana et al. 2024): `scale` times the biased MMD^2 of unit-length embeddings under a Gaussian kernel."""

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        total = 0.0
        for rows in a.split(2048):
            total += torch.exp(-(2 - 2 * rows @ b.T) / (2 * sigma**2)).sum().item()
        return total / (len(a) * len(b))

    x, y = (torch.nn.functional.normalize(side.double(), dim=1) for side in (reference, samples))
    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
