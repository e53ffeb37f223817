"""Precisions, autocast, TF32 and torch.compile by region."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from config import UserError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_precision(device: str | torch.device) -> str:
    """The fastest of "bf16", "fp16" and "fp32" that loses nothing on this device: bf16 needs no loss scaling."""
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: str | torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision for a block of code; "fp32" changes nothing.

    Raises:
        UserError: the precision is none of fp32, fp16 and bf16.
    """
    if precision == "fp32":
        return nullcontext()
    if precision not in DTYPES:
        raise UserError(f"mixed precision {precision!r} is none of fp32, fp16, bf16")
    return torch.autocast(torch.device(device).type, dtype=DTYPES[precision])


def allow_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions on CUDA use TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def compile_network(network: nn.Module) -> None:
    """Compile a SiT in place, by region: its blocks, its output layer and its projectors.

    All blocks share one compiled graph, so that compilation takes the time of one block instead of `depth` of them. Names
    of parameters do not change, and it works below DDP and gradient checkpointing. Shapes are static: a batch of another
    size compiles again.
    """
    for module in (*network.blocks, network.final_layer, *network.projectors):
        module.compile(dynamic=False)


def compile_encoder(encoder: nn.Module) -> None:
    """Compile the blocks of a VisionEncoder in place; they share one graph, too."""
    for block in encoder.vit.blocks:
        block.compile(dynamic=False)
