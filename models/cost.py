"""Parameters, operations and memory of a network, counted on the real module without allocating it; roofline of a step."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.encoder import VisionEncoder, load_encoder
from models.sit import SiT, SiTConfig


class Cost(NamedTuple):
    """Size and work of a network.

    Attributes:
        parameters: trainable numbers of the network used at sampling (projectors apart).
        projector_parameters: of the alignment heads, training only.
        flops: multiply-adds of one forward pass for one image, without the projectors, as DiT counts (118.6 G for XL/2).
        attention_flops: the part of it in the two attention products, which REG's table leaves out (114.4 G).
        projector_flops: multiply-adds of the heads.
    """

    parameters: int
    projector_parameters: int
    flops: int
    attention_flops: int
    projector_flops: int

    @property
    def train_flops(self) -> int:
        """Floating-point operations (2 per multiply-add) of one training image: forward, and twice that for backward."""
        return 3 * 2 * (self.flops + self.projector_flops)


@cache
def cost(config: SiTConfig) -> Cost:
    """Count parameters and multiply-adds of a config, on the meta device."""
    bare = replace(config, align_dims=())
    parameters, flops, attention = _by_depth(_count, bare)
    total, total_flops, _ = _by_depth(_count, config)
    return Cost(parameters, total - parameters, flops, attention, total_flops - flops)


class Gpu(NamedTuple):
    """Data sheet of a GPU.

    Attributes:
        tflops: dense matrix products in bf16 (fp16 where there is none), summed in float32.
        bandwidth: of the memory, TB/s.
        memory: GiB, without what error correction takes.
        rent: assumed dollars per hour; rents differ by provider and year.
        bf16: whether it has bf16 and TF32 (Ampere and later).
    """

    tflops: float
    bandwidth: float
    memory: float
    rent: float
    bf16: bool = True


GPUS = {
    "T4": Gpu(65, 0.32, 15, 0.2, bf16=False),
    "V100": Gpu(125, 0.9, 32, 0.5, bf16=False),
    "RTX3090": Gpu(71, 0.936, 24, 0.25),
    "RTX4090": Gpu(165, 1.01, 24, 0.5),
    "RTX5090": Gpu(209, 1.79, 32, 0.7),
    "A10": Gpu(125, 0.6, 22.5, 0.6),
    "L4": Gpu(121, 0.3, 22.5, 0.6),
    "A6000": Gpu(155, 0.768, 48, 0.6),
    "L40S": Gpu(362, 0.86, 48, 1.0),
    "A100": Gpu(312, 2.04, 80, 1.5),
    "H100": Gpu(989, 3.35, 80, 2.5),
    "H200": Gpu(989, 4.8, 141, 3.5),
    "B200": Gpu(2250, 8.0, 180, 5.5),
}
USABLE = 0.93  # share of a GPU's memory for tensors; the CUDA context and the allocator's slack take the rest


def named_gpu(name: str) -> str | None:
    """The key in GPUS of a device name such as "NVIDIA GeForce RTX 4090", in capitals or not; None for another GPU."""
    for key in GPUS:
        word = re.sub(r"(?<=[A-Z])(?=\d)", "[ _-]?", key)  # "RTX 4090" is RTX4090; neither "A100" nor "A10G" is an A10
        if re.search(rf"{word}(?!\w)", name, re.IGNORECASE):
            return key
    return None


# Predictions rest on these, measured on one H200 with torch 2.11 (benchmarks/results/*-gpu-*.json), on a compiled step of
# XL/2 with 256 images unless it says otherwise. Shares are of the data sheet; other GPUs are assumed to reach the same.
REACHED = 0.795  # of the rate of matrix products: 786 TFLOP/s at 8192^3
SHORT = 89  # a product over K reaches K / (K + SHORT) of that: those over 1,152 took 246 ms, 730 TFLOP/s
# Of the rate of matrix products, attention with heads of up to 64 (B/2: 1.87 TFLOP in 16.2 ms), and with wider ones, of 72
# (6.5 TFLOP in 72 to 73 ms), which tiles pad; they pad the 257 tokens of both:
ATTENTION = (0.117, 0.092)
BANDWIDTH = 0.60  # of the memory's: 334 GB in 116 ms; a copy reaches 0.86
GAP = 2.5e-6  # seconds between two kernels: 3 ms
HOST = (
    2.9  # seconds of that machine's host for one that benchmarks.count counts: B/2 with 32 images, eager and compiled
)
LAUNCHING = (2.0e-3, 9.4e-3)  # seconds of that host for each block, and besides: B/2 with 32 images, divided as counted
# Counted by `python -m benchmarks.count` on compiled steps of XL/2 and B/2 at two batch sizes each, bytes:
TOKEN_BYTES = 143.5  # of elementwise traffic for each token, unit of width and block, forward and backward
FORWARD_BYTES = 42  # of it in the forward pass, which gradient checkpointing repeats
PROJECTOR_BYTES = 44  # for each token and hidden unit of a projector
WEIGHT_BYTES = 34  # for each parameter: AdamW, EMA, norm, half-precision copy
ENCODER_BYTES = 0.0045  # for each multiply-add of a ViT-B that runs in the step
ENCODER_ATTENTION = 0.052  # share of attention in them
LAUNCHES = (38, 110)  # kernels for each block, and besides


class StepCost(NamedTuple):
    """One compiled training step of one process, predicted.

    Attributes:
        network_flops: floating-point operations of the network.
        encoder_flops: of the encoders.
        traffic: bytes that elementwise operations, optimiser and EMA move.
        compute: seconds of matrix products and attention.
        memory: seconds of the traffic.
        gaps: seconds between kernels.
        host: seconds that the host takes to launch them.
    """

    network_flops: int
    encoder_flops: int
    traffic: int
    compute: float
    memory: float
    gaps: float
    host: float

    @property
    def floor(self) -> float:
        """Seconds if memory traffic and matrix products overlapped entirely: no step is faster."""
        return max(self.compute, self.memory)

    @property
    def expected(self) -> float:
        """Seconds as kernels run one after the other; where launching takes the host longer, the host decides."""
        return max(self.host, self.device)

    @property
    def device(self) -> float:
        """Seconds of the kernels, which is what a CUDA graph takes."""
        return self.compute + self.memory + self.gaps


def step_cost(config: SiTConfig, batch: int, gpu: Gpu, *, encoder_macs: int = 0, recompute: bool = False) -> StepCost:
    """Predict a compiled training step on one GPU, in half precision over float32 weights.

    Args:
        config: of the network.
        batch: images.
        gpu: its rates.
        encoder_macs: multiply-adds per image of the encoders that run in the step.
        recompute: gradient checkpointing, which runs each block's forward pass twice.
    """
    c = cost(config)
    network = batch * (c.train_flops + (2 * c.flops if recompute else 0))
    passes = 2 if recompute else 1  # forward
    encoder = batch * 2 * encoder_macs
    attention = batch * (4 + 2 * passes) * c.attention_flops + ENCODER_ATTENTION * encoder
    tokens = batch * config.num_tokens
    block_bytes = TOKEN_BYTES + (FORWARD_BYTES if recompute else 0)
    hidden = config.projector_dim * len(config.align_dims)
    elementwise = int(tokens * (block_bytes * config.hidden_size * config.depth + PROJECTOR_BYTES * hidden))
    encoding = int(batch * ENCODER_BYTES * encoder_macs)
    traffic = elementwise + encoding + WEIGHT_BYTES * (c.parameters + c.projector_parameters)
    kernels, host = (passes * block * config.depth + besides for block, besides in (LAUNCHES, LAUNCHING))
    return StepCost(
        network,
        encoder,
        traffic,
        product_seconds(network + encoder - attention, attention, config, gpu),
        traffic / (BANDWIDTH * gpu.bandwidth * 1e12),
        GAP * kernels,
        host,
    )


def product_seconds(flops: float, attention_flops: float, config: SiTConfig, gpu: Gpu) -> float:
    """Predicted seconds of matrix products over the width of a network and of attention, forward and backward."""
    rate, width = gpu.tflops * 1e12, config.hidden_size
    attention = ATTENTION[width > 64 * config.num_heads]
    return flops / (REACHED * width / (width + SHORT) * rate) + attention_flops / (attention * rate)


def counted_seconds(
    config: SiTConfig, batch: int, gpu: Gpu, *, traffic: float, launches: float, host: float, encoder_macs: int = 0
) -> float:
    """Predicted seconds of a step whose traffic (bytes), launches and host time (seconds) were counted.

    `encoder_macs` as for `step_cost`. The device runs one kernel after the other; where launching takes the host longer than
    that, the host decides. With a host of 0 seconds: as a CUDA graph.
    """
    c = cost(config)
    encoder = batch * 2 * encoder_macs
    attention = batch * 6 * c.attention_flops + ENCODER_ATTENTION * encoder
    flops = batch * c.train_flops + encoder
    products = product_seconds(flops - attention, attention, config, gpu)
    return max(HOST * host, products + traffic / (BANDWIDTH * gpu.bandwidth * 1e12) + GAP * launches)


class TrainingMemory(NamedTuple):
    """Bytes that a training step needs.

    Attributes:
        state: weights, gradients, AdamW and EMA in float32.
        copies: half-precision weights kept for the backward pass.
        activations: kept for the backward pass, of one image.
    """

    state: int
    copies: int
    activations: int

    def total(self, batch: int) -> int:
        """Bytes with `batch` images on one GPU, without encoders, allocator slack and the CUDA context."""
        return self.state + self.copies + batch * self.activations


def training_memory(config: SiTConfig, *, half: bool = True, recompute: bool = False) -> TrainingMemory:
    """Count what the backward pass keeps, on fake tensors, as an eager step does; a compiled one keeps less.

    Args:
        config: of the network.
        half: fp16 or bf16 by autocast.
        recompute: gradient checkpointing, which keeps the input of each block and recomputes one block at a time.
    """
    c = cost(config)
    state = (c.parameters + c.projector_parameters) * (4 + 4 + 8 + 4)
    two, three = (_by_depth(partial(_kept_bytes, n=n, half=half), config)[0] for n in (2, 3))
    activations, copies = three - two, max(0, 3 * two - 2 * three)
    if recompute:
        one_block = replace(config, depth=1, align_depth=1)
        inside = _kept_bytes(one_block, n=3, half=half)[0] - _kept_bytes(one_block, n=2, half=half)[0]
        activations = inside + config.depth * config.num_tokens * config.hidden_size * 4
    return TrainingMemory(state, copies, activations)


def encoder_macs(name: str, grid: int) -> int:
    """Multiply-adds of a vision encoder (published or timm name) for one image on a grid x grid of patches."""
    return vit_macs(load_encoder(name, grid, weights=False))


def vit_macs(encoder: VisionEncoder) -> int:
    """Multiply-adds of an encoder without weights (`load_encoder(..., weights=False)`) for one image; none is computed."""
    with FlopCounterMode(display=False) as counter:
        encoder.vit.forward_features(torch.empty(1, 3, encoder.input_size, encoder.input_size, device="meta"))
    return counter.get_total_flops() // 2


def _inputs(config: SiTConfig, n: int) -> tuple[Tensor, ...]:
    """Empty x, t, y and, where there is a slot for it, the class token."""
    x = torch.empty(n, config.in_channels, config.input_size, config.input_size)
    token = (torch.empty(n, config.class_token_dim),) if config.class_token_dim else ()
    return (x, torch.zeros(n), torch.zeros(n, dtype=torch.long), *token)


def _by_depth(count: Callable[[SiTConfig], tuple[int, ...]], config: SiTConfig) -> tuple[int, ...]:
    """`count(config)`, from its values at one and two blocks: blocks are alike, and 28 of them take a second to trace."""
    one, two = (count(replace(config, depth=depth, align_depth=1)) for depth in (1, 2))
    return tuple(a + (config.depth - 1) * (b - a) for a, b in zip(one, two))


def _count(config: SiTConfig) -> tuple[int, int, int]:
    """Parameters, multiply-adds of one image, and those of them in the attention products."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = SiT(config).eval()
        network(*_inputs(config, 1), project=bool(config.align_dims))
    macs = {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in macs.items() if "attention" in name or "bmm" in name)
    return sum(p.numel() for p in network.parameters()), sum(macs.values()), attention


@cache
def _kept_bytes(config: SiTConfig, *, n: int, half: bool) -> tuple[int]:
    """Bytes that a forward pass of n images keeps for its backward pass, parameters apart; in a tuple for `_by_depth`."""
    with FakeTensorMode():
        network = SiT(config).train()
        own = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                output = network(*_inputs(config, n), project=bool(config.align_dims))
        del output
        return (sum(storage.nbytes() for storage in kept.values()),)
