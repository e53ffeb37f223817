"""Precisions, autocast, TF32 and torch.compile by region."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from common.reporting import say
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


@contextmanager
def without_tf32() -> Iterator[None]:
    """A block of code whose float32 products are float32 on CUDA, too."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def decide_compile(asked: bool | None, device: str | torch.device, *, lengthy: bool = True) -> bool:
    """Whether networks are compiled: as asked, and if it was left open (None), on a GPU for work that makes up for the time.

    A small function is compiled, forward and backward, to see whether it can be done at all: without a C compiler, Python's
    headers or a GPU that Triton knows it cannot, and then one message says so and the networks run eagerly.

    Args:
        asked: the program's setting.
        device: where the networks run.
        lengthy: whether there is so much to do that compiling saves more time than it takes.

    Returns:
        Whether to compile; False, too, where it cannot be done.
    """
    wanted = lengthy and torch.device(device).type == "cuda" if asked is None else asked
    return wanted and _can_compile(torch.device(device).type)


@cache
def _can_compile(kind: str) -> bool:
    x = torch.ones(8, device=kind, requires_grad=True)
    try:
        torch.compile(lambda x: (x.sin() * 2).sum(), dynamic=False)(x).backward()
    except Exception as error:  # of Dynamo, Inductor, Triton or the C compiler; each has its own types
        _warn("torch.compile does not work here", error)
        return False
    return True


def _warn(what: str, error: Exception) -> None:
    """Say once per cause why something is not compiled."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    _warn_once(f"{what} ({lines[0][:200] if lines else type(error).__name__}): it runs uncompiled, which is slower")


@cache
def _warn_once(text: str) -> None:
    say(f"warning: {text}")


def _inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """Inductor as a backend of torch.compile; a graph that it cannot compile runs eagerly, after one message.

    On a GPU kernels that do not depend on each other (casts of weights, sums over biases) share a launch: "combo kernels".
    """
    from torch._inductor.compile_fx import compile_fx

    from models.fusion import Fusion

    patches: dict[str, Any] = {}
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        patches = {"combo_kernels": True, "post_grad_custom_pre_pass": Fusion()}
    try:
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):  # else it would fail in backward
            return compile_fx(graph, inputs, config_patches=patches)
    except torch._dynamo.exc.RestartAnalysis:  # no failure: Dynamo traces the region anew, with a number as a constant
        raise
    except Exception as error:
        _warn("torch.compile failed for a part of the network", error)
        return graph.forward


T = TypeVar("T", nn.Module, Callable)


def compile_region(region: T, *, dynamic: bool = False) -> T:
    """Compile a module in place, or return a compiled function; what cannot be compiled runs eagerly.

    Args:
        region: its names of parameters do not change.
        dynamic: one graph for all shapes; otherwise another shape compiles again.
    """
    # DDP needs no cut in a region: its gradients are exchanged between the backward passes of the regions. With cuts, each
    # block would be three graphs, compiled for every block anew.
    torch._dynamo.config.optimize_ddp = False
    if isinstance(region, nn.Module):
        region.compile(backend=_inductor, dynamic=dynamic)
        return region
    return torch.compile(region, backend=_inductor, dynamic=dynamic)


def compile_network(network: nn.Module, *, norm_kernel: bool = False) -> None:
    """Compile a SiT in place, by region: its embeddings, its blocks, its output layer and its projectors.

    All blocks share one compiled graph, so that compilation takes the time of one block instead of `depth` of them. It works
    below DDP and gradient checkpointing. Shapes are static: a batch of another size compiles again.

    Args:
        norm_kernel: the blocks take models/norm_kernel.py (on a GPU).
    """
    if norm_kernel:
        take_norm_kernel(network)
    network.embed = compile_region(network.embed)
    for module in (*network.blocks, network.final_layer, *network.projectors):
        compile_region(module)


def take_norm_kernel(network: nn.Module) -> None:
    """Let the blocks of a SiT take models/norm_kernel.py, and leave their last addition to the next block.

    Blocks then have three kinds of graph: with an addition of the block before to do, without, and those that do their own.
    """
    from models.norm_kernel import adaptive_norm  # needs Triton

    for block in network.blocks:
        block.norm1.kernel = block.norm2.kernel = adaptive_norm
        block.deferred = compile_region(block.deferred)
    network.deferred = True


def check_norm_kernel(width: int, precision: str, device: torch.device | None, compiled: bool | None) -> None:
    """Launch the kernels of models/norm_kernel.py once in each direction, as wide as they will be.

    Args:
        width: of the network.
        precision: "fp32", "fp16" or "bf16".
        device: None where it is not known yet: nothing is launched.
        compiled: whether the network is; None where it is not known yet.

    Raises:
        UserError: the network is not compiled on a GPU, or this GPU does not run them.
    """
    if compiled is False or (device is not None and device.type != "cuda"):
        raise UserError("--norm-kernel needs a compiled network on a GPU: leave --norm-kernel out")
    if device is None:
        return
    try:
        from models.norm_kernel import adaptive_norm

        x = torch.ones(1, 8, width, device=device, requires_grad=True)
        branch = torch.ones_like(x, dtype=DTYPES[precision])
        gate = branch[:, :1]
        with autocast(device, precision):
            total, output = adaptive_norm(x, gate, gate, gate, branch, (x, gate, branch), 1e-6)
        (total.sum() + output.sum()).backward()
    except Exception as error:  # of Triton or the driver; each has its own types
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"the kernels of --norm-kernel do not run on this GPU ({said}): leave --norm-kernel out"
        ) from error


def compile_encoder(encoder: nn.Module, *, dynamic: bool = False) -> None:
    """Compile the blocks of a VisionEncoder in place; they share one graph, too."""
    for block in getattr(encoder.vit, "blocks", ()):  # few networks of timm have none
        compile_region(block, dynamic=dynamic)
