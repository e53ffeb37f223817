"""What a training step asks of a GPU, counted without one: launches, waits, memory traffic, peak memory, host time.

    python -m benchmarks.count SiT-B/2 --batch-size 32 --precision bf16 --compile
    python -m benchmarks.count SiT-XL/2 SiT-B/2 --batch-size 256 32 --published PATH --label all   # a table of all variants

The device is simulated (benchmarks/simulated.py): nothing is computed and nothing is measured but the host's time, that of
launching. Traffic is bytes read and written by all kernels but matrix products and attention: by Inductor's count for the
kernels it generates, but no less than the size of inputs and outputs, which is what counts for the others. Times on a GPU
are predicted from the counts (models/cost.py).
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import simulated
from common.reporting import run
from config import parse, setting

if TYPE_CHECKING:
    from models.sit import SiTConfig


@dataclass(frozen=True)
class CountBenchmark:
    model: tuple[str, ...] = setting(("SiT-XL/2",), "SiT-{S,B,L,XL}/{2,4,8}, one or several", group="what")
    batch_size: tuple[int, ...] = setting((256,), "images per step on this device, one or several", group="what")
    depth: int | None = setting(None, "blocks; default: the model's", group="what")
    encoder: str = setting("cached", "cached: tokens are given; or what runs in the step: dinov2-vit-b", group="what")
    precision: str = setting("bf16", "ours", group="how", choices=("fp32", "fp16", "bf16"))
    compile: bool = setting(False, "the compiled step", group="how")
    norm_kernel: bool = setting(False, "the compiled step with models/norm_kernel.py", group="how")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass", group="how")
    names: int = setting(
        0, "also print this number of kernels, the most frequent and those that move most", group="how", at_least=0
    )
    published: Path | None = setting(None, "clone of the published code at 021ea2e, for the table", group="table")
    label: str = setting("", "count all variants, and name the files in benchmarks/results", group="table")
    gib: float = setting(141, "memory of the simulated device", group="how", above=0)


class Counted(NamedTuple):
    """One optimiser step. traffic, peak: bytes. host: seconds of the CPU."""

    launches: int
    products: int
    synchronisations: int
    traffic: float
    peak: int
    host: float


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    given = (["--model", *given[:first_flag]] if first_flag else []) + given[first_flag:]
    settings = parse(CountBenchmark, (__doc__ or "").splitlines()[0], given)
    simulated.restart("benchmarks.count", Path(tempfile.gettempdir()) / "simulated-gpu", settings.gib)
    from benchmarks import harness
    from models.sit import preset

    simulated.set_up()
    rows = []
    for model in settings.model:
        config = harness.sized(preset(model), depth=settings.depth)
        for n in settings.batch_size:
            for name, build in variants(settings, config, n).items():
                found = count(build, settings.names)
                rows.append(
                    {
                        "model": model,
                        "batch": n,
                        "variant": name,
                        "launches": found.launches,
                        "matrix products": found.products,
                        "waits of the host": found.synchronisations,
                        "elementwise GB": found.traffic / 1e9,
                        "peak GiB": found.peak / 2**30,
                        "host ms": 1e3 * found.host,
                    }
                )
                rows[-1] |= predicted(settings, config, n, found)
                print(", ".join(f"{column} {_text(value)}" for column, value in rows[-1].items()), flush=True)
    if settings.label:
        kept = {"encoder": settings.encoder, "precision": settings.precision, "depth": settings.depth}
        print(harness.table(harness.write("count", settings.label, kept, rows)))
    print(f"launches {rows[-1]['launches']}")


def predicted(settings: CountBenchmark, config: "SiTConfig", n: int, found: Counted) -> dict[str, float]:
    """Images per second on two GPUs, by models/cost.py; the device's time alone is what a CUDA graph would take."""
    from models.cost import GPUS, counted_seconds, encoder_macs

    macs = 0 if settings.encoder == "cached" else encoder_macs(settings.encoder, config.input_size // config.patch_size)
    # the device has no cuDNN: the convolution of the encoder's patches is two launches for each image, on a GPU it is one
    launches = found.launches - (2 * n - 1 if macs else 0)

    def seconds(gpu: str, host: float) -> float:
        return counted_seconds(
            config, n, GPUS[gpu], traffic=found.traffic, launches=launches, host=host, encoder_macs=macs
        )

    rates = {f"predicted images/s, {gpu}": round(n / seconds(gpu, found.host)) for gpu in ("H100", "H200")}
    return {**rates, "predicted ms of the device, H200": 1e3 * seconds("H200", 0.0)}


def _text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


Build = Callable[[], Callable[[], Any]]  # => a function that takes a step


def variants(settings: CountBenchmark, config: "SiTConfig", n: int) -> dict[str, Build]:
    """What is counted: with a label all variants, else the one that is asked for."""
    from benchmarks.train_variants import OurStep, published_step

    def ours(compiled: bool, norm_kernel: bool = False) -> Build:
        return lambda: OurStep(
            config,
            n,
            "cuda",
            encoder=settings.encoder,
            precision=settings.precision,
            compiled=compiled,
            norm_kernel=norm_kernel,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    def theirs() -> Callable[[], None]:
        assert settings.published is not None
        return published_step(
            settings.published, config, n, "cuda", encoder=settings.encoder, precision="fp16", read_back=True
        )

    with_kernel: dict[str, Build] = {"compiled, norm kernel": ours(True, True)} if settings.norm_kernel else {}
    if not settings.label:
        return with_kernel or {"compiled" if settings.compile else "eager": ours(settings.compile)}
    both: dict[str, Build] = {"eager": ours(False), "compiled": ours(True)}
    return ({"published": theirs} if settings.published else {}) | both | with_kernel


def count(build: Build, names: int = 0) -> Counted:
    """Take a few steps, so that optimiser and compiled code are there, and count the next ones."""
    import torch
    from torch._inductor import config as inductor

    from benchmarks.turns import free

    with inductor.patch(benchmark_kernel=True):  # its kernels then know their bytes
        step = build()
        for _ in range(3):
            step()
    torch.cuda.reset_peak_memory_stats()
    simulated.reset()
    step()
    found, peak = simulated.by_name(), torch.cuda.max_memory_allocated()
    for name, n in sorted(found.items(), key=lambda item: -item[1])[:names]:
        print(f"{n:>6} {name[:140]}")
    hosts = []
    for _ in range(40):
        began = time.process_time()
        step()
        hosts.append(time.process_time() - began)
    counted = Counted(*simulated.counts(found), traffic(step, names), peak, min(hosts))
    del step
    free()
    return counted


def traffic(step: Callable[[], Any], names: int = 0) -> float:
    """Bytes that a step reads and writes outside of matrix products and attention."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    from benchmarks.traffic import Traffic, size_of

    generated: dict[Any, list[float]] = {}  # kernel => bytes of each call
    original, eager = CachingAutotuner.run, Traffic()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        # not known of models/norm_kernel.py, and too small of kernels that read what it has written
        moved = max(size_of(args), 1e9 * self.inductor_meta.get("kernel_num_gb", 0))
        generated.setdefault(self, []).append(moved)
        return original(self, *args, **kwargs)

    CachingAutotuner.run = launch
    try:
        step()
    finally:
        CachingAutotuner.run = original
    for kernel, moved in sorted(generated.items(), key=lambda item: -sum(item[1]))[:names]:
        print(f"{sum(moved) / 1e9:8.2f} GB {len(moved):4} x {moved[0] / 1e9:.3f} GB {kernel.fn.__name__}")
    if not generated:
        with eager:
            step()
        return eager.bytes
    train_step = step.step  # type: ignore[attr-defined]  # ours: only it is compiled
    update = train_step.update

    def watched(number: int) -> Any:  # compiled code does not run below a dispatch mode, what follows it does
        with eager:
            return update(number)

    train_step.update = watched
    step()
    return sum(map(sum, generated.values())) + eager.bytes


if __name__ == "__main__":
    run(main)
