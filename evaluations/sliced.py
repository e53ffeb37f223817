"""MIND: a sliced Wasserstein distance of features that a few thousand samples suffice for (arXiv 2605.06797)."""

import torch
from torch import Tensor

from config import UserError
from evaluations.metrics import Estimate

DIRECTIONS_AT_A_TIME = 50  # bounds the memory: each takes some copies of the reference's projections in float64


class Mind:
    """MIND (arXiv 2605.06797): 3 D times the mean over directions of the squared 1-D Wasserstein-2 distance.

    What the reference contributes is kept for each number of samples, so that further sets of as many are quick.
    """

    def __init__(self, reference: Tensor, *, directions: int = 1000, seed: int = 0) -> None:
        """Draw the directions.

        Args:
            reference: (N, D) features.
            directions: number of random unit vectors.
            seed: of the directions.
        """
        self.reference = reference
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(directions, reference.shape[1], generator=generator, dtype=torch.float64)
        self._blocks = torch.nn.functional.normalize(vectors).to(reference.device).split(DIRECTIONS_AT_A_TIME)
        self._cells: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, samples: Tensor) -> Estimate:
        """Measure a set of samples.

        Args:
            samples: (M, D) features.

        Returns:
            The value, and its standard error from the directions and from two halves of the samples together; the halves are
            biased alike, so that their difference measures the sampling alone.

        Raises:
            UserError: a set has fewer than two images.
        """
        if min(len(self.reference), len(samples)) < 2:
            raise UserError(f"MIND needs at least 2 images in each set, got {len(self.reference)} and {len(samples)}")
        rows = torch.cat([vectors @ samples.double().T for vectors in self._blocks])  # (L, M)
        parts = rows, rows[:, ::2], rows[:, 1::2]
        self._read_reference({part.shape[1] for part in parts})
        values, *halves = (3 * samples.shape[1] * self._transport(part) for part in parts)
        error = (values.var() / len(values) + ((halves[0].mean() - halves[1].mean()) / 2) ** 2).sqrt()
        return Estimate(values.mean().item(), error.item())

    def _transport(self, rows: Tensor) -> Tensor:
        """Squared Wasserstein-2 distance to the reference in each direction: projections (L, M) => (L,)."""
        means, scatter = self._cells[rows.shape[1]]
        return (rows.sort(1).values - means).square().mean(1) + scatter

    def _read_reference(self, counts: set[int]) -> None:
        """Cut the reference's quantile functions into as many equal cells as there are samples.

        The distance is the integral over u of the squared difference of both quantile functions, and that of M samples is
        constant in each of M cells. So the reference's mean in each cell, (L, M), and the mean square of what it deviates
        from these, (L,), say all.
        """
        counts = counts - self._cells.keys()
        if not counts:
            return
        n = len(self.reference)
        found: dict[int, tuple[list[Tensor], list[Tensor]]] = {count: ([], []) for count in counts}
        pieces = {count: _pieces(n, count, self.reference.device) for count in counts}
        for vectors in self._blocks:
            ordered = (vectors @ self.reference.double().T).sort(1).values
            for count, (row, width) in pieces.items():
                values = ordered[:, row]  # (directions, M, pieces)
                means = (values * width).sum(2)
                found[count][0].append(means)
                found[count][1].append(((values - means[:, :, None]).square() * width).sum((1, 2)) / count)
        self._cells |= {count: (torch.cat(means), torch.cat(scatter)) for count, (means, scatter) in found.items()}


def _pieces(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of n sorted values lie in each of m equal cells, and how much of the cell each takes: (m, pieces) both.

    A sum over pieces is the same at each run on a GPU too, as additions into shared cells are not.
    """
    # ends of values and cells times n m, so that integers decide
    start = torch.arange(m)[:, None] * n
    row = start // m + torch.arange((n - 1) // m + 2)
    width = (torch.minimum((row + 1) * m, start + n) - torch.maximum(row * m, start)).clamp(min=0).double() / n
    return row.clamp(max=n - 1).to(device), width.to(device)
