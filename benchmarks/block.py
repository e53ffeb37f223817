"""Forward and backward pass of one compiled block on a GPU, kernel by kernel; also with models/norm_kernel.py.

    python -m benchmarks.block --model SiT-XL/2 --batch-size 256 --norm-kernel --tune

All compute what the eager block computes: the largest differences of its output and gradients are shown, relative to the
largest value of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.reporting import run
from config import parse, setting


@dataclass(frozen=True)
class BlockBenchmark:
    model: str = setting("SiT-XL/2", "SiT-{S,B,L,XL}/{2,4,8}", group="what")
    batch_size: int = setting(256, "images per step on this device", group="what", at_least=1)
    norm_kernel: bool = setting(False, "also the compiled block with models/norm_kernel.py", group="what")
    tune: bool = setting(
        False, "also time its kernels alone, with other numbers of warps, stages and programs", group="what"
    )
    rounds: int = setting(9, "timed steps of each variant", group="how", at_least=1)
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(BlockBenchmark, (__doc__ or "").splitlines()[0], argv)
    import torch

    from benchmarks import harness, kernels
    from models.acceleration import compile_region
    from models.sit import SiTBlock, preset

    config = preset(settings.model)
    torch.manual_seed(0)
    with torch.device("cuda"):
        x = torch.randn(settings.batch_size, config.num_tokens, config.hidden_size, requires_grad=True)
        c = torch.randn(settings.batch_size, config.hidden_size, requires_grad=True)
        target = torch.randn_like(x)
        plain = SiTBlock(config)
    steps: dict[str, Callable[..., list[Any]]] = {}
    for name in ("eager", "compiled", *["compiled, norm kernel"] * settings.norm_kernel):
        with torch.device("cuda"):
            block = SiTBlock(config)
        block.load_state_dict(plain.state_dict())
        if "kernel" in name:
            from models.norm_kernel import adaptive_norm  # needs Triton

            block.norm1.kernel = block.norm2.kernel = adaptive_norm

        if name != "eager":
            compile_region(block)

        def step(block: SiTBlock = block) -> list[Any]:
            with torch.autocast("cuda", torch.bfloat16):
                output = block(x, c)
            return [output.detach(), *torch.autograd.grad(output, [x, c, *block.parameters()], target)]

        steps[name] = step
    expected = [value.float() for value in steps["eager"]()]
    rows = []
    for name, step in steps.items():
        largest = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(step(), expected, strict=True))
        seconds = harness.alternate({name: step}, rounds=settings.rounds, warmup=2, device="cuda")[name]
        found = kernels.profile(step, "cuda")
        rows.append({"variant": name, "ms": harness.spread([1e3 * s for s in seconds.values]), "from eager": largest})
        rows[-1] |= {f"{kind}, ms": ms for kind, ms in found.kinds.items()}
        print(f"{name}: {rows[-1]['ms']} ms, {largest:.1e} from eager", *kernels.lines(found), sep="\n", flush=True)
    if settings.tune:
        rows += [*products(settings), *tune(settings)]
    harness.write("block", settings.label, {"model": settings.model, "batch": settings.batch_size}, rows, device="cuda")


def products(settings: BlockBenchmark) -> list[dict[str, Any]]:
    """Milliseconds of the gradients of the block's weights: in half precision and then cast, and written in float32."""
    import torch

    from benchmarks import harness
    from models.sit import preset

    config, rows = preset(settings.model), []
    d, tokens = config.hidden_size, settings.batch_size * config.num_tokens
    for name, width, depth in (("qkv", 3 * d, d), ("projection", d, d), ("MLP in", 4 * d, d), ("MLP out", d, 4 * d)):
        with torch.device("cuda"):
            a, b = torch.randn(tokens, width, dtype=torch.bfloat16).T, torch.randn(tokens, depth, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], Any]] = {
            "half, ms": lambda a=a, b=b: a @ b,  # type: ignore[misc]
            "half and cast, ms": lambda a=a, b=b: (a @ b).float(),  # type: ignore[misc]
            "float32, ms": lambda a=a, b=b: torch.mm(a, b, out_dtype=torch.float32),  # type: ignore[misc]
        }
        taken = harness.alternate(calls, rounds=settings.rounds, warmup=2, device="cuda")
        rows.append({"variant": f"gradient of weights, {name}"} | {k: 1e3 * v.median for k, v in taken.items()})
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
    return rows


def tune(settings: BlockBenchmark) -> list[dict[str, Any]]:
    """Milliseconds of the kernel alone, with a gated branch and without, and the rate at which it moves its bytes."""
    import torch

    from benchmarks import harness
    from models import norm_kernel
    from models.sit import preset

    config, n, half = preset(settings.model), settings.batch_size, torch.bfloat16
    with torch.device("cuda"):
        d_total, x = torch.randn(2, n, config.num_tokens, config.hidden_size)
        d_output, branch = torch.randn(2, n, config.num_tokens, config.hidden_size, dtype=half)
        scale, gate = torch.randn(2, n, 1, config.hidden_size, dtype=half)
        mean, rstd = torch.rand(2, n, config.num_tokens, 1)
    rows = []
    usual = {"WARPS": norm_kernel.WARPS, "STAGES": norm_kernel.STAGES, "PROGRAMS": norm_kernel.PROGRAMS}
    tried = [usual, *({**usual, "WARPS": w, "STAGES": s} for w in (2, 4, 8) for s in (3, 4, 5))]
    tried += [{**usual, "PROGRAMS": programs} for programs in (256, 528, 2048)]
    try:
        for choice in tried:
            for name, value in choice.items():
                setattr(norm_kernel, name, value)
            row: dict[str, Any] = {"variant": ", ".join(f"{name.lower()} {value}" for name, value in choice.items())}
            calls: dict[str, Callable[[], Any]] = {
                "forward": lambda: norm_kernel.forward(x, scale, scale, gate, branch, None, None, 1e-6, half, True),
                "gated": lambda: norm_kernel.backward(
                    d_total, d_output, x, scale, gate, branch, None, None, mean, rstd
                ),
                "not gated": lambda: norm_kernel.backward(
                    d_total, d_output, x, scale, None, None, None, None, mean, rstd
                ),
            }
            for name, size in (("forward", 12), ("gated", 18), ("not gated", 14)):
                taken = harness.alternate({name: calls[name]}, rounds=settings.rounds, warmup=2, device="cuda")
                seconds = taken[name].median
                row |= {f"{name}, ms": 1e3 * seconds, f"{name}, TB/s": size * x.numel() / seconds / 1e12}
            rows.append(row)
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
    finally:
        for name, value in usual.items():
            setattr(norm_kernel, name, value)
    return rows


if __name__ == "__main__":
    run(main)
