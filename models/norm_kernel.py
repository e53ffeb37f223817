"""Residual addition, layer norm and modulation as one operation with one kernel for each direction (Triton).

total = x + gate * branch;  normalised = layer_norm(total);  output = normalised * (1 + scale) + shift

Inductor makes several passes of the backward pass: the layer norm sums along rows, shift, scale, gate and the branch's bias
along columns, and no loop of it does both. The kernel does: each program walks down some tokens of one sample, with a row in
registers and the sums over columns beside it, and so each gradient is read and written once. In the forward pass Inductor
reads rows of more than 1,024 numbers twice, and reaches 1.5 to 2.5 TB/s on an H200, where other kernels of it reach 3 to 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # at least, where there are tokens enough: a few for each multiprocessor
FEWEST = 8  # tokens of a program
WARPS, STAGES = 4, 3  # the fastest on an H200 by benchmarks.block: loads run two rows ahead


@triton.jit
def _norm_forward(
    x,
    shift,
    scale,
    gate,
    branch,
    first_gate,
    first_branch,
    total,
    output,
    mean,
    rstd,
    tokens,
    shift_stride,
    scale_stride,
    gate_stride,
    first_stride,
    eps,
    width: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    begin, sample = tl.program_id(0) * rows, tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < width
    factor = tl.load(scale + sample * scale_stride + columns, inside, 0).to(tl.float32) + 1
    added = tl.load(shift + sample * shift_stride + columns, inside, 0).to(tl.float32)
    if gate is not None:
        opened = tl.load(gate + sample * gate_stride + columns, inside, 0).to(tl.float32)
    if first_gate is not None:
        first_opened = tl.load(first_gate + sample * first_stride + columns, inside, 0).to(tl.float32)
    for token in tl.range(begin, tl.minimum(begin + rows, tokens), num_stages=stages):
        row = sample.to(tl.int64) * tokens + token
        at = row * width + columns
        value = tl.load(x + at, inside, 0).to(tl.float32)
        if first_gate is not None:
            value += first_opened * tl.load(first_branch + at, inside, 0).to(tl.float32)
        if gate is not None:
            value += opened * tl.load(branch + at, inside, 0).to(tl.float32)
        if total is not None:
            tl.store(total + at, value, inside)
        average = tl.sum(value) / width
        centred = tl.where(inside, value - average, 0)
        deviation = 1 / tl.sqrt(tl.sum(centred * centred) / width + eps)
        tl.store(output + at, centred * deviation * factor + added, inside)
        tl.store(mean + row, average)
        tl.store(rstd + row, deviation)


@triton.jit
def _norm_backward(
    d_total,
    d_output,
    x,
    scale,
    gate,
    branch,
    first_gate,
    first_branch,
    mean,
    rstd,
    d_x,
    d_branch,
    sums,
    tokens,
    scale_stride,
    gate_stride,
    first_stride,
    width: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    gated: tl.constexpr,
    stages: tl.constexpr,
):
    part, parts = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < width
    factor = tl.load(scale + sample * scale_stride + columns, inside, 0).to(tl.float32) + 1
    shift_sum = tl.zeros([block], tl.float32)
    scale_sum = tl.zeros([block], tl.float32)
    if gated:
        opened = tl.load(gate + sample * gate_stride + columns, inside, 0).to(tl.float32)
        gate_sum = tl.zeros([block], tl.float32)
        bias_sum = tl.zeros([block], tl.float32)
    if first_branch is not None:
        first_opened = tl.load(first_gate + sample * first_stride + columns, inside, 0).to(tl.float32)
    begin = part * rows
    for token in tl.range(begin, tl.minimum(begin + rows, tokens), num_stages=stages):
        row = sample.to(tl.int64) * tokens + token
        at = row * width + columns
        d_row = tl.load(d_output + at, inside, 0).to(tl.float32)
        value = tl.load(x + at, inside, 0).to(tl.float32)
        if first_branch is not None:
            value += first_opened * tl.load(first_branch + at, inside, 0).to(tl.float32)
        if gated:
            added = tl.load(branch + at, inside, 0).to(tl.float32)
            value += opened * added
        deviation = tl.load(rstd + row)
        normalised = tl.where(inside, (value - tl.load(mean + row)) * deviation, 0)
        d_normalised = d_row * factor
        along = tl.sum(d_normalised) / width
        across = tl.sum(d_normalised * normalised) / width
        result = tl.load(d_total + at, inside, 0).to(tl.float32)
        result += deviation * (d_normalised - along - normalised * across)
        tl.store(d_x + at, result, inside)
        shift_sum += d_row
        scale_sum += d_row * normalised
        if gated:
            d_added = (result * opened).to(d_branch.dtype.element_ty)
            tl.store(d_branch + at, d_added, inside)
            gate_sum += tl.where(inside, result * added, 0)
            bias_sum += d_added.to(tl.float32)
    out = sums + (sample * parts + part) * (4 if gated else 2) * width + columns
    tl.store(out, shift_sum, inside)
    tl.store(out + width, scale_sum, inside)
    if gated:
        tl.store(out + 2 * width, gate_sum, inside)
        tl.store(out + 3 * width, bias_sum, inside)


def _parts(n: int, tokens: int) -> tuple[int, int]:
    """How many programs share a sample's tokens, and how many tokens each of them has."""
    parts = min(-(-PROGRAMS // n), -(-tokens // FEWEST))
    return parts, -(-tokens // parts)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    first_gate: Tensor | None,
    first_branch: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The sum (N, T, D), if it is to be kept, and it normalised and modulated; mean and 1 / standard deviation (N, T, 1).

    Args:
        x: (N, T, D); arguments besides as of `backward`.
        shift: (N, 1, D).
        scale: (N, 1, D).
        gate: (N, 1, D) or None.
        branch: (N, T, D) or None.
        first_gate: (N, 1, D) or None.
        first_branch: (N, T, D) or None.
        eps: of the layer norm.
        dtype: of the output.
        keep: whether the sum is written.
    """
    n, tokens, width = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty((n, tokens, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    parts, rows = _parts(n, tokens)
    _norm_forward[(parts, n)](
        _dense(x),
        shift,
        scale,
        gate,
        _dense(branch),
        first_gate,
        _dense(first_branch),
        total,
        output,
        mean,
        rstd,
        tokens,
        _stride(shift),
        _stride(scale),
        _stride(gate),
        _stride(first_gate),
        eps,
        width,
        rows,
        triton.next_power_of_2(width),
        STAGES,
        num_warps=WARPS,
    )
    return total, output, mean, rstd


def backward(
    d_total: Tensor,
    d_output: Tensor,
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    first_gate: Tensor | None,
    first_branch: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x and branch from those of the sum and the output, and sums over tokens of four others.

    Args:
        d_total: (N, T, D), the gradient of the sum x + gate * branch.
        d_output: (N, T, D), of what is normalised and modulated.
        x: (N, T, D).
        scale: (N, 1, D).
        gate: (N, 1, D); None without a branch.
        branch: (N, T, D).
        first_gate: (N, 1, D), of another branch, which x still lacks; None without one.
        first_branch: (N, T, D).
        mean: (N, T, 1), of the sum.
        rstd: (N, T, 1), 1 / its standard deviation.

    Returns:
        The gradients of x and of branch, and (N, parts, 2 or 4, D) float32: those of shift, scale and, with a branch, gate
        and the branch's bias, each summed over one part of a sample's tokens.
    """
    n, tokens, width = x.shape
    gated = gate is not None
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=x.device) if branch is not None else None
    parts, rows = _parts(n, tokens)
    sums = torch.empty((n, parts, 4 if gated else 2, width), dtype=torch.float32, device=x.device)
    _norm_backward[(parts, n)](
        _dense(d_total),
        _dense(d_output),
        _dense(x),
        scale,
        gate,
        _dense(branch),
        first_gate,
        _dense(first_branch),
        mean,
        rstd,
        d_x,
        d_branch,
        sums,
        tokens,
        _stride(scale),
        _stride(gate),
        _stride(first_gate),
        width,
        rows,
        triton.next_power_of_2(width),
        gated,
        STAGES,
        num_warps=WARPS,
    )
    return d_x, d_branch, sums


class _AdaptiveNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor | None,
        branch: Tensor | None,
        first: Tensor,
        first_gate: Tensor | None,
        first_branch: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        total, output, mean, rstd = forward(
            first, shift, scale, gate, branch, first_gate, first_branch, eps, dtype, keep
        )
        if total is None:  # left to those who need it
            total = x.view_as(x) if gate is None else x + gate * branch
        ctx.save_for_backward(scale, gate, branch, first, first_gate, first_branch, mean, rstd)
        return total, output

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_output: Tensor) -> tuple[Tensor | None, ...]:
        scale, gate, branch, x, first_gate, first_branch, mean, rstd = ctx.saved_tensors
        d_x, d_branch, sums = backward(d_total, d_output, x, scale, gate, branch, first_gate, first_branch, mean, rstd)
        sums = sums.sum(1, keepdim=True).to(scale.dtype)  # (N, 1, 2 or 4, D)
        d_gate = None if gate is None else sums[:, :, 2]
        return d_x, sums[:, :, 0], sums[:, :, 1], d_gate, d_branch, None, None, None, None, None, None


def adaptive_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    parts: tuple[Tensor | None, ...],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum x + gate * branch (N, T, D), and that normalised and modulated, in the type that autocast gives it next.

    Args:
        x: (N, T, D).
        shift: (N, 1, D), like scale and gate.
        scale: of the normalised sum, less 1.
        gate: None without a branch.
        branch: (N, T, D).
        parts: a stream, gate and branch of which x is the sum; kept for the backward pass instead of x.
        eps: of the layer norm.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    kept = [None if part is None else part.detach() for part in parts or (x, None, None)]
    return _AdaptiveNorm.apply(x, shift, scale, gate, branch, *kept, eps, dtype, len(parts) > 0)
