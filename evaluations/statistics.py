"""Mean and covariance of features, streamed in float64 and merged over batches, groups and ranks."""

from typing import NamedTuple

import numpy as np
import torch

from config import UserError


class Statistics(NamedTuple):
    """Gaussian summary of n feature vectors: `mean` (D,) and unbiased `covariance` (D, D), both float64."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Running mean and scatter matrix of (N, D) features.

    Rows are buffered and folded in chunks of fixed length, so the batch size leaves no trace in the result; every
    fold is centred first (Chan et al. 1983), so features far from zero lose no digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu", chunk: int = 1024):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.chunk = chunk
        self._rows: list[torch.Tensor] = []
        self._buffered = 0

    def update(self, features: torch.Tensor) -> None:
        """Add rows (B, D); B may be 0."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (N, {len(self.mean)}), got {tuple(features.shape)}")
        self._rows.append(features.to(self.mean.device))
        self._buffered += len(features)
        if self._buffered >= self.chunk:
            rows = torch.cat(self._rows)
            whole = len(rows) // self.chunk * self.chunk
            for start in range(0, whole, self.chunk):
                self._fold(rows[start : start + self.chunk])
            self._rows = [rows[whole:].clone()]
            self._buffered = len(rows) - whole

    def _flush(self) -> None:
        if self._buffered:
            self._fold(torch.cat(self._rows))
        self._rows, self._buffered = [], 0

    def _fold(self, rows: torch.Tensor) -> None:
        rows = rows.to(torch.float64, copy=True)
        mean = rows.mean(0)
        rows -= mean
        self.scatter.addmm_(rows.T, rows)  # in place: a (D, D) temporary would be 33 MB at Inception's width
        self._join(len(rows), mean)

    def _join(self, n: int, mean: torch.Tensor) -> None:
        """Count n more rows of that mean, whose scatter about it has been added."""
        if n == 0:
            return
        total = self.n + n
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.n * n / total)
        self.mean += shift * (n / total)
        self.n = total

    def merge(self, other: "Moments") -> None:
        """Add everything `other` has seen."""
        self._flush()
        other._flush()
        self.scatter += other.scatter
        self._join(other.n, other.mean)

    def all_reduce(self) -> None:
        """Sum over the ranks; afterwards every rank holds the whole."""
        import torch.distributed as dist

        self._flush()
        count = torch.tensor([float(self.n)], dtype=torch.float64, device=self.mean.device)
        total = count.clone()
        dist.all_reduce(total)
        if total == 0:
            return
        mean = self.mean * (count / total)
        dist.all_reduce(mean)
        shift = self.mean - mean
        self.scatter.addr_(shift, shift, alpha=self.n)
        dist.all_reduce(self.scatter)
        self.n, self.mean = int(total.item()), mean

    def statistics(self) -> Statistics:
        """Mean and covariance of all rows so far.

        Raises:
            UserError: there are fewer than two, and one image has no covariance.
        """
        self._flush()
        if self.n < 2:
            raise UserError(f"statistics need at least 2 images, got {self.n}")
        covariance = self.scatter.cpu().numpy() / (self.n - 1)
        return Statistics(self.n, self.mean.cpu().numpy().copy(), covariance)


def compute_moments(features: np.ndarray | torch.Tensor) -> Moments:
    """Moments of features (N, D) held in memory."""
    features = torch.as_tensor(features)
    moments = Moments(features.shape[1], features.device)
    for rows in features.split(moments.chunk):
        moments.update(rows)
    return moments


def compute_statistics(features: np.ndarray | torch.Tensor) -> Statistics:
    """Statistics of features (N, D) held in memory."""
    return compute_moments(features).statistics()


def without(whole: Moments, part: Moments) -> Statistics:
    """Statistics of `whole` less the rows of `part`, which it holds: for leaving one group out at a time."""
    whole._flush()
    part._flush()
    rest = Moments(len(whole.mean), whole.mean.device)
    rest.n = whole.n - part.n
    if rest.n < 2:
        raise ValueError(f"leaving {part.n} of {whole.n} images out leaves too few for statistics")
    shift = (part.mean - whole.mean) * (whole.n / rest.n)  # from the mean of the rest to that of the part
    rest.mean = part.mean - shift
    rest.scatter = (whole.scatter - part.scatter).addr_(shift, shift, alpha=-part.n * rest.n / whole.n)
    return rest.statistics()


def jackknife_groups(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Group of each image by its number, rows: (B,) int64 => (B,) int64 in [0, groups).

    Golden-ratio steps give each group an equal share of every stretch and of every period, so that neither sorted nor
    interleaved classes end up in groups of their own, which would pass for an enormous error.
    """
    return ((rows.double() * 0.6180339887498949) % 1 * groups).long()


def jackknife_error(values: list[float]) -> float:
    """Standard error from the leave-one-group-out values (Tukey's jackknife)."""
    spread = np.asarray(values, dtype=np.float64)
    return float(np.sqrt((len(spread) - 1) * np.mean((spread - spread.mean()) ** 2)))
