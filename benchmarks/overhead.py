"""What the class-token slot costs: the same network with and without it, parameters, operations and time.

    python -m benchmarks.overhead --model SiT-XL/2 --batch-size 256 --compile

The paper's table for XL/2: parameters +0.30 %, operations +0.38 %, latency +0.49 %.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.reporting import run
from config import parse, setting

if TYPE_CHECKING:
    from models.sit import SiTConfig


@dataclass(frozen=True)
class OverheadBenchmark:
    model: str = setting("SiT-XL/2", "SiT-{S,B,L,XL}/{2,4,8}", group="what")
    depth: int | None = setting(None, "blocks; default: the model's", group="what")
    input_size: int = setting(32, "side of the latent", group="what")
    batch_size: int = setting(64, "images per forward pass and per training step", group="what")
    train: bool = setting(True, "time the training step, too", group="what")
    precision: str = setting("auto", "mixed precision", group="how", choices=("auto", "fp32", "fp16", "bf16"))
    compile: bool = setting(False, "compile the networks' regions", group="how")
    rounds: int = setting(25, "timed calls of each", group="how")
    warmup: int = setting(3, "untimed calls of each before them", group="how")
    device: str = setting("auto", "where it runs", group="how", choices=("auto", "cpu", "cuda"))
    clock: str = setting("wall", "cpu: time of this process alone, on a busy CPU", group="how", choices=("wall", "cpu"))
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(OverheadBenchmark, (__doc__ or "").splitlines()[0], argv)
    from benchmarks import harness
    from benchmarks.train_variants import OurStep
    from models import acceleration
    from models.cost import cost
    from models.sit import preset

    device = harness.pick_device(settings.device)
    precision = acceleration.best_precision(device) if settings.precision == "auto" else settings.precision
    acceleration.allow_tf32(True)
    config = harness.sized(preset(settings.model, input_size=settings.input_size), depth=settings.depth)
    configs = {"without": replace(config, class_token_dim=0), "with": config}

    def time_pair(make: "Callable[[SiTConfig], Callable[[], Any]]") -> dict[str, harness.Spread]:
        calls = {name: make(c) for name, c in configs.items()}
        return harness.alternate(
            calls, rounds=settings.rounds, warmup=settings.warmup, device=device, clock=settings.clock
        )

    forward = time_pair(lambda c: forward_pass(c, settings, device, precision))
    rows: list[dict[str, Any]] = []
    for name, c in configs.items():
        counted = cost(c)
        rows.append(
            {
                "class token": name,
                "parameters": counted.parameters,
                "GFLOP (multiply-adds)": counted.flops / 1e9,
                "ms forward": harness.spread([1e3 * s for s in forward[name].values]),
            }
        )
    if settings.train:
        training = time_pair(
            lambda c: OurStep(c, settings.batch_size, device, precision=precision, compiled=settings.compile)
        )
        for row in rows:
            row["ms training step"] = harness.spread([1e3 * s for s in training[row["class token"]].values])
    rows.append(
        {"class token": "overhead %"}
        | {name: 100 * (rows[1][name] / rows[0][name] - 1) for name in ("parameters", "GFLOP (multiply-adds)")}
        | {
            name: percent(rows[1][name], rows[0][name])
            for name in ("ms forward", "ms training step")
            if name in rows[0]
        }
    )
    path = harness.write(
        "overhead",
        settings.label,
        {
            "model": settings.model,
            "depth": config.depth,
            "latent": config.input_size,
            "batch": settings.batch_size,
            "precision": precision,
            "compiled": settings.compile,
            "clock": settings.clock,
            "rounds": settings.rounds,
        },
        rows,
        device=device,
    )
    print(harness.table(path))


def forward_pass(config: "SiTConfig", settings: OverheadBenchmark, device: str, precision: str) -> Callable[[], Any]:
    """One forward pass as the sampler makes it: no gradient, no projectors."""
    import torch

    from models import acceleration
    from models.sit import SiT

    torch.manual_seed(0)
    with torch.device(device):
        network = SiT(replace(config, align_dims=())).eval()
        n = settings.batch_size
        x = torch.randn(n, config.in_channels, config.input_size, config.input_size)
        token = torch.randn(n, config.class_token_dim) if config.class_token_dim else None
        t, y = torch.rand(n), torch.randint(0, config.num_classes, (n,))
    if settings.compile:
        acceleration.compile_network(network)

    @torch.no_grad()
    def call() -> None:
        with acceleration.autocast(device, precision):
            network(x, t, y, token)

    return call


def percent(numerator: Any, denominator: Any) -> Any:
    """Overhead in per cent, round by round."""
    from benchmarks.harness import ratio, spread

    return spread([100 * (value - 1) for value in ratio(numerator, denominator).values])


if __name__ == "__main__":
    run(main)
