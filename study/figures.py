"""Pictures of docs/reproduction.md: curves with the spread of the seeds, and samples of the rows side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import replacing
from study.curves import Curves, Row

COLOURS = {"sit": "#57606a", "token": "#d9730d", "repa": "#2da44e", "reg": "#1f6feb"}
STYLES = ("-", "--", ":")


def draw_curves(file: Path, curves: Curves, panels: Sequence[tuple[str, str, Sequence[tuple[str, Row]]]]) -> None:
    """One panel for each metric and list of rows: the mean over seeds, between their smallest and largest value.

    Args:
        file: PNG to write.
        curves: the results.
        panels: title, metric, and (label, row) of each curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 3.8 * lines))
    FigureCanvasAgg(figure)
    for number, (title, metric, rows) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, 2, number)
        teachers = list(dict.fromkeys(row.teacher for _, row in rows))
        for label, row in rows:
            points = [(step, list(curves.at(row, step, metric).values())) for step in curves.steps(row)]
            points = [(step, values) for step, values in points if values]
            steps = [step for step, _ in points]
            colour = COLOURS.get(row.row, "#8250df")
            style = STYLES[max(teachers.index(row.teacher) - 1, 0) % len(STYLES)] if len(teachers) > 2 else "-"
            axes.plot(steps, [np.mean(v) for _, v in points], style, color=colour, marker="o", ms=3, label=label)
            axes.fill_between(steps, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15)
        axes.set(title=title, xscale="log", xlabel="optimiser steps")
        axes.set_xticks(ticks := sorted({step for _, row in rows for step in curves.steps(row)}), map(str, ticks))
        axes.minorticks_off()
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=80, format="png", metadata={"Software": None})
    _shrink(file)


def draw_samples(file: Path, grid: Sequence[tuple[str, Sequence[tuple[str, Path]]]]) -> None:
    """The first samples in a grid: one line for each row of the study, one column for each step.

    Args:
        file: PNG to write.
        grid: (name of the line, its (caption, picture) entries).
    """
    from PIL import Image

    from common.pictures import Cell, Line, write_sheet

    def upper(path: Path) -> np.ndarray:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        size = len(pixels) // 2
        pixels = pixels[:size, : size * min(10, 400 // size)]  # of a width that a page can show
        return pixels.repeat(scale := max(1, 32 // size), axis=0).repeat(scale, axis=1)

    cells = [[Cell(upper(path), (Line(name), Line(caption))) for caption, path in line] for name, line in grid]
    write_sheet(file, cells)
    _shrink(file)


def _shrink(file: Path) -> None:
    """Write a PNG again with 256 colours: a page shows many of them."""
    from PIL import Image

    few = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with replacing(file) as temporary:
        few.save(temporary, format="png", optimize=True)
