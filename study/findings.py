"""What the raw results of one level hold: its rows, feature spaces and floors, and how two rows compare."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluations.seeds import Mean, mean_of
from study.curves import SPREAD, UNKNOWN, Curves, Row
from study.ledger import Ledger
from study.plan import DATA, EMA, NO_TEACHER, RAW, TITLES, row_title, runs, teacher_title
from study.settings import StudyConfig


class Space(NamedTuple):
    """A judge's feature space: its key in the metrics and its name."""

    key: str
    title: str


class Reached(NamedTuple):
    """EP@k of a row: the steps that it takes to a value of SiT's, and how many times fewer steps and FLOPs these are."""

    steps: Mean
    fewer_steps: Mean
    fewer_flops: Mean


class Findings:
    """The raw results of one level."""

    def __init__(self, settings: StudyConfig, again: Sequence[Mapping[str, Any]] = ()) -> None:
        """Read them; the lines of runs that were made `again` take the place of the first ones."""
        self.settings = settings
        second = {line["key"]: line for line in again}
        lines = Ledger(settings.results / f"{settings.level}.jsonl").lines()
        self.lines = [second.get(line["key"], line) for line in lines]
        self.curves, self.raw = Curves(self.lines, EMA), Curves(self.lines, RAW)
        fds = dict.fromkeys(key for line in self.lines for key in line["metrics"] if key.startswith("fd_"))
        own_first = sorted(fds, key=lambda key: key != "fd_judge")  # the level's own judge, where it has one
        self.spaces = [Space(key, key.removeprefix("fd_")) for key in own_first]
        self.steps = sorted({step for row in self.curves.runs for step in self.curves.steps(row)})
        self.floors = {
            line["row"]: line["metrics"] for line in self.lines if line["row"] in ("held-out", "reconstructions")
        }

    def teachers(self, data: str) -> list[str]:
        """Those whose rows have been measured, in the order of the recipe."""
        named = dict.fromkeys(s.teacher for s in runs(self.settings) if s.data == data and s.teacher != NO_TEACHER)
        measured = {row.teacher for row in self.curves.runs if row.data == data}
        return [teacher for teacher in named if teacher in measured]

    def rows(self, data: str, teacher: str) -> list[Row]:
        """The measured rows of one teacher, SiT first."""
        found = [self.curves.row(data, teacher, name) for name in TITLES]
        return [row for row in found if row in self.curves.runs]

    def changed(self) -> dict[Row, Row]:
        """The measured rows with changed settings or class tokens, each with the row that it changes."""
        rows = [row for row in self.curves.runs if row.data not in DATA or row.row not in TITLES]
        return {row: Row(row.data.split(":")[0], row.teacher, row.row.split("+")[0]) for row in rows}

    def machines(self, row: Row, *seeds: Sequence[int]) -> set[str]:
        """Those that the judged steps of a row come from, of these lists of seeds alone if any are given."""
        known = self.curves.machines.items()
        wanted = {seed for some in seeds for seed in some} if seeds else {seed for (_, seed), _ in known}
        return {name for (one, seed), names in known if one == row and seed in wanted for name in names}

    def verdicts(self, row: Row, base: Row, step: int) -> dict[str, str]:
        """The verdict in each space, by its name."""
        return {space.title: self.curves.verdict(row, base, step, space.key) for space in self.spaces}

    def verdict(self, row: Row, base: Row, step: int) -> str:
        """The verdict if all spaces agree on it; else that nothing is known beyond the spread."""
        found = set(self.verdicts(row, base, step).values())
        return found.pop() if len(found) == 1 else UNKNOWN if UNKNOWN in found else SPREAD

    def reached(self, row: Row, base: Row, step: int, key: str) -> Reached | None:
        """When a row comes to the mean value that SiT, `base`, has after a step; None if one of its seeds does not, or was
        past it at its first checkpoint."""
        values = self.curves.at(base, step, key)
        passed = self.curves.passes(row, key, float(np.mean(list(values.values())))) if values else {}
        known = [value for value in passed.values() if value is not None]
        if not known or len(known) < len(passed) or min(known) <= self.steps[0]:
            return None
        factors = [step / value for value in known]
        flops = [factor * self.curves.flops[base] / self.curves.flops[row] for factor in factors]
        return Reached(mean_of(known), mean_of(factors), mean_of(flops))


def label(row: Row) -> str:
    """Title of a row, and its teacher where it has one."""
    return row_title(row.row) if row.teacher == NO_TEACHER else f"{row_title(row.row)}, {teacher_title(row.teacher)}"


def sit_of(rows: Sequence[Row]) -> Row | None:
    """The row that others are compared with, where it is among them."""
    return next((row for row in rows if row.row == "sit"), None)
