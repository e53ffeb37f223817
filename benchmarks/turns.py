"""Training steps are timed side by side, also on a device whose memory does not hold two of them."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import harness


class Variant(NamedTuple):
    """A training step that is timed, the images it takes, and the seconds of its first run, compilation included."""

    step: Callable[[], Any]
    batch: int
    first: float


class Measured(NamedTuple):
    """A variant's row. speed: images per second over the published code's. peak: GiB, None on the CPU."""

    batch: int
    milliseconds: harness.Spread
    images: harness.Spread
    speed: harness.Spread | None
    operations: int
    first: float
    peak: float | None


Builders = dict[str, Callable[[int], Callable[[], Any]]]  # name => (batch size => a function that takes one step)


def compare(
    builders: Builders, batch: int, device: str, rounds: int, warmup: int, clock: str = "wall"
) -> Iterator[tuple[str, Measured | Exception]]:
    """Time all variants; each row comes as soon as it is known.

    On a CPU they take turns. On a GPU, whose memory may not hold two, each is alone, one after the other; for one that
    fails its error is yielded, and the others go on.

    Args:
        builders: what is compared.
        batch: images per step.
        device: where they run.
        rounds: timed steps of each.
        warmup: untimed steps of each before them.
        clock: "wall" or "cpu".

    Yields:
        A variant's name, and what was found.
    """
    cuda = device.startswith("cuda")
    published: tuple[int, harness.Spread] | None = None
    for names in [[name] for name in builders] if cuda else [list(builders)]:
        variants: dict[str, Variant] = {}
        steps: dict[str, Callable[[], Any]] = {}
        try:
            variants = {name: start(builders[name], batch, device) for name in names}
            steps = {name: variants[name].step for name in names}
            timings = harness.alternate(steps, rounds=rounds, warmup=warmup, device=device, clock=clock)
            peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
            if "published" in variants:
                published = variants["published"].batch, timings["published"]
            for name in names:
                yield name, _measured(variants[name], timings[name], peak, published)
        except Exception as error:
            if not cuda:
                raise
            traceback.print_exc()
            yield names[0], error.with_traceback(None)  # whose frames hold the device's memory
        variants, steps = {}, {}
        free()


def _measured(
    variant: Variant, seconds: harness.Spread, peak: float | None, published: tuple[int, harness.Spread] | None
) -> Measured:
    speed = None
    if published:
        scale = variant.batch / published[0]
        speed = harness.spread([scale * r for r in harness.ratio(published[1], seconds).values])
    return Measured(
        variant.batch,
        harness.spread([1e3 * s for s in seconds.values]),
        harness.spread([variant.batch / s for s in seconds.values]),
        speed,
        harness.count_operations(variant.step),
        variant.first,
        peak,
    )


def start(build: Callable[[int], Callable[[], Any]], n: int, device: str) -> Variant:
    """Build a variant and take its first step; a batch that does not fit is halved."""
    while True:
        step: Callable[[], Any] | None = None
        try:
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            step = build(n)
            harness.synchronize(device)
            began = time.perf_counter()
            step()
            harness.synchronize(device)
            return Variant(step, n, time.perf_counter() - began)
        except torch.OutOfMemoryError:
            if n == 1:
                raise
        del step
        n //= 2
        free()


def free() -> None:
    """Give the allocator's memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
