"""Solvers of the probability-flow ODE and of the reverse SDE, and guidance (REG appendix; SiT section 2).

A velocity function takes (state, t), t a scalar float64 tensor, and returns a State. Solvers are free functions of such
a function, a State and a decreasing grid of times; they do not know about guidance. Guiding the velocity equals guiding
the drift of the SDE, because the drift is affine in the velocity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.interpolant import Interpolant
from models.state import State

Velocity = Callable[[State, Tensor], State]

T_LAST = 0.04  # the published SDE grid ends here and then jumps to 0 without noise


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v_null + scale * (v_label - v_null) while low <= t <= high; scale 1 is no guidance.

    class_scale is the scale of the class token, None: the same as the latent's.
    """

    scale: float = 1.0
    class_scale: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"the guidance interval [{self.low}, {self.high}] must lie in [0, 1], low end first")

    @property
    def scales(self) -> State:
        return State(self.scale, self.scale if self.class_scale is None else self.class_scale)

    def active(self, t: Tensor) -> bool:
        return self.scales != (1.0, 1.0) and self.low <= float(t) <= self.high


def network_velocity(network: nn.Module, label: Tensor, guidance: Guidance = Guidance()) -> Velocity:
    """The guided velocity of a SiT for the labels (N,) int64; the null label is the network's num_classes.

    The network runs in float32 (or in what autocast makes of it); states and the result are float64. Inside the
    interval both predictions come from one batch of 2N, outside it costs one batch of N.
    """
    null = torch.full_like(label, network.config.num_classes)

    def velocity(state: State, t: Tensor) -> State:
        guided = guidance.active(t)
        if guided:
            state = state.map(lambda x: torch.cat([x, x]))
        y = torch.cat([label, null]) if guided else label
        time = t.float().expand(len(y))
        latent, class_token = state.map(lambda x: x.float())
        output = network(latent, time, y, class_token)
        v = State(output.velocity, output.class_velocity).map(lambda x: x.double())
        if not guided:
            return v
        conditional, unconditional = v.map(lambda x: x.chunk(2)[0]), v.map(lambda x: x.chunk(2)[1])
        return unconditional.map(lambda u, c, scale: u + scale * (c - u), conditional, guidance.scales)

    return velocity


def ode_times(num_steps: int) -> Tensor:
    """Uniform grid from 1 to 0: (num_steps + 1,) float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def sde_times(num_steps: int, t_last: float = T_LAST) -> Tensor:
    """The published grid: num_steps times from 1 to t_last, then 0: (num_steps + 1,) float64."""
    return torch.cat([torch.linspace(1, t_last, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def euler(velocity: Velocity, state: State, times: Tensor) -> State:
    """First-order ODE solver: x + dt v. state at times[0] => state at times[-1], float64. One evaluation a step."""
    state = state.map(lambda x: x.double())
    for t, t_next in pairwise(times):
        v = velocity(state, t)
        state = state.map(lambda x, v: x + (t_next - t) * v, v)
    return state


def heun(velocity: Velocity, state: State, times: Tensor) -> State:
    """Second-order ODE solver: average the velocities at both ends of each step; the last step is Euler's.

    Two evaluations a step, one in the last: at t = 0 the network has never been trained.
    """
    state = state.map(lambda x: x.double())
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt = t_next - t
        v = velocity(state, t)
        if i < len(times) - 2:
            predicted = state.map(lambda x, v: x + dt * v, v)
            v = v.map(lambda a, b: (a + b) / 2, velocity(predicted, t_next))
        state = state.map(lambda x, v: x + dt * v, v)
    return state


def euler_maruyama(
    velocity: Velocity, state: State, times: Tensor, interpolant: Interpolant, noise: Callable[[int], State]
) -> State:
    """Reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW with w = 2t (SiT eq. 5): state at times[0] => at times[-1].

    noise: step number => State of standard normals. The last step takes the drift only. One evaluation a step.
    """
    state = state.map(lambda x: x.double())
    for i, (t, t_next) in enumerate(pairwise(times)):
        dt, w = t_next - t, 2 * t
        v = velocity(state, t)
        drift = v.map(lambda v, x: v - w / 2 * interpolant.score(v, x, t), state)
        state = state.map(lambda x, d: x + dt * d, drift)
        if i < len(times) - 2:
            kick = (w * dt.abs()).sqrt()
            state = state.map(lambda x, e: x + kick * e.double(), noise(i))
    return state
