"""What every benchmark shares: the record of the machine, fair timing side by side, and files in benchmarks/results/.

timings = alternate({"published": f, "ours": g}, rounds=9, device="cpu")
speedup = ratio(timings["published"], timings["ours"])
write("train_step", "b2-cpu", settings, [{"batch": 32, "ours ms": ..., "speedup": speedup.median}])
"""

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.files import write_text
from common.provenance import processor, versions
from models.sit import SiTConfig

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results")  # the variable: another folder to write to
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Spread(NamedTuple):
    """Median and quartiles of the measured values, and the values in the order of the rounds."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


def spread(values: Sequence[float]) -> Spread:
    """Summarise at least one value."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(median, low, high, tuple(values))


def pick_device(choice: str) -> str:
    """cpu or cuda; auto is CUDA where there is a GPU."""
    return choice if choice != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def sized(config: SiTConfig, **sizes: int | None) -> SiTConfig:
    """The config with those sizes that are not None; alignment no deeper than the network."""
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    return replace(config, **given, align_depth=min(config.align_depth, given.get("depth", config.depth)))


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has finished its work; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    turn: float = 0.0,
    device: str | torch.device = "cpu",
    clock: str = "wall",
) -> dict[str, Spread]:
    """Seconds of one call of each variant, measured in turn in this process.

    Each round times every variant once, in the given order in even rounds and reversed in odd ones, so that a slow drift of
    the machine affects all alike.

    Args:
        variants: name => function to time.
        rounds: timed turns of each variant.
        warmup: untimed calls of each before them.
        repeats: calls per turn, at least.
        turn: seconds that a turn lasts, at least; its time is divided by its calls.
        device: synchronised before and after each turn.
        clock: "wall", or "cpu" for the time this process was on the CPU, which other programs disturb less.
    """
    now = CLOCKS[clock]
    for function in variants.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            synchronize(device)
            calls, start = 0, now()
            while calls < repeats or now() - start < turn:
                variants[name]()
                calls += 1
            synchronize(device)
            seconds[name].append((now() - start) / calls)
    return {name: spread(values) for name, values in seconds.items()}


def keep_memory() -> None:
    """Let malloc keep what is freed. Else glibc gives large blocks back to the kernel, and each training step on a CPU takes
    300 MiB of new pages, up to a sixth of its time, which falls on one variant or another. Needs glibc, else does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def ratio(numerator: Spread, denominator: Spread) -> Spread:
    """Round by round quotient: what the two took within seconds of each other, whatever else the machine did."""
    return spread([a / b for a, b in zip(numerator.values, denominator.values, strict=True)])


def count_operations(function: Callable[[], Any]) -> int:
    """ATen operations of one call, forward and backward, nested ones included, by torch.profiler (host side)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def matmul_ceiling(device: str | torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """TFLOP/s that large square matrix products reach here: the ceiling a training step is compared with."""
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = alternate({"product": lambda: a @ b}, rounds=9, warmup=3, repeats=5, device=device)["product"]
    return 2 * size**3 / seconds.median / 1e12


class Memory(NamedTuple):
    """GiB. peak: largest amount allocated. resident: what was allocated before the measured call."""

    peak: float
    resident: float


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> Memory | None:
    """GPU memory during one call; None on the CPU, where the allocator keeps no such record."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) / 2**30, resident / 2**30)


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit, as far as they are known."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(ROOT),
        "device": device_name(device),
        "cpu": processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(("torch", "timm", "numpy", "diffusers", "accelerate")),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return record


def device_name(device: str | torch.device) -> str:
    """Name of the GPU, or of the CPU with its number of cores."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} ({os.cpu_count()} cores)"


def commit(repository: Path) -> str | None:
    """The short commit of a checkout, with "+" when tracked files differ from it, or None outside of git; of this project
    what the variable COMMIT says, where it is set."""
    given = os.environ.get("COMMIT")
    if given and repository == ROOT:  # files may have been copied over an older checkout: git would name that one
        return given[:10]
    described = _output("git", "-C", str(repository), "rev-parse", "--short=10", "HEAD")
    if described is None:
        return None
    return described + ("+" if _output("git", "-C", str(repository), "status", "--porcelain", "-uno") else "")


def write(
    benchmark: str,
    label: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    device: str | torch.device = "cpu",
    details: Any = None,
    folder: Path | None = None,
) -> Path:
    """Write `BENCHMARK-LABEL.json` and bring `BENCHMARK.md` beside it up to date; a second run with the same label replaces
    the first.

    Args:
        benchmark: name of the module.
        label: of this machine and setting.
        settings: what was measured, for the record; of a path its last part alone, which means something elsewhere.
        rows: the figures, flat, column => number, text or Spread; one Markdown row each.
        device: where it ran, for the record.
        details: anything else JSON can hold.
        folder: default: benchmarks/results/.

    Returns:
        Path of the JSON file.
    """
    folder = RESULTS if folder is None else folder
    path = folder / f"{benchmark}-{label}.json"
    record = {
        "benchmark": benchmark,
        "label": label,
        "environment": environment(device),
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in settings.items()},
        "rows": [{k: v._asdict() if isinstance(v, Spread) else v for k, v in row.items()} for row in rows],
        "details": details,
    }
    write_text(path, json.dumps(record, indent=1, default=str) + "\n")
    _write_markdown(benchmark, folder)
    return path


def _write_markdown(benchmark: str, folder: Path) -> None:
    """Rebuild the table of a benchmark from all its JSON files."""
    paths = sorted(folder.glob(f"{benchmark}-*.json"))
    tables = [table(path) for path in paths if json.loads(path.read_text(encoding="utf-8"))["benchmark"] == benchmark]
    head = f"# {benchmark}\n\n`python -m benchmarks.{benchmark} --help` says how to measure again.\n\n"
    write_text(folder / f"{benchmark}.md", head + "\n".join(tables))


def table(path: Path) -> str:
    """The section of BENCHMARK.md about one JSON file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    e = record["environment"]
    columns = list(dict.fromkeys(column for row in record["rows"] for column in row))
    settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items() if v not in (None, "", False))
    lines = [f"## {record['label']}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in record["rows"]]
    lines += [
        "",
        f"{e['device']}, {e['threads']} threads, torch {e['versions']['torch']}, timm {e['versions']['timm']}, "
        f"commit {e['commit']}, {e['date']}. Settings: {settings}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
