"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").

Every draw of training and sampling is a function of (seed, purpose, step, index) and not of a generator's state: the
same sample gets the same noise on any number of GPUs, at any batch size, and after any interruption. torch.Generator
cannot give each row of a batch a stream of its own without a loop; here a batch is a few dozen tensor operations.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of four 32-bit words for each counter (Salmon et al. 2011, Philox4x32 with 10 rounds).

    Args:
        counter: four int64 tensors that broadcast against each other, each value in [0, 2**32).
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of the 64-bit product of x < 2**32 and m < 2**32, in wrapping int64."""
    product = x * m
    return (product >> 32) & _MASK, product & _MASK


def block_numbers(count: int, device: torch.device) -> Tensor:
    """The blocks of `count` numbers, 0, 1, 2 ... as int64; see `normals`."""
    return torch.arange(-(-count // 4), device=device)


def _words(
    seed: int, purpose: int, steps: Sequence[int] | Tensor, index: Tensor, count: int, blocks: Tensor | None
) -> tuple[Tensor, ...]:
    """Four (S, N, count / 4) word tensors for the samples `index` (N,) int64; counter: (block, purpose, index, step).

    The counters broadcast, so that the first two rounds run on tensors of one or two of the three axes.
    """
    if not isinstance(steps, Tensor):
        if min(steps) < 0 or max(steps) > _MASK:
            raise ValueError(f"step must be in [0, 2**32), got {min(steps)} to {max(steps)}")
        steps = torch.tensor(list(steps), dtype=torch.int64).to(index.device, non_blocking=True)
    blocks = block_numbers(count, index.device) if blocks is None else blocks[: -(-count // 4)]
    block, step = blocks[None, None, :], steps[:, None, None]
    return philox4x32((block, torch.full_like(block, purpose), index[None, :, None], step), seed)


def normals(
    seed: int,
    purpose: int,
    steps: Sequence[int] | Tensor,
    index: Tensor,
    count: int,
    blocks: Tensor | None = None,
) -> Tensor:
    """Standard normal numbers, one row for each step and sample; on a GPU several steps cost hardly more than one.

    Box-Muller in float64, so that rounding to float32 hides the last-bit differences between scalar and vector code.

    Args:
        seed: the 64-bit key.
        purpose: the stream; see `models.noise.Stream`.
        steps: S step numbers in [0, 2**32), or an int64 tensor (S,) of them on the device.
        index: (N,) int64, the samples' global numbers, each in [0, 2**32).
        count: numbers per row.
        blocks: `block_numbers` of at least `count`, made once. A compiled caller has to give it, because Inductor holds an
            arange of its own in 32 bits; with `steps` as a tensor it is compiled once for all steps.

    Returns:
        (S, N, count) float32.
    """
    w0, w1, w2, w3 = _words(seed, purpose, steps, index, count, blocks)
    pairs = []
    for a, b in ((w0, w1), (w2, w3)):
        radius = _open_unit(a).log_().mul_(-2).sqrt_()
        angle = _open_unit(b).mul_(2 * math.pi)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack([x.float() for x in pairs], dim=-1).flatten(2)[:, :, :count]


def normal(
    seed: int, purpose: int, step: int | Tensor, index: Tensor, count: int, blocks: Tensor | None = None
) -> Tensor:
    """Standard normal numbers of one step, a number or (1,) int64: index (N,) int64 => (N, count) float32. See `normals`."""
    return normals(seed, purpose, step if isinstance(step, Tensor) else [step], index, count, blocks)[0]


def uniform(
    seed: int, purpose: int, step: int | Tensor, index: Tensor, count: int, blocks: Tensor | None = None
) -> Tensor:
    """Uniform numbers in (0, 1), one row for each sample. index: (N,) int64 => (N, count) float64. See `normals`."""
    words = _words(seed, purpose, step if isinstance(step, Tensor) else [step], index, count, blocks)
    return torch.stack([_open_unit(w) for w in words], dim=-1).flatten(2)[0, :, :count]


def _open_unit(word: Tensor) -> Tensor:
    """32-bit word => float64 in (0, 1), never an end point."""
    return (word.double() + 0.5) * 2.0**-32
