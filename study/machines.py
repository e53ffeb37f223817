"""Which machines the raw results come from, and how far the same runs agree on two of them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from study.plan import EMA

Line = Mapping[str, Any]  # of the raw results
AGAIN = "again"  # folder of the raw results of runs that were made once more, on another machine


def kind(line: Mapping[str, Any]) -> str:
    """The GPU of a line, or else its processor."""
    machine = line.get("machine", {})
    return machine.get("gpu") or machine.get("processor", "unknown")


def repeats(lines: Iterable[Line], again: Iterable[Line]) -> list[tuple[Line, Line]]:
    """The judgements that were made twice, of the same small networks: the first one and the other."""
    first = {line["key"]: line for line in lines if line.get("weights") == EMA}
    same_networks = (line for line in again if line.get("networks") == first.get(line["key"], {}).get("networks"))
    return [(first[line["key"]], line) for line in same_networks if line["key"] in first]


def agreement(lines: Iterable[Line], again: Iterable[Line], keys: Sequence[str]) -> list[list[str]]:
    """The same judgements on two machines, beside the spread of the training seeds on the first one.

    Args:
        lines: of the raw results.
        again: of the runs that were made once more.
        keys: metrics to compare, positive numbers.

    Returns:
        The rows of a table, its head first; no others if nothing was made twice. Differences are relative to the mean of the
        two values.
    """
    pairs = repeats(lines, again)
    seeds: dict[tuple[Any, ...], list[Mapping[str, float]]] = {}
    for line, _ in pairs:
        seeds.setdefault(tuple(line[name] for name in ("data", "teacher", "row", "step")), []).append(line["metrics"])
    body = []
    for key in keys:
        machines = [apart(a["metrics"][key], b["metrics"][key]) for a, b in pairs if key in a["metrics"]]
        spread = [apart(a[key], b[key]) for same in seeds.values() for a, b in combinations(same, 2) if key in a]
        if machines:
            cells = [np.median(machines), max(machines), np.median(spread) if spread else None]
            body.append([key, str(len(machines)), *("-" if x is None else f"{100 * x:.2g} %" for x in cells)])
    names = " and ".join(sorted({kind(line) for pair in pairs for line in pair}))
    return [["metric", "judgements", f"apart on {names}, median", "largest", "two training seeds apart, median"], *body]


def apart(a: float, b: float) -> float:
    """How far two numbers are apart, relative to their mean."""
    return abs(a - b) / ((a + b) / 2) if a + b else 0.0
