"""Sampler settings: solver, time grid and number of steps as one object; the published SDE and ODE grids."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from config import UserError
from models import solvers
from models.choices import GRIDS, LAST_STEPS, MODES, SOLVERS, check
from models.guidance import Velocity
from models.interpolant import Interpolant
from models.solvers import Diffusion, Noise, Progress
from models.state import State

T_LAST = 0.04  # the published SDE grid ends here and then jumps to 0 without noise


def ode_times(num_steps: int) -> Tensor:
    """Uniform grid from 1 to 0: (num_steps + 1,) float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int, t_last: float = T_LAST) -> Tensor:
    """The published grid: num_steps times from 1 to t_last, then 0: (num_steps + 1,) float64."""
    return torch.cat([torch.linspace(1, t_last, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def shifted(u: Tensor, shift: float) -> Tensor:
    """Uniform u in [0, 1] => s u / (1 + (s - 1) u); s > 1 takes more steps near noise (Esser et al. 2024, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Solver:
    """A solver with all its settings: `solver(velocity, start, interpolant, noise)` => State at t = 0.

    mode and name: see models.choices.SOLVERS. num_steps: dopri5 does not use it. grid, shift: see `shifted`. t_last: the
    SDE's last time before 0. diffusion, last_step: of the Euler-Maruyama solver. rtol, atol: of dopri5.
    """

    mode: str = "sde"
    name: str = "euler"
    num_steps: int = 250
    grid: str = "uniform"
    shift: float = 1.0
    t_last: float = T_LAST
    diffusion: Diffusion = field(default_factory=Diffusion)
    last_step: str = "drift"
    rtol: float = 1e-3
    atol: float = 1e-3

    def __post_init__(self) -> None:
        check("mode", self.mode, MODES)
        check(f"solver of mode {self.mode}", self.name, SOLVERS[self.mode])
        check("time grid", self.grid, GRIDS)
        check("last step", self.last_step, LAST_STEPS)
        least = 2 if self.mode == "sde" else 1
        if self.num_steps < least:
            raise UserError(f"mode {self.mode} needs at least {least} steps, got {self.num_steps}")
        if self.shift <= 0 or (self.shift != 1 and self.grid != "shifted"):
            raise UserError(f"shift {self.shift} must be positive, and belongs to the time grid shifted")
        if not 0 < self.t_last < 1:
            raise UserError(f"the SDE's last time must lie between 0 and 1, got {self.t_last}")
        if self.diffusion.name == "constant" and self.last_step == "drift":
            raise UserError(
                "the constant diffusion coefficient needs the last step ode: the published one, drift, would subtract "
                "half a standard deviation of noise from the result"
            )

    @property
    def times(self) -> Tensor:
        """The grid: (num_steps + 1,) float64, decreasing from 1 to 0."""
        if self.mode == "ode":
            return shifted(ode_times(self.num_steps), self.shift)
        if self.grid == "uniform":
            return sde_times(self.num_steps, self.t_last)
        inner = shifted(torch.linspace(1, 0, self.num_steps, dtype=torch.float64), self.shift)
        return torch.cat([self.t_last + (1 - self.t_last) * inner, torch.zeros(1, dtype=torch.float64)])

    def __call__(
        self, velocity: Velocity, start: State, interpolant: Interpolant, noise: Noise, progress: Progress | None = None
    ) -> State:
        """Solve from noise to data.

        Args:
            velocity: guided or not.
            start: standard normals, the State at t = 1.
            interpolant: the path that the network was trained on.
            noise: step number => State of standard normals.
            progress: takes the finished fraction, from 0 to 1, after each step.

        Returns:
            The State at t = 0, float64.
        """
        if self.name == "dopri5":
            return solvers.dormand_prince(velocity, start, self.times, self.rtol, self.atol, progress)
        if self.name == "dpmpp":
            fresh = noise if self.mode == "sde" else None
            return solvers.dpm_solver_pp(velocity, start, self.times, interpolant, fresh, progress)
        if self.mode == "sde":
            return solvers.euler_maruyama(
                velocity, start, self.times, interpolant, noise, self.diffusion, self.last_step, progress
            )
        return {"euler": solvers.euler, "heun": solvers.heun}[self.name](velocity, start, self.times, progress)
