"""Further solvers of the same two equations, time grids by name, and the choice among all of them (`Solver`).

Every solver moves latent and class token as one State. "Evaluation" is one call of the velocity function.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.samplers import (
    LAST_STEPS,
    T_LAST,
    Diffusion,
    Progress,
    Velocity,
    euler,
    euler_maruyama,
    heun,
    ode_times,
    sde_times,
    steps,
)
from models.state import State

MODES = ("sde", "ode")
SOLVERS = {"sde": ("euler", "dpmpp"), "ode": ("euler", "heun", "ab2", "ab3", "dpmpp", "dopri5")}
GRIDS = ("uniform", "shifted", "quadratic", "cosine")

Noise = Callable[[int], State]


def adams_bashforth(
    velocity: Velocity, state: State, times: Tensor, order: int = 2, progress: Progress | None = None
) -> State:
    """Explicit multistep solver of the ODE on any grid: integrate the polynomial through the last `order` velocities.

    order: 2 or 3. One evaluation a step; order 3 takes a second one in the first step (Heun's), because an Euler step
    there would leave it at order 2. state at times[0] => state at times[-1], float64.
    """
    state = state.map(lambda x: x.double())
    past: list[tuple[Tensor, State]] = []
    for t, t_next in steps(times, progress):
        past = [(t, velocity(state, t)), *past[: order - 1]]
        if order == 3 and len(past) == 1:
            v, dt = past[0][1], t_next - t
            ahead = velocity(state.map(lambda x, v: x + dt * v, v), t_next)
            state = state.map(lambda x, a, b: x + dt * (a + b) / 2, v, ahead)
            continue
        powers = torch.arange(len(past), dtype=torch.float64)
        nodes = torch.stack([s - t for s, _ in past])
        # Weights that integrate 1, s, s^2, ... exactly from 0 to dt.
        moments = (t_next - t) ** (powers + 1) / (powers + 1)
        weights = torch.linalg.solve(nodes ** powers[:, None], moments)
        for weight, (_, v) in zip(weights, past, strict=True):
            state = state.map(lambda x, v: x + weight * v, v)
    return state


def dpm_solver_pp(
    velocity: Velocity,
    state: State,
    times: Tensor,
    interpolant: Interpolant,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> State:
    """DPM-Solver++(2M) for velocity models (Lu et al. 2022); with noise, SDE-DPM-Solver++(2M).

    Integrates the linear part exactly and extrapolates the data estimate in half log-SNR = log(alpha / sigma) from the
    last two evaluations; where that is infinite (t = 1, t = 0) the step is of first order. One evaluation a step.
    noise: step number => State of standard normals. state at times[0] => state at times[-1], float64.
    """
    state = state.map(lambda x: x.double())
    previous: State | None = None
    h_previous = torch.tensor(torch.inf)
    for i, (t, t_next) in enumerate(steps(times, progress)):
        now, then = interpolant.coefficients(t), interpolant.coefficients(t_next)
        h = (then.alpha / then.sigma).log() - (now.alpha / now.sigma).log()
        data = velocity(state, t).map(lambda v, x: interpolant.denoised(v, x, t), state)
        extrapolated = data
        if previous is not None and h.isfinite() and h_previous.isfinite():
            extrapolated = data.map(lambda d, p: d + h / (2 * h_previous) * (d - p), previous)
        keep = then.sigma / now.sigma * (1 if noise is None else (-h).exp())
        # alpha' (1 - e^-h), or alpha' (1 - e^-2h) with noise, written so that t = 0 and t = 1 are no special cases
        gain = then.alpha - keep * now.alpha
        state = state.map(lambda x, d: keep * x + gain * d, extrapolated)
        if noise is not None and i < len(times) - 2:
            kick = then.sigma * (1 - (-2 * h).exp()).sqrt()
            state = state.map(lambda x, e: x + kick * e.double(), noise(i))
        previous, h_previous = data, h
    return state


def dormand_prince(
    velocity: Velocity, state: State, times: Tensor, rtol: float, atol: float, progress: Progress | None = None
) -> State:
    """Adaptive fifth-order Runge-Kutta by torchdiffeq between the first and the last of `times`.

    Step sizes follow the error of the whole batch, so a sample depends on its batch to within the tolerance. The number
    of steps is not known before: `progress` gets the part of the time that the evaluations have reached. Raises
    ValueError when torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError("the solver dopri5 needs torchdiffeq: pip install torchdiffeq, or choose heun") from error
    parts = tuple(x.double() for x in state if x is not None)
    device, reached = parts[0].device, 0.0

    def derivative(t: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal reached
        t = t.cpu()  # once: the velocity, and the line below, need it on the host
        result = tuple(x for x in velocity(State(*parts), t) if x is not None)
        if progress and reached < (now := min(1.0, 1 - float(t))):
            reached = now
            progress(reached)
        return result

    ends = torch.stack([times[0], times[-1]]).to(device)
    path = odeint(derivative, parts, ends, rtol=rtol, atol=atol, method="dopri5")
    if progress and reached < 1:
        progress(1.0)
    return State(*(x[-1] for x in path))


def warp(u: Tensor, grid: str, shift: float = 1.0) -> Tensor:
    """Uniform u in [0, 1] => times in [0, 1], by name. shifted: s u / (1 + (s - 1) u), s > 1 takes more steps near noise
    (Esser et al. 2024); quadratic: u^2, denser near data; cosine: sin^2(pi u / 2), denser at both ends."""
    if grid == "shifted":
        return shift * u / (1 + (shift - 1) * u)
    return {"uniform": u, "quadratic": u**2, "cosine": (1 - torch.cos(torch.pi * u)) / 2}[grid]


@dataclass(frozen=True)
class Solver:
    """A solver with all its settings: `solver(velocity, start, interpolant, noise)` => State at t = 0.

    mode and name: see SOLVERS. num_steps: steps; for dopri5 they do not matter. grid, shift: see `warp`. t_last: the SDE's
    last time before 0. diffusion, last_step: of the Euler-Maruyama solver. rtol, atol: of dopri5.
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
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.name not in SOLVERS[self.mode]:
            raise ValueError(f"solver {self.name!r} is none of mode {self.mode}'s: {', '.join(SOLVERS[self.mode])}")
        if self.grid not in GRIDS:
            raise ValueError(f"time grid {self.grid!r} is none of {', '.join(GRIDS)}")
        if self.last_step not in LAST_STEPS:
            raise ValueError(f"last step {self.last_step!r} is none of {', '.join(LAST_STEPS)}")
        least = 2 if self.mode == "sde" else 1
        if self.num_steps < least:
            raise ValueError(f"mode {self.mode} needs at least {least} steps, got {self.num_steps}")
        if self.shift <= 0 or (self.shift != 1 and self.grid != "shifted"):
            raise ValueError(f"shift {self.shift} must be positive, and belongs to the time grid shifted")
        if not 0 < self.t_last < 1:
            raise ValueError(f"the SDE's last time must lie between 0 and 1, got {self.t_last}")
        if self.diffusion.name == "constant" and self.last_step == "drift":
            raise ValueError(
                "the constant diffusion coefficient needs the last step ode: the published one, drift, would subtract "
                "half a standard deviation of noise from the result"
            )

    @property
    def times(self) -> Tensor:
        """The grid: (num_steps + 1,) float64, decreasing from 1 to 0."""
        if self.mode == "ode":
            return warp(ode_times(self.num_steps), self.grid, self.shift)
        if self.grid == "uniform":
            return sde_times(self.num_steps, self.t_last)
        inner = warp(torch.linspace(1, 0, self.num_steps, dtype=torch.float64), self.grid, self.shift)
        return torch.cat([self.t_last + (1 - self.t_last) * inner, torch.zeros(1, dtype=torch.float64)])

    def __call__(
        self, velocity: Velocity, start: State, interpolant: Interpolant, noise: Noise, progress: Progress | None = None
    ) -> State:
        """start: standard normals, the State at t = 1. noise: step number => State of standard normals. progress: takes
        the finished fraction, from 0 to 1, after each step."""
        times = self.times
        if self.mode == "sde":
            if self.name == "dpmpp":
                return dpm_solver_pp(velocity, start, times, interpolant, noise, progress)
            return euler_maruyama(
                velocity, start, times, interpolant, noise, self.diffusion, self.last_step, progress
            )
        if self.name == "dpmpp":
            return dpm_solver_pp(velocity, start, times, interpolant, progress=progress)
        if self.name == "dopri5":
            return dormand_prince(velocity, start, times, self.rtol, self.atol, progress)
        if self.name in ("ab2", "ab3"):
            return adams_bashforth(velocity, start, times, int(self.name[2:]), progress)
        return {"euler": euler, "heun": heun}[self.name](velocity, start, times, progress)
