"""The stochastic interpolant x_t = alpha(t) x + sigma(t) noise (REG section 3; SiT eq. 1).

t = 0 is data, t = 1 is noise. alpha, sigma and their derivatives are computed here alone, for the loss and all solvers.
SiT is arXiv 2401.08740v2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from models.choices import PATHS, check
from models.state import State

X = TypeVar("X", Tensor, State)


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at t; each has the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Interpolant:
    """A path between data and noise, by name: "linear", or "cosine", which SiT calls GVP (SiT eq. 12)."""

    path: str = "linear"

    def __post_init__(self) -> None:
        check("path type", self.path, PATHS)

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha(t), sigma(t) and their derivatives (SiT eq. 12).

        linear: 1 - t and t; cosine: cos(pi t / 2) and sin(pi t / 2).
        """
        if self.path == "linear":
            return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
        half_pi = math.pi / 2
        cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x + sigma noise (SiT eq. 1). x, noise: (N, ...), t: (N,) or scalar => (N, ...)."""
        c = self.coefficients(_like(t, x))
        return c.alpha * x + c.sigma * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The regression target dx_t/dt = d_alpha x + d_sigma noise (SiT eq. 7). Shapes as in `interpolate`."""
        c = self.coefficients(_like(t, x))
        return c.d_alpha * x + c.d_sigma * noise

    def score(self, v: X, x_t: X, t: Tensor) -> X:
        """The score grad log p_t(x_t) that belongs to the velocity v (SiT eq. 9). Shapes as in `interpolate`.

        With the true velocity of one (x, noise) pair it is -noise / sigma. Singular at t = 0. For a scalar t, v and x_t may
        be States.
        """
        c = self.coefficients(_like(t, x_t))
        ratio = c.alpha / c.d_alpha
        return (ratio * v - x_t) / (c.sigma**2 - ratio * c.d_sigma * c.sigma)

    def denoised(self, v: X, x_t: X, t: Tensor) -> X:
        """The data estimate E[x | x_t] that belongs to the velocity v (from SiT eq. 3 and 8). States as in `score`."""
        c = self.coefficients(_like(t, x_t))
        return (c.d_sigma * x_t - c.sigma * v) / (c.alpha * c.d_sigma - c.sigma * c.d_alpha)

    def time_of_sigma_ratio(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha = ratio; for SiT eq. 12: linear r / (1 + r), cosine 2/pi atan(r)."""
        return ratio / (1 + ratio) if self.path == "linear" else 2 / math.pi * torch.atan(ratio)


def _like(t: Tensor, x: Tensor | State) -> Tensor:
    """Give t (scalar or (N,)) trailing axes so that it broadcasts against x (N, ...)."""
    if t.ndim == 0:
        return t
    if isinstance(x, State) or t.shape != x.shape[:1]:
        raise ValueError(f"t must be a scalar or, for a tensor, have one entry per sample: got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))
