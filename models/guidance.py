"""Classifier-free guidance: turns a network into a guided velocity; solvers call it without knowing about guidance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import UserError
from models.state import State

Velocity = Callable[[State, Tensor], State]  # (state, t), t a scalar float64 tensor, => dx/dt


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v_null + s (v_label - v_null) while low <= t <= high (Ho & Salimans 2022; interval:
    Kynkaanniemi et al. 2024); s = 1 switches it off.

    Guiding the velocity equals guiding the drift of the SDE, because the drift is affine in the velocity. class_scale,
    class_low and class_high belong to the class token; None: the same as the latent's.
    """

    scale: float = 1.0
    class_scale: float | None = None
    low: float = 0.0
    high: float = 1.0
    class_low: float | None = None
    class_high: float | None = None

    def __post_init__(self) -> None:
        for low, high in ((self.low, self.high), self._class_interval):
            if not 0 <= low <= high <= 1:
                raise UserError(f"the guidance interval [{low}, {high}] must lie in [0, 1], low end first")

    @property
    def _class_interval(self) -> tuple[float, float]:
        low = self.low if self.class_low is None else self.class_low
        return low, self.high if self.class_high is None else self.class_high

    @property
    def off(self) -> bool:
        """Whether nothing is guided at any time."""
        return self.scale == 1 and self.class_scale in (None, 1)

    def scales(self, t: float) -> tuple[float, float]:
        """The scales of latent and class token at time t; (1, 1) outside of both intervals."""
        class_low, class_high = self._class_interval
        class_scale = self.scale if self.class_scale is None else self.class_scale
        return self.scale if self.low <= t <= self.high else 1.0, class_scale if class_low <= t <= class_high else 1.0


@dataclass
class Meter:
    """What sampling costs: evaluations of the velocity (NFE), and forward passes of a network per sample, of which a guided
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
    """The velocity of a SiT under classifier-free guidance (Ho & Salimans 2022); the null class is num_classes.

    States and the result are float64; the network reads float32 and runs in autocast to `dtype`. Where guidance is on,
    both predictions come from one batch of 2N; elsewhere an evaluation costs one batch of N.

    Args:
        network: a SiT in eval mode, compiled or not.
        label: (N,) int64, on the device of the states.
        guidance: scales and intervals.
        guide: a weaker network of the same shape; its prediction for the same label takes the place of the null class's
            (autoguidance, Karras et al. 2024).
        dtype: of the network's arithmetic.
        meter: counts what is spent.

    Returns:
        A function (State, t) => State.
    """
    null = torch.full_like(label, network.config.num_classes)
    meter = meter or Meter()

    def predict(model: nn.Module, state: State, t: Tensor, y: Tensor) -> State:
        time = torch.full((len(y),), float(t), dtype=torch.float32, device=y.device)
        seen = state.map(lambda x: x.float())
        with torch.autocast(y.device.type, dtype, enabled=dtype != torch.float32):
            output = model(seen.latent, time, y, seen.class_token)
        return State(output.velocity, output.class_velocity).double()

    def velocity(state: State, t: Tensor) -> State:
        scale, class_scale = guidance.scales(float(t))
        meter.evaluations += 1
        if scale == class_scale == 1:
            meter.forwards += 1
            return predict(network, state, t, label)
        meter.forwards += 2
        if guide is None:
            both = predict(network, state.map(lambda x: torch.cat([x, x])), t, torch.cat([label, null]))
            good, bad = both.map(lambda x: x.chunk(2)[0]), both.map(lambda x: x.chunk(2)[1])
        else:
            good, bad = predict(network, state, t, label), predict(guide, state, t, label)
        return bad + (good - bad).scaled(scale, class_scale)

    return velocity
