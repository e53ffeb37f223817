"""Exponential moving average (EMA) of the weights."""

import torch
from torch import Tensor, nn

from config import UserError


class EMA:
    """Keeps `average`, a frozen copy of a network, with average <- decay * average + (1 - decay) * weights.

    The rule of the published code (REG, REPA and SiT; decay 0.9999): the copy starts as the network itself, every parameter
    and floating-point buffer takes part, and there is neither warm-up nor bias correction. torch's AveragedModel copies on
    its first update and so would lag by a step. With `warmup` the decay of step t is at most (1 + t) / (10 + t), as in
    TensorFlow's ExponentialMovingAverage: an average of 0.9999 still holds nine tenths of its start after 1,000 steps.
    """

    def __init__(self, network: nn.Module, average: nn.Module, decay: float = 0.9999, *, warmup: bool = False) -> None:
        """Copy the weights of `network` into `average`.

        Args:
            network: whose weights are averaged.
            average: a second network of the same config and device; frozen from now on.
            decay: share of the average that stays at each update.
            warmup: begin with a smaller decay.

        Raises:
            UserError: the decay is outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise UserError(f"EMA decay must be in [0, 1], got {decay}")
        self.decay, self.warmup = decay, warmup
        self.average = average.requires_grad_(False).eval()
        self.average.load_state_dict(network.state_dict())
        self._lists: tuple[nn.Module, list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, network: nn.Module, step: int | Tensor = 0) -> None:
        """Step `step` of the average towards `network` (the unwrapped one), as a single fused foreach lerp.

        The tensors of both are listed at the first update: later they may be written to, but not moved or replaced.

        Args:
            network: whose weights are averaged.
            step: counted from 0; a tensor (1,) int64 in a CUDA graph, which sees the number that it holds at each replay.
        """
        if self._lists is None or self._lists[0] is not network:
            averages, weights = (list(m.state_dict(keep_vars=True).values()) for m in (self.average, network))
            self._lists = network, averages, weights
        _, averages, weights = self._lists
        if self.warmup and isinstance(step, Tensor):
            number = step.double().view(())
            share = (1 - ((1 + number) / (10 + number)).clamp(max=self.decay)).float()
            torch._foreach_lerp_(averages, weights, [share] * len(averages))
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def distance(self, network: nn.Module) -> Tensor:
        """Relative L2 distance |weights - average| / |weights| over all parameters: a scalar tensor."""
        squares = torch.zeros(2, dtype=torch.float64, device=next(network.parameters()).device)
        # one by one: float64 copies of all of them would be 12 GB at XL/2
        for p, a in zip(network.parameters(), self.average.parameters()):
            squares[0] += (p.double() - a.double()).square().sum()
            squares[1] += p.double().square().sum()
        return (squares[0] / squares[1]).sqrt()
