"""One training step, ours and the published code's, in one process on the same weights' shapes and the same data.

    python -m benchmarks.train_step --published PATH --model SiT-XL/2 --batch-size 256 --encoder dinov2-vit-b --compile

Ours is training.step.TrainStep, what train.py runs. The published step is driven as its train.py does, with its own network,
loss and EMA and torch's default AdamW: once as shipped (fp16 with a loss scaler, five values read back each step) and once
at its best (bf16, nothing read back). A batch that does not fit is halved, for that variant alone; images/s are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.reporting import run
from config import UserError, parse, setting

if TYPE_CHECKING:
    from benchmarks.kernels import Profile
    from benchmarks.turns import Builders
    from models.sit import SiTConfig


@dataclass(frozen=True)
class TrainStepBenchmark:
    published: Path | None = setting(None, "clone of the published code at 021ea2e to run beside ours", group="what")
    model: str = setting("SiT-XL/2", "SiT-{S,B,L,XL}/{2,4,8}", group="what")
    depth: int | None = setting(None, "blocks; default: the model's", group="what")
    hidden_size: int | None = setting(None, "width; default: the model's", group="what")
    num_heads: int | None = setting(None, "attention heads; default: the model's", group="what")
    input_size: int = setting(32, "side of the latent", group="what")
    batch_size: tuple[int, ...] = setting((256,), "images per step on this device, one or several", group="what")
    encoder: str = setting("cached", "cached: tokens are given; or what runs in the step: dinov2-vit-b", group="what")
    precision: str = setting("auto", "ours", group="how", choices=("auto", "fp32", "fp16", "bf16"))
    compile: bool = setting(False, "also measure ours with its regions compiled", group="how")
    norm_kernel: bool = setting(False, "also measure ours compiled with models/norm_kernel.py (CUDA)", group="how")
    graph: bool = setting(False, "also measure ours as a CUDA graph, compiled with --compile (CUDA)", group="how")
    only: tuple[str, ...] = setting((), "measure these variants alone, by their names in the table", group="how")
    stream: bool = setting(False, "also measure ours with the next batch encoded on a side stream (CUDA)", group="how")
    gradient_checkpointing: bool = setting(False, "ours recomputes its blocks", group="how")
    parts: bool = setting(False, "also say where the time of our step goes", group="how")
    profile: bool = setting(False, "also list the kernels of one step of the last variant by their time", group="how")
    rounds: int = setting(9, "timed steps of each variant", group="how")
    warmup: int = setting(2, "untimed steps of each variant before them", group="how")
    device: str = setting("auto", "where it runs", group="how", choices=("auto", "cpu", "cuda"))
    clock: str = setting("wall", "cpu: time of this process alone, on a busy CPU", group="how", choices=("wall", "cpu"))
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(TrainStepBenchmark, (__doc__ or "").splitlines()[0], argv)
    import torch

    from benchmarks import harness, published
    from benchmarks.kernels import lines
    from benchmarks.turns import compare, free
    from models import acceleration
    from models.cost import cost, encoder_macs
    from models.sit import preset
    from training.graph import WARM_UP

    commit = published.check(settings.published) if settings.published else None
    device = harness.pick_device(settings.device)
    cuda = torch.device(device).type == "cuda"
    precision = acceleration.best_precision(device) if settings.precision == "auto" else settings.precision
    harness.keep_memory()
    acceleration.allow_tf32(True)  # the published launch script asks for it as well
    sizes = {name: getattr(settings, name) for name in ("depth", "hidden_size", "num_heads")}
    config = harness.sized(preset(settings.model, input_size=settings.input_size), **sizes)
    flops = cost(config).train_flops
    if settings.encoder != "cached":
        flops += 2 * encoder_macs(settings.encoder, config.input_size // config.patch_size)

    builders = builders_of(settings, config, device, precision)
    ceiling = harness.matmul_ceiling(device, acceleration.DTYPES.get(precision, torch.float32)) if cuda else None
    model = settings.model if config == preset(settings.model) else f"{config.depth} x {config.hidden_size}"
    rows: list[dict[str, Any]] = []
    parts: dict[int, Any] = {}
    kernels: dict[int, Any] = {}
    described = {
        "encoder": settings.encoder,
        "latent": config.input_size,
        "precision": precision,
        "clock": settings.clock,
        "rounds": settings.rounds,
        "published commit": commit,
        "gradient checkpointing": settings.gradient_checkpointing,
        "ceiling TFLOP/s": ceiling and round(ceiling, 1),
        "training GFLOP per image": round(flops / 1e9, 2),
    }

    def write() -> Path:
        """What is measured so far: whatever ends the program leaves it."""
        details = {"ms by part of our step": parts, "kernels": kernels}
        return harness.write("train_step", settings.label, described, rows, device=device, details=details)

    warmup = max(settings.warmup, WARM_UP) if settings.graph else settings.warmup  # the first replay is not timed
    failed = 0
    for batch in settings.batch_size:
        for name, measured in compare(builders, batch, device, settings.rounds, warmup, settings.clock):
            row: dict[str, Any] = {"model": model, "variant": name}
            if isinstance(measured, Exception):
                failed += 1
                row |= {"batch": batch, "failed": f"{type(measured).__name__}: {measured}".splitlines()[0][:200]}
            else:
                row |= {
                    "batch": measured.batch,
                    "ms per step": measured.milliseconds,
                    "images/s": measured.images,
                    "times published": measured.speed,
                    "share of ceiling": measured.images.median * flops / (ceiling * 1e12) if ceiling else None,
                    "ATen operations": measured.operations,
                    "first step s": measured.first,
                    "peak GiB": measured.peak,
                }
            rows.append(row)
            print(", ".join(f"{column} {value}" for column, value in row.items() if value is not None), flush=True)
            write()
        if settings.profile:
            profiled = profile(list(builders.values())[-1], batch, device)
            kernels[batch] = {"ms by kind": profiled.kinds, "longest": profiled.kernels[:60]}
            print(*lines(profiled), sep="\n", flush=True)
            write()
        if settings.parts:
            parts[batch] = parts_of_step(settings, config, batch, device, precision)
            free()
    print(harness.table(write()))
    for batch, table in parts.items():
        print(f"our step at batch {batch}, ms: " + ", ".join(f"{k} {v:.3g}" for k, v in table.items()))
    if failed:
        raise UserError(f"{failed} of {len(rows)} variants failed: their errors are above")


def builders_of(settings: TrainStepBenchmark, config: "SiTConfig", device: str, precision: str) -> "Builders":
    """What is compared."""
    from benchmarks.train_variants import OurStep, encoded_ahead, published_step

    def ours(n: int, compiled: bool, *, norm_kernel: bool = False, graph: bool = False) -> OurStep:
        return OurStep(
            config,
            n,
            device,
            encoder=settings.encoder,
            precision=precision,
            compiled=compiled,
            norm_kernel=norm_kernel,
            graph=graph,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    def theirs(n: int, precision: str, read_back: bool) -> Callable[[], None]:
        assert settings.published is not None
        return published_step(
            settings.published, config, n, device, encoder=settings.encoder, precision=precision, read_back=read_back
        )

    cuda = device.startswith("cuda")
    builders: Builders = {}
    if settings.published:
        builders["published"] = lambda n: theirs(n, "fp16" if cuda else "fp32", True)
        if cuda or precision == "bf16":
            builders["published, best case"] = lambda n: theirs(n, "bf16", False)
    builders["ours"] = lambda n: ours(n, False)
    if settings.compile:
        builders["ours, compiled"] = lambda n: ours(n, True)
    if settings.norm_kernel and cuda:
        builders["ours, compiled, norm kernel"] = lambda n: ours(n, True, norm_kernel=True)
    if settings.stream and cuda and settings.encoder != "cached":
        builders["ours, encoder on a stream"] = lambda n: encoded_ahead(ours(n, settings.compile))
    if settings.graph and cuda:
        name = "ours, compiled, CUDA graph" if settings.compile else "ours, CUDA graph"
        builders[name] = lambda n: ours(n, settings.compile, graph=True)
    unknown = set(settings.only) - set(builders)
    if unknown:
        raise UserError(f"--only {min(unknown)}: these settings measure {'; '.join(builders)}")
    return {name: build for name, build in builders.items() if not settings.only or name in settings.only}


def profile(build: Callable[[int], Callable[[], Any]], n: int, device: str) -> "Profile":
    """The kernels (on a CPU: operations) of one step, after enough others for the replay of a CUDA graph."""
    from benchmarks import kernels
    from benchmarks.turns import free, start
    from training.graph import WARM_UP

    variant = start(build, n, device)
    for _ in range(WARM_UP + 1):
        variant.step()
    found = kernels.profile(variant.step, device)
    del variant
    free()
    return found


def parts_of_step(
    settings: TrainStepBenchmark, config: "SiTConfig", n: int, device: str, precision: str
) -> dict[str, float]:
    """Milliseconds of the parts of our step, by differences of medians of growing pieces."""
    from benchmarks.harness import alternate
    from benchmarks.train_variants import OurStep
    from loss import draw

    ours = OurStep(
        config,
        n,
        device,
        encoder=settings.encoder,
        precision=precision,
        compiled=settings.compile,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    step, batch, positions = ours.step, ours.batch, ours.positions

    def backward() -> None:
        step.loss(batch, positions)[1].backward()
        step.optimizer.zero_grad(set_to_none=True)

    pieces: dict[str, Callable[[], Any]] = {
        "draws": lambda: draw(0, 1, positions, config, "uniform"),
        "tokens": lambda: step.tokens(batch),
        "forward": lambda: step.loss(batch, positions),
        "backward": backward,
        "all": ours,
        "EMA": lambda: step.ema.update(step.network),
    }
    seconds = alternate(pieces, rounds=settings.rounds, warmup=2, device=device, clock=settings.clock)
    ms = {name: 1e3 * value.median for name, value in seconds.items()}
    return {
        "draws": ms["draws"],
        "encoder or tokens": ms["tokens"],
        "forward and loss": ms["forward"] - ms["draws"] - ms["tokens"],
        "backward": ms["backward"] - ms["forward"],
        "clip and AdamW": ms["all"] - ms["backward"] - ms["EMA"],
        "EMA": ms["EMA"],
        "whole step": ms["all"],
    }


if __name__ == "__main__":
    run(main)
