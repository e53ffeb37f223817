"""The rates that a training step could reach on this machine: memory, large products, those of a block, attention kernels.

    python -m benchmarks.ceilings --label gpu-ceilings
    python -m benchmarks.ceilings --table gpu-results     # a table of what benchmarks/gpu.sh measured

models/cost.py assumes such rates for its predictions; these are the measured ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.reporting import run
from config import UserError, parse, setting


@dataclass(frozen=True)
class Ceilings:
    batch_size: int = setting(64, "images whose tokens the products have", group="what", at_least=1)
    input_size: int = setting(32, "side of the latent", group="what", at_least=2)
    square: int = setting(8192, "side of the large product", group="what", at_least=1)
    copied: int = setting(2**30, "bytes that are copied", group="what", at_least=1024)
    rounds: int = setting(9, "how often each is timed, by ten calls in a row", group="how", at_least=1)
    device: str = setting("auto", "where it runs", group="how", choices=("auto", "cpu", "cuda"))
    label: str = setting("run", "names the result files", group="how")
    table: Path | None = setting(None, "folder of results to print a table of, instead of measuring", group="what")


NUMBERS = (
    "share of ceiling",
    "max deviation",
    "first step s",
    "peak GiB",
)  # columns that the table shows beside spreads


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Ceilings, (__doc__ or "").splitlines()[0], argv)
    if settings.table is not None:
        print("\n".join(table(settings.table)))
        return
    import torch

    from benchmarks import harness

    device = harness.pick_device(settings.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for name, (call, work, unit) in calls(settings, device, dtype).items():
        try:
            seconds = harness.alternate({name: call}, rounds=settings.rounds, warmup=2, repeats=10, device=device)[name]
        except RuntimeError as error:  # a kernel that does not know this GPU or shape
            rows.append({"what": name, "unit": str(error).splitlines()[0][:60]})
            continue
        rates = harness.spread([work / s / 1e12 for s in seconds.values])
        rows.append({"what": name, "unit": unit, "rate": rates, "ms": 1e3 * seconds.median})
        if len(rows) % 9 == 0:
            harness.write("ceilings", settings.label, {"dtype": str(dtype)}, rows, device=device)
    path = harness.write("ceilings", settings.label, {"dtype": str(dtype)}, rows, device=device)
    print(harness.table(path))


Calls = dict[
    str, tuple[Callable[[], Any], float, str]
]  # name => function, its operations or bytes, the unit of the rate


def calls(settings: Ceilings, device: str, dtype: Any) -> Calls:
    """What is timed: a copy, a large product, the products of a block of XL/2 and B/2, attention by each of its kernels."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from models.sit import preset

    def product(m: int, k: int, n: int) -> tuple[Callable[[], Any], float, str]:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        return lambda: a @ b, 2.0 * m * k * n, "TFLOP/s"

    source = torch.zeros(settings.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: Calls = {"copy": (lambda: target.copy_(source), 2.0 * settings.copied, "TB/s")}
    found[f"{settings.square}^3"] = product(*[settings.square] * 3)
    for model in ("SiT-XL/2", "SiT-B/2"):
        config = preset(model, input_size=settings.input_size)
        d, heads, n = config.hidden_size, config.num_heads, settings.batch_size
        tokens = n * config.num_tokens
        shapes = {"qkv": (d, 3 * d), "projection": (d, d), "MLP in": (d, 4 * d), "MLP out": (4 * d, d)}
        for name, (k, m) in shapes.items():
            found[f"{model} {name}"] = product(tokens, k, m)
            found[f"{model} {name}, gradient of inputs"] = product(tokens, m, k)
            found[f"{model} {name}, gradient of weights"] = product(m, tokens, k)
        found[f"{model} modulation"] = product(n, d, 6 * d)
        shape = (n, heads, config.num_tokens, d // heads)
        q, k_, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        work = 3.5 * 4 * n * heads * config.num_tokens**2 * (d // heads)  # backward takes two and a half times forward
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

            def attend(q: Any = q, k: Any = k_, v: Any = v, backend: Any = backend) -> None:
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, k, v).backward(v.detach())
                q.grad = k.grad = v.grad = None

            found[f"{model} attention, {backend.name.split('_')[0].lower()}"] = (attend, work, "TFLOP/s")
    return found


def table(folder: Path) -> list[str]:
    """A line for each variant in the results of a folder; of the ceilings the first two.

    Raises:
        UserError: there are none.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise UserError(f"--table {folder}: no results; run benchmarks/gpu.sh first")
    environment = records[0]["environment"]
    lines = [f"{environment['device']}, torch {environment['versions']['torch']}, commit {environment['commit']}"]
    for record in records:
        for row in record["rows"]:
            if record["benchmark"] == "ceilings":
                if row["what"] != "copy" and "^3" not in row["what"]:
                    continue
                rate = f"{row['rate']['median']:.3g} " if "rate" in row else ""  # without: unit says why it failed
                shown = [row["what"], rate + row["unit"]]
            else:
                shown = [record["label"].removeprefix("gpu-"), *map(str, list(row.values())[:3])]
                shown += [f"{name} {value['median']:.4g}" for name, value in row.items() if isinstance(value, dict)]
                shown += [f"{name} {row[name]:.3g}" for name in NUMBERS if row.get(name)]
                shown += [row["failed"]] if "failed" in row else []
            lines.append(" | ".join(shown))
    return lines


if __name__ == "__main__":
    run(main)
