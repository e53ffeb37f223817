"""Where the paper's claim holds: an answer for each pair of rows, and their verdict at each step."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from study.curves import HIGHER, LOWER, SPREAD, UNKNOWN, Row
from study.findings import Findings, label
from study.machines import Line, repeats
from study.plan import DATA, IN_WORDS, TITLES, data_title, teacher_title
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


def sentence(levels: Sequence[Findings]) -> str:
    """Where REG is lower than SiT in all feature spaces after some of its steps, and where it is not."""
    places: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for found in levels:
        for one in comparisons(found, "reg", "sit"):
            verdicts = {found.verdict(one.row, one.base, step) for step in one.seeds}
            if verdicts != {UNKNOWN}:
                where = f"{LEVELS[found.settings.level]} {IN_WORDS[one.data]}"
                places[LOWER in verdicts].setdefault(where, []).append(teacher_title(one.teacher))
    yes, no = (
        "; ".join(f"{where} ({', '.join(teachers)} teacher)" for where, teachers in some.items())
        for some in (places[True], places[False])
    )
    said = f"After some of its steps {TITLES['reg']} has a lower Frechet distance than {TITLES['sit']}"
    return f"**{said}, beyond the spread of the training seeds, on: {yes or 'nothing'}. It has none on: {no or 'nothing'}.**"


def answer(levels: Sequence[Findings], name: str, other: str) -> str:
    """In how many comparisons a row is lower or higher than another in all feature spaces, and a list of them."""
    places: dict[str, list[str]] = {LOWER: [], HIGHER: [], SPREAD: [], UNKNOWN: []}
    known = 0
    for found in levels:
        for one in comparisons(found, name, other):
            level, teacher = LEVELS[found.settings.level], teacher_title(one.teacher)
            where = f"{level} {IN_WORDS[one.data]}, {teacher} teacher"
            steps: dict[str, list[int]] = {}
            for step in one.seeds:
                steps.setdefault(found.verdict(one.row, one.base, step), []).append(step)
            known += steps.keys() != {UNKNOWN}
            for verdict in steps.keys() & {LOWER, HIGHER}:
                places[verdict].append(f"{where} (after {comma_separated(steps[verdict])} steps)")
            if not steps.keys() & {LOWER, HIGHER}:
                places[SPREAD if SPREAD in steps else UNKNOWN].append(where)
    said = f"lower in {len(places[LOWER])} and higher in {len(places[HIGHER])} of {known} comparisons"
    lines = [f"- **{TITLES[name]} against {TITLES[other]}**: {said if known else UNKNOWN}"]
    return "\n".join([*lines, *(f"  - {verdict}: {'; '.join(some)}" for verdict, some in places.items() if some)])


def changes(found: Findings) -> str | None:
    """Which changed settings and class tokens leave the row that they change, in which spaces."""
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
        f"  - {how}: {'; '.join(f'{name} (after {comma_separated(steps)} steps)' for name, steps in names.items())}"
        for how, names in said.items()
    ]
    return "\n".join([f"- **Changes of a row, {LEVELS[found.settings.level]}**", *parts]) if parts else None


def turned(found: Findings, again: Iterable[Line]) -> str | None:
    """Which verdicts in all feature spaces are others with the second runs in the place of the first; None without any."""
    other = Findings(found.settings, [second for _, second in repeats(found.lines, again)])
    count, places = 0, []
    for name, base in PAIRS:
        for one in comparisons(found, name, base):
            for step in one.seeds:
                rows, key = (one.row, one.base), found.spaces[0].key
                count += any(found.curves.at(row, step, key) != other.curves.at(row, step, key) for row in rows)
                before, after = (side.verdict(*rows, step) for side in (found, other))
                if before != after:
                    where = f"{IN_WORDS[one.data]}, {teacher_title(one.teacher)} teacher, {step:,} steps"
                    places.append(f"{TITLES[name]} against {TITLES[base]}, {where} ({before}, then {after})")
    said = f"{len(places)} of {count} verdicts in all feature spaces are others"
    return (
        f"With the second runs in the place of the first, {said}{': ' * bool(places)}{'; '.join(places)}.\n"
        if count
        else None
    )


def comma_separated(steps: Sequence[int]) -> str:
    """`500, 1,000`"""
    return ", ".join(f"{step:,}" for step in steps)


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
            body.append([pair, IN_WORDS[one.data], teacher_title(one.teacher), seeds, *cells, fewer])
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
