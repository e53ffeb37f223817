"""Kernels of a GPU by the time they take: what a step spends on products, attention, the rest, and between kernels."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

KINDS = {  # the first that is found in a kernel's name
    "attention": r"fmha|flash|attention|sdpa|dot_do_o|dq_to_16bits",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "optimiser and EMA": r"multi_tensor|adam|foreach",
    "copies": r"memcpy|memset",
    "normalisation kernel": r"^_norm_(forward|backward)",
    "elementwise": "",
}


class Profile(NamedTuple):
    """One run. kernels: name, calls and ms, longest first. kinds: ms of each kind, and of the gaps between kernels."""

    kernels: list[dict[str, Any]]
    kinds: dict[str, float]


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def profile(step: Callable[[], Any], device: str) -> Profile:
    """Run a step once under torch's profiler; on a CPU its operations are listed and there are no kinds."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        averages = profiled.key_averages()
        found = [{"name": e.key[:120], "calls": e.count, "ms": e.self_cpu_time_total / 1e3} for e in averages]
        return Profile(sorted(found, key=lambda row: -row["ms"]), {})
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return summary([(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in events])


def summary(runs: Sequence[tuple[str, float, float]]) -> Profile:
    """A profile from runs of kernels: name, start and end in ms."""
    rows: dict[str, dict[str, Any]] = {}
    kinds = dict.fromkeys(KINDS, 0.0)
    gaps, end = 0.0, min((start for _, start, _ in runs), default=0.0)
    for name, start, stop in sorted(runs, key=lambda run: run[1]):
        row = rows.setdefault(name[:120], {"name": name[:120], "calls": 0, "ms": 0.0})
        row["calls"] += 1
        row["ms"] += stop - start
        kinds[kind_of(name)] += stop - start
        gaps += max(0.0, start - end)
        end = max(end, stop)
    return Profile(sorted(rows.values(), key=lambda row: -row["ms"]), {**kinds, "gaps": gaps})


def lines(found: Profile, most: int = 25) -> list[str]:
    """A compact table: the kinds, then the kernels that take the most."""
    shown = [" | ".join(f"{kind} {ms:.2f}" for kind, ms in found.kinds.items() if ms)] if found.kinds else []
    return shown + [f"{row['ms']:9.3f} ms {row['calls']:5} x {row['name'][:90]}" for row in found.kernels[:most]]
