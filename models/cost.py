"""What a network costs: parameters and floating-point operations, counted on the real module without memory for it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.sit import SiT, SiTConfig


class Cost(NamedTuple):
    """parameters: trainable numbers of the network used at sampling (projectors apart). projector_parameters: of the
    alignment heads, training only. flops: multiply-adds of one forward pass for one image, without the projectors, as
    DiT counts (118.6 G for XL/2). attention_flops: the part of it in the two attention products; REG's table leaves them
    out (114.4 G). projector_flops: multiply-adds of the heads."""

    parameters: int
    projector_parameters: int
    flops: int
    attention_flops: int
    projector_flops: int

    @property
    def train_flops(self) -> int:
        """Floating-point operations (2 a multiply-add) of one training image: forward, and twice that for backward."""
        return 3 * 2 * (self.flops + self.projector_flops)


def cost(config: SiTConfig) -> Cost:
    """Count parameters and multiply-adds of a config, on the meta device."""
    bare = replace(config, align_dims=())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SiT(bare).parameters())
        total = sum(p.numel() for p in SiT(config).parameters())
        flops = _forward_macs(bare, project=False)
        total_flops = _forward_macs(config, project=True)
    attention = sum(macs for name, macs in flops.items() if "attention" in name or "bmm" in name)
    return Cost(
        parameters, total - parameters, sum(flops.values()), attention, sum(total_flops.values()) - sum(flops.values())
    )


def _forward_macs(config: SiTConfig, *, project: bool) -> dict[str, int]:
    """Multiply-adds of one image by operator name."""
    network = SiT(config).eval()
    x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
    token = torch.empty(1, config.class_token_dim) if config.class_token_dim else None
    with FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), token, project=project)
    return {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}
