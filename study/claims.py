"""Where the paper's claim holds: an answer for each pair of rows, and their verdict at each step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Row
from study.findings import Findings, label
from study.plan import DATA, IN_WORDS, TITLES, data_title
from study.settings import LEVELS

PAIRS = (("reg", "sit"), ("repa", "sit"), ("reg", "repa"))


class Comparison(NamedTuple):
    """Two rows with the same images, labels and teacher. seeds: of which both have a judgement, for each judged step."""

    data: str
    teacher: str
    row: Row
    base: Row
    seeds: dict[int, list[int]]


def comparisons(found: Findings, name: str, other: str) -> Iterator[Comparison]:
    """Those of one pair of rows that a level has."""
    for data in DATA:
        for teacher in found.teachers(data):
            row, base = (found.curves.row(data, teacher, one) for one in (name, other))
            shared = {step: found.curves.shared(row, base, step, found.spaces[0].key) for step in found.steps}
            seeds = {step: some for step, some in shared.items() if some}
            if seeds:
                yield Comparison(data, teacher, row, base, seeds)


def answer(levels: Sequence[Findings], name: str, other: str) -> str:
    """One paragraph: where a row is lower than another in all feature spaces, where higher, and where neither."""
    sure: dict[str, list[str]] = {LOWER: [], HIGHER: []}
    unsure: dict[str, list[str]] = {SPREAD: [], UNKNOWN: []}
    for found in levels:
        for one in comparisons(found, name, other):
            where = f"{LEVELS[found.settings.level]} {IN_WORDS[one.data]}, {one.teacher} teacher"
            steps: dict[str, list[int]] = {}
            for step in one.seeds:
                steps.setdefault(found.verdict(one.row, one.base, step), []).append(step)
            for verdict, places in sure.items():
                if verdict in steps:
                    places.append(f"{where} (after {comma_separated(steps[verdict])} steps)")
            if not sure.keys() & steps.keys():
                unsure[SPREAD if SPREAD in steps else UNKNOWN].append(where)
    said = [f"{verdict} in all feature spaces: {'; '.join(places)}" for verdict, places in sure.items() if places]
    said = said or ["nowhere lower or higher in all feature spaces"]
    rest = [f"{upper(verdict)}: {'; '.join(places)}" for verdict, places in unsure.items() if places]
    return f"- **{TITLES[name]} against {TITLES[other]}**: {'. '.join(['; '.join(said), *rest])}."


def changes(found: Findings) -> str | None:
    """One paragraph: which changed settings and class tokens leave the row that they change, in which spaces."""
    said: dict[str, dict[str, list[int]]] = {}
    for row, plain in found.changed().items():
        for step in dict.fromkeys((found.settings.headline, found.steps[-1])):
            verdicts = found.verdicts(row, plain, step)
            for verdict in (LOWER, HIGHER):
                spaces = [title for title, one in verdicts.items() if one == verdict]
                where = (
                    "all feature spaces"
                    if len(spaces) == len(verdicts)
                    else f"the space of {' and '.join(spaces)} alone"
                )
                name = f"{data_title(row.data)}: {label(row)}"
                if spaces:
                    said.setdefault(f"{verdict} in {where}", {}).setdefault(name, []).append(step)
    parts = [
        f"{how}: {'; '.join(f'{name} (after {comma_separated(steps)} steps)' for name, steps in names.items())}"
        for how, names in said.items()
    ]
    return f"- **Changes of a row, {LEVELS[found.settings.level]}**: {'. '.join(map(upper, parts))}." if parts else None


def comma_separated(steps: Sequence[int]) -> str:
    """`500, 1,000`"""
    return ", ".join(f"{step:,}" for step in steps)


def upper(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def answers(levels: Sequence[Findings]) -> Iterator[str]:
    """An answer for each pair, and for the changed rows of each level."""
    yield from (answer(levels, *pair) for pair in PAIRS if any(any(comparisons(found, *pair)) for found in levels))
    yield from filter(None, map(changes, levels))


def verdicts(found: Findings) -> list[list[str]]:
    """The pairs of a level by steps; the last column is EP@k at the headline's step, of rows beside SiT."""
    headline, space = found.settings.headline, found.spaces[0]
    body = []
    for name, other in PAIRS:
        for one in comparisons(found, name, other):
            counts = sorted({len(seeds) for seeds in one.seeds.values()})
            kinds = {kind for row in (one.row, one.base) for kind in found.machines(row, *one.seeds.values())}
            seeds = " to ".join(map(str, counts[:: max(len(counts) - 1, 1)]))
            seeds += f" on {' and '.join(sorted(kinds))}" if len(kinds) > 1 else ""
            cells = [cell(found.verdicts(one.row, one.base, step)) if step in one.seeds else "" for step in found.steps]
            reached = found.reached(one.row, one.base, headline, space.key) if other == "sit" else None
            fewer = reached.fewer_steps.text(2) if reached else ""
            pair = f"{TITLES[name]} against {TITLES[other]}"
            body.append([pair, IN_WORDS[one.data], one.teacher, seeds, *cells, fewer])
    steps = [f"{step:,}" for step in found.steps]
    return [["rows", "labels", "teacher", "seeds", *steps, f"times fewer steps to SiT's FD at {headline:,}"], *body]


def cell(verdicts: dict[str, str]) -> str:
    """`**lower**` in all spaces, `lower: judge` in one alone, a dot for none."""
    kinds = set(verdicts.values())
    if UNKNOWN in kinds:
        return UNKNOWN
    if len(kinds) == 1:
        return "·" if kinds == {SPREAD} else f"**{kinds.pop()}**"
    return "; ".join(f"{verdict}: {title}" for title, verdict in verdicts.items() if verdict != SPREAD)
