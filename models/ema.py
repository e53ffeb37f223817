"""Exponential moving average of the weights (REG: decay 0.9999, no warm-up)."""

import torch
from torch import nn


class EMA:
    """Keeps `average`, a frozen copy of a network, with average <- decay * average + (1 - decay) * weights.

    The published rule exactly: the copy starts as the network itself, every parameter and floating-point buffer takes
    part, and there is no bias correction. torch's AveragedModel copies on its first update and so would lag by a step.
    """

    def __init__(self, network: nn.Module, average: nn.Module, decay: float = 0.9999) -> None:
        """`average`: a second network of the same config, on any device; its weights are overwritten by those of `network`.

        Raises ValueError for a decay outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay must be in [0, 1], got {decay}")
        self.decay = decay
        self.average = average.requires_grad_(False).eval()
        self.average.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """One step of the average towards `network` (the unwrapped one), as a single fused foreach lerp.

        An average on the CPU of a network on a GPU waits for the weights to arrive; else nothing waits.
        """
        averages = [_local(average) for average in self.average.state_dict(keep_vars=True).values()]
        weights = [
            _local(weight).to(average.device, average.dtype, non_blocking=True)
            for average, weight in zip(averages, network.state_dict(keep_vars=True).values(), strict=True)
        ]
        if _device(network).type == "cuda" and averages[0].device.type == "cpu":
            torch.cuda.synchronize()  # copies to the CPU are on their way until here
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @torch.no_grad()
    def distance(self, network: nn.Module) -> torch.Tensor:
        """Relative L2 distance |weights - average| / |weights| over all parameters: a scalar tensor."""
        device = _device(network)
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for p, a in zip(network.parameters(), self.average.parameters()):  # one by one: copies of all would be 12 GB at XL/2
            weight, average = _local(p).double(), _local(a).to(device, non_blocking=True).double()
            squares[0] += (weight - average).square().sum()
            squares[1] += weight.square().sum()
        if any(_local(p) is not p for p in network.parameters()):
            torch.distributed.all_reduce(squares)
        return (squares[0] / squares[1]).sqrt()


def _device(network: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(network.parameters()).device


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
