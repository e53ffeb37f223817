"""Raw results as curves over training: by row and seed, what differs between rows, and when a value is reached."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evaluations.seeds import LEAST, sign
from study.machines import kind
from study.plan import NO_TEACHER

LOWER, HIGHER, SPREAD, UNKNOWN = "lower", "higher", "within the spread", "too few seeds"


class Row(NamedTuple):
    """What all seeds of a curve share."""

    data: str
    teacher: str
    row: str


Metrics = Mapping[str, float]


class Curves:
    """The judged steps of all runs of a level: row => seed => step => metrics."""

    def __init__(self, lines: Iterable[Mapping[str, Any]], weights: str) -> None:
        """Sort the lines of a ledger.

        Args:
            lines: those without a step, such as floors, are left out.
            weights: which ones to take, "ema" or "raw".
        """
        self.runs: dict[Row, dict[int, dict[int, Metrics]]] = {}
        self.flops: dict[Row, int] = {}
        self.machines: dict[tuple[Row, int], set[str]] = {}  # of the judged steps of one seed
        for line in lines:
            if line.get("weights") == weights:
                row = Row(line["data"], line["teacher"], line["row"])
                self.runs.setdefault(row, {}).setdefault(line["seed"], {})[line["step"]] = line["metrics"]
                self.flops[row] = line["train_flops_per_image"]
                self.machines.setdefault((row, line["seed"]), set()).add(kind(line))

    def row(self, data: str, teacher: str, name: str) -> Row:
        """The key of a row beside others of a teacher; a row that reads no teacher is the same beside each."""
        alone = Row(data, NO_TEACHER, name)
        return alone if alone in self.runs else Row(data, teacher, name)

    def at(self, row: Row, step: int, metric: str) -> dict[int, float]:
        """Seed => value after a step, of the seeds that have it."""
        runs = sorted(self.runs.get(row, {}).items())
        return {seed: found[step][metric] for seed, found in runs if metric in found.get(step, {})}

    def steps(self, row: Row) -> list[int]:
        """The steps at which any seed of a row was judged."""
        return sorted({step for steps in self.runs.get(row, {}).values() for step in steps})

    def shared(self, row: Row, other: Row, step: int, metric: str) -> list[int]:
        """The seeds of which both rows have a metric."""
        return sorted(self.at(row, step, metric).keys() & self.at(other, step, metric).keys())

    def verdict(self, row: Row, other: Row, step: int, metric: str) -> str:
        """Whether the metric of a row is lower or higher than that of another one, over the seeds that both have."""
        a, b = self.at(row, step, metric), self.at(other, step, metric)
        shared = self.shared(row, other, step, metric)
        if len(shared) < LEAST:
            return UNKNOWN
        return {-1: LOWER, 0: SPREAD, 1: HIGHER}[sign([a[s] for s in shared], [b[s] for s in shared])]

    def passes(self, row: Row, metric: str, target: float, *, larger: bool = False) -> dict[int, float | None]:
        """EP@k: seed => steps until the metric of a row first passes `target`; see `first_pass`."""
        found = {}
        for seed, steps in sorted(self.runs.get(row, {}).items()):
            points = [(step, metrics[metric]) for step, metrics in sorted(steps.items()) if metric in metrics]
            found[seed] = first_pass([s for s, _ in points], [v for _, v in points], target, larger=larger)
        return found


def first_pass(steps: Sequence[int], values: Sequence[float], target: float, *, larger: bool = False) -> float | None:
    """The step at which a curve first passes a value, linear in log(step) between checkpoints; None if it does not.

    Args:
        steps: of the checkpoints, increasing.
        values: at each.
        target: the value.
        larger: whether to pass it means to rise to it, instead of falling to it. A curve that is past it at its first
            checkpoint gives that one, an upper bound.
    """
    ahead = [value - target if larger else target - value for value in values]
    for number, distance in enumerate(ahead):
        if distance >= 0:
            if number == 0:
                return float(steps[0])
            part = ahead[number - 1] / (ahead[number - 1] - distance)
            low, high = math.log(steps[number - 1]), math.log(steps[number])
            return math.exp(low + part * (high - low))
    return None
