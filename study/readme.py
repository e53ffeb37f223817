"""The README's table of the study, between two markers: written by `python -m study report`, as the page is."""

from collections.abc import Iterable
from pathlib import Path

from common.files import write_text
from config import UserError
from evaluations.results import as_markdown
from evaluations.seeds import mean_of
from study.curves import LOWER
from study.findings import Findings
from study.levels import SUPERVISED
from study.plan import DATA, IN_WORDS, TITLES
from study.settings import LEVELS

BEGIN, END = "<!-- written by python -m study report -->", "<!-- end of what it writes -->"
ROWS = ("sit", "repa", "reg")


def summary(found: Findings) -> list[list[str]]:
    """A line without and one with labels, where all of ROWS are measured: the first space's FD at the step of the headline;
    bold where it is lower than SiT's in all spaces."""
    body, step, metric = [], found.settings.headline, found.spaces[0].key
    for data in reversed(DATA):
        rows = [found.curves.row(data, SUPERVISED, name) for name in ROWS]
        values = [list(found.curves.at(row, step, metric).values()) for row in rows]
        if all(values):
            cells = [mean_of(one).text(2) for one in values]
            ahead = [found.verdict(row, rows[0], step) == LOWER for row in rows]
            title = f"{LEVELS[found.settings.level]} {IN_WORDS[data]}, {step:,} steps"
            body.append([title, *(f"**{text}**" if lower else text for text, lower in zip(cells, ahead))])
    return body


def fill(readme: Path, body: Iterable[list[str]]) -> None:
    """Put the table between the markers of a file, the rest of which stays.

    Raises:
        UserError: the file lacks a marker.
    """
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{readme} has no place for the table: add the lines {BEGIN!r} and {END!r}")
    table = as_markdown([["images", *(TITLES[name] for name in ROWS)], *body])
    write_text(readme, f"{head}{BEGIN}\n{table}{END}{tail}")
