"""Solvers of the probability-flow ODE and of the reverse SDE, and guidance (REG appendix; SiT section 2).

A velocity function takes (state, t), t a scalar float64 tensor, and returns a State. Solvers are free functions of such
a function, a State and a decreasing grid of times; they do not know about guidance. Guiding the velocity equals guiding
the drift of the SDE, because the drift is affine in the velocity.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.interpolant import Interpolant
from models.state import State

Velocity = Callable[[State, Tensor], State]
Progress = Callable[[float], object]  # takes the finished fraction of a trajectory, a number of the host

T_LAST = 0.04  # the published SDE grid ends here and then jumps to 0 without noise


SCHEDULES = ("constant", "linear", "cosine")
DIFFUSIONS = ("linear", "sigma", "constant")
LAST_STEPS = ("drift", "ode")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v_null + s (v_label - v_null) while low <= t <= high; s = 1 is no guidance.

    class_scale, class_low, class_high are the class token's own; None: the same as the latent's. schedule: how
    s - 1 moves along the trajectory, with mean scale - 1 over t in [0, 1]: constant, or growing from 0 at t = 1 to
    2 (scale - 1) at t = 0, linear or cosine (Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers").
    """

    scale: float = 1.0
    class_scale: float | None = None
    low: float = 0.0
    high: float = 1.0
    class_low: float | None = None
    class_high: float | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for low, high in (self._interval, self._class_interval):
            if not 0 <= low <= high <= 1:
                raise ValueError(f"the guidance interval [{low}, {high}] must lie in [0, 1], low end first")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule {self.schedule!r} is none of {', '.join(SCHEDULES)}")

    @property
    def _interval(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def _class_interval(self) -> tuple[float, float]:
        low = self.low if self.class_low is None else self.class_low
        return low, self.high if self.class_high is None else self.class_high

    @property
    def off(self) -> bool:
        """No guidance at any time."""
        return self.scale == 1 and self.class_scale in (None, 1)

    def scales(self, t: float) -> State:
        """The two scales at time t, floats; (1, 1): no guidance there."""
        progress = 1 - float(t)
        weight = {"constant": 1.0, "linear": 2 * progress, "cosine": 1 - math.cos(math.pi * progress)}[self.schedule]
        class_scale = self.scale if self.class_scale is None else self.class_scale
        parts = ((self.scale, self._interval), (class_scale, self._class_interval))
        return State(*(1 + weight * (scale - 1) if low <= t <= high else 1.0 for scale, (low, high) in parts))


@dataclass
class Meter:
    """What sampling costs. evaluations: of the velocity (NFE). forwards: passes of a network for each sample; a guided
    evaluation takes two."""

    evaluations: int = 0
    forwards: int = 0


def network_velocity(
    network: nn.Module,
    label: Tensor,
    guidance: Guidance = Guidance(),
    *,
    guide: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    meter: Meter | None = None,
) -> Velocity:
    """The guided velocity of a SiT for the labels (N,) int64; the null label is the network's num_classes.

    States and the result are float64; the network reads float32 and runs in autocast to `dtype`. Where guidance is on,
    both predictions come from one batch of 2N; elsewhere an evaluation costs one batch of N. guide: a weaker network of
    the same shape whose prediction for the same label takes the place of the null label's (autoguidance, Karras et al.
    2024).
    """
    null = torch.full_like(label, network.config.num_classes)
    meter = meter or Meter()

    def predict(model: nn.Module, state: State, t: Tensor, y: Tensor) -> State:
        time = torch.full((len(y),), float(t), dtype=torch.float32, device=y.device)
        latent, class_token = state.map(lambda x: x.float())
        with torch.autocast(y.device.type, dtype, enabled=dtype != torch.float32):
            output = model(latent, time, y, class_token)
        return State(output.velocity, output.class_velocity).map(lambda x: x.double())

    def velocity(state: State, t: Tensor) -> State:
        scales = guidance.scales(float(t))
        guided = scales != (1.0, 1.0)
        meter.evaluations += 1
        meter.forwards += 2 if guided else 1
        if not guided:
            return predict(network, state, t, label)
        if guide is not None:
            good, bad = predict(network, state, t, label), predict(guide, state, t, label)
        else:
            both = predict(network, state.map(lambda x: torch.cat([x, x])), t, torch.cat([label, null]))
            good, bad = both.map(lambda x: x.chunk(2)[0]), both.map(lambda x: x.chunk(2)[1])
        return bad.map(lambda b, g, scale: b + scale * (g - b), good, scales)

    return velocity


@dataclass(frozen=True)
class Diffusion:
    """The diffusion coefficient w(t) of the reverse SDE, by name: linear 2t (published), sigma 2 sigma(t), constant 1;
    times `scale`. The marginals are the same for every w; the amount of fresh noise is not (SiT section 2.3)."""

    name: str = "linear"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in DIFFUSIONS:
            raise ValueError(f"diffusion coefficient {self.name!r} is none of {', '.join(DIFFUSIONS)}")
        if self.scale < 0:
            raise ValueError(f"the scale of the diffusion coefficient must not be negative, got {self.scale}")

    def __call__(self, t: Tensor, interpolant: Interpolant) -> Tensor:
        if self.name == "constant":
            return self.scale * torch.ones_like(t)
        return self.scale * 2 * (t if self.name == "linear" else interpolant.coefficients(t).sigma)


def ode_times(num_steps: int) -> Tensor:
    """Uniform grid from 1 to 0: (num_steps + 1,) float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int, t_last: float = T_LAST) -> Tensor:
    """The published grid: num_steps times from 1 to t_last, then 0: (num_steps + 1,) float64."""
    return torch.cat([torch.linspace(1, t_last, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def steps(times: Tensor, progress: Progress | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (t, t_next) of a grid of times; after each step, `progress` gets the fraction that is done.

    It counts on the host, without device-to-host synchronisation: on a GPU the step may still be running.
    """
    for number, pair in enumerate(pairwise(times), start=1):
        yield pair
        if progress:
            progress(number / (len(times) - 1))


def euler(velocity: Velocity, state: State, times: Tensor, progress: Progress | None = None) -> State:
    """First-order ODE solver: x + dt v. state at times[0] => state at times[-1], float64. One evaluation a step."""
    state = state.map(lambda x: x.double())
    for t, t_next in steps(times, progress):
        v = velocity(state, t)
        state = state.map(lambda x, v: x + (t_next - t) * v, v)
    return state


def heun(velocity: Velocity, state: State, times: Tensor, progress: Progress | None = None) -> State:
    """Second-order ODE solver: average the velocities at both ends of each step; the last step is Euler's.

    Two evaluations a step, one in the last: at t = 0 the network has never been trained.
    """
    state = state.map(lambda x: x.double())
    for i, (t, t_next) in enumerate(steps(times, progress)):
        dt = t_next - t
        v = velocity(state, t)
        if i < len(times) - 2:
            predicted = state.map(lambda x, v: x + dt * v, v)
            v = v.map(lambda a, b: (a + b) / 2, velocity(predicted, t_next))
        state = state.map(lambda x, v: x + dt * v, v)
    return state


def euler_maruyama(
    velocity: Velocity,
    state: State,
    times: Tensor,
    interpolant: Interpolant,
    noise: Callable[[int], State],
    diffusion: Diffusion = Diffusion(),
    last_step: str = "drift",
    progress: Progress | None = None,
) -> State:
    """Reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW (SiT eq. 5): state at times[0] => at times[-1], float64.

    noise: step number => State of standard normals. One evaluation a step. last_step: "drift" takes the drift without
    noise (published; on the linear path it subtracts w / 2 of the predicted noise from the data estimate), "ode" follows
    the velocity alone, which on the linear path gives the data estimate.
    """
    state = state.map(lambda x: x.double())
    for i, (t, t_next) in enumerate(steps(times, progress)):
        dt, w, last = t_next - t, diffusion(t, interpolant), i == len(times) - 2
        drift = velocity(state, t)
        if not last or last_step == "drift":
            drift = drift.map(lambda v, x: v - w / 2 * interpolant.score(v, x, t), state)
        state = state.map(lambda x, d: x + dt * d, drift)
        if not last:
            kick = (w * dt.abs()).sqrt()
            state = state.map(lambda x, e: x + kick * e.double(), noise(i))
    return state
