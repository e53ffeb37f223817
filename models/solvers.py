"""Solvers of the probability-flow ODE (SiT eq. 2) and of the reverse SDE (SiT eq. 4): Euler, Heun, Euler-Maruyama,
DPM-Solver++(2M) and dopri5, free functions of a velocity, a State and a decreasing grid of times.

A velocity function takes (state, t), t a scalar float64 tensor, and returns a State; solvers do not know about guidance.
Latent and class token move as one State. "Evaluation" is one call of the velocity function.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from config import UserError
from models.choices import DIFFUSIONS, check
from models.guidance import Velocity
from models.interpolant import Interpolant
from models.state import State

Noise = Callable[[int], State]  # step number => standard normals
Progress = Callable[[float], object]  # takes the finished fraction of a trajectory, a number of the host


@dataclass(frozen=True)
class Diffusion:
    """The diffusion coefficient w(t) of the reverse SDE, by name: linear 2t (published), sigma 2 sigma(t), constant 1;
    times `scale`. The marginals are the same for every w; the amount of fresh noise is not (SiT section 2.4)."""

    name: str = "linear"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check("diffusion coefficient", self.name, DIFFUSIONS)
        if self.scale < 0:
            raise UserError(f"the scale of the diffusion coefficient must not be negative, got {self.scale}")

    def __call__(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        if self.name == "constant":
            return self.scale * torch.ones_like(t)
        return self.scale * 2 * (t if self.name == "linear" else interpolant.coefficients(t).sigma)


def steps(times: Tensor, progress: Progress | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (t, t_next) of a grid of times; after each step that was taken, `progress` gets the fraction that is done.

    It counts on the host, without device-to-host synchronisation: on a GPU the step may still be running.
    """
    for number, pair in enumerate(pairwise(times), start=1):
        yield pair
        if progress:
            progress(number / (len(times) - 1))


def euler(velocity: Velocity, state: State, times: Tensor, progress: Progress | None = None) -> State:
    """First-order solver of the ODE (SiT eq. 2), x + dt v: state at times[0] => at times[-1], float64.

    One evaluation per step.
    """
    state = state.double()
    for t, t_next in steps(times, progress):
        state = state + (t_next - t) * velocity(state, t)
    return state


def heun(velocity: Velocity, state: State, times: Tensor, progress: Progress | None = None) -> State:
    """Second-order solver of the ODE: average the velocities at both ends of each step (Karras et al. 2022, algorithm 1).

    Two evaluations per step; the last step is Euler's, because the network is not trained at t = 0.
    """
    state = state.double()
    for i, (t, t_next) in enumerate(steps(times, progress)):
        dt = t_next - t
        v = velocity(state, t)
        if i < len(times) - 2:
            v = (v + velocity(state + dt * v, t_next)) / 2
        state = state + dt * v
    return state


def euler_maruyama(
    velocity: Velocity,
    state: State,
    times: Tensor,
    interpolant: Interpolant,
    noise: Noise,
    diffusion: Diffusion = Diffusion(),
    last_step: str = "drift",
    progress: Progress | None = None,
) -> State:
    """Euler-Maruyama for the reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW (SiT eq. 4); one evaluation per step.

    Args:
        velocity: guided or not.
        state: at times[0].
        times: decreasing, float64.
        interpolant: the path that the network was trained on, for the score.
        noise: step number => State of standard normals.
        diffusion: the coefficient w(t).
        last_step: "drift" takes the drift without noise (published; on the linear path it subtracts w / 2 of the predicted
            noise from the data estimate), "ode" follows the velocity alone, which on the linear path gives the data
            estimate.
        progress: takes the finished fraction after each step.

    Returns:
        The State at times[-1], float64.
    """
    state = state.double()
    for i, (t, t_next) in enumerate(steps(times, progress)):
        dt, w, last = t_next - t, diffusion(t, interpolant), i == len(times) - 2
        drift = velocity(state, t)
        if not last or last_step == "drift":
            drift = drift - w / 2 * interpolant.score(drift, state, t)
        state = state + dt * drift
        if not last:
            state = state + (w * dt.abs()).sqrt() * noise(i).double()
    return state


def dpm_solver_pp(
    velocity: Velocity,
    state: State,
    times: Tensor,
    interpolant: Interpolant,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> State:
    """DPM-Solver++(2M) for velocity models (Lu et al. 2022, algorithm 2); with noise, SDE-DPM-Solver++(2M).

    Integrates the linear part exactly and extrapolates the data estimate in half log-SNR = log(alpha / sigma) from the
    last two evaluations; where that is infinite (t = 1, t = 0) the step is of first order. One evaluation per step.

    Args:
        velocity: guided or not.
        state: at times[0].
        times: decreasing, float64.
        interpolant: the path that the network was trained on.
        noise: step number => State of standard normals; None solves the ODE.
        progress: takes the finished fraction after each step.

    Returns:
        The State at times[-1], float64.
    """
    state = state.double()
    previous: State | None = None
    h_previous = torch.tensor(torch.inf)
    for i, (t, t_next) in enumerate(steps(times, progress)):
        now, then = interpolant.coefficients(t), interpolant.coefficients(t_next)
        h = (then.alpha / then.sigma).log() - (now.alpha / now.sigma).log()
        data = interpolant.denoised(velocity(state, t), state, t)
        extrapolated = data
        if previous is not None and h.isfinite() and h_previous.isfinite():
            extrapolated = data + h / (2 * h_previous) * (data - previous)
        keep = then.sigma / now.sigma * (1 if noise is None else (-h).exp())
        # alpha' (1 - e^-h), or alpha' (1 - e^-2h) with noise, written so that t = 0 and t = 1 are no special cases
        gain = then.alpha - keep * now.alpha
        state = keep * state + gain * extrapolated
        if noise is not None and i < len(times) - 2:
            state = state + then.sigma * (1 - (-2 * h).exp()).sqrt() * noise(i).double()
        previous, h_previous = data, h
    return state


def dormand_prince(
    velocity: Velocity, state: State, times: Tensor, rtol: float, atol: float, progress: Progress | None = None
) -> State:
    """Adaptive fifth-order Runge-Kutta (Dormand & Prince 1980) by torchdiffeq between the first and the last of `times`.

    Step sizes follow the error of the whole batch, so a sample depends on its batch to within the tolerance. The number of
    steps is not known before: `progress` takes the fraction of the time that evaluations have reached.

    Raises:
        UserError: torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError("the solver dopri5 needs torchdiffeq: pip install torchdiffeq, or choose heun") from error
    parts = tuple(x.double() for x in state if x is not None)
    reached = 0.0

    def derivative(t: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal reached
        t = t.cpu()  # once: the velocity, and the line below, need it on the host
        result = tuple(x for x in velocity(State(*parts), t) if x is not None)
        if progress and reached < (now := min(1.0, 1 - float(t))):
            reached = now
            progress(reached)
        return result

    ends = torch.stack([times[0], times[-1]]).to(parts[0].device)
    path = odeint(derivative, parts, ends, rtol=rtol, atol=atol, method="dopri5")
    if progress and reached < 1:
        progress(1.0)
    return State(*(x[-1] for x in path))
