"""Pictures of docs/reproduction.md: curves with the spread of the seeds, and samples of the rows side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import replacing
from study.curves import Curves, Row
from study.plan import NO_TEACHER

COLOURS = {"sit": "#57606a", "token": "#d9730d", "repa": "#2da44e", "reg": "#1f6feb"}
STYLES = ("-", "--", ":")


class Panel(NamedTuple):
    """One pair of axes: a metric; of all rows over the mean of `base` at the same step, where it is given."""

    title: str
    metric: str
    base: Row | None = None


def draw_curves(file: Path, curves: Curves, rows: Sequence[tuple[str, Row]], panels: Sequence[Panel]) -> None:
    """Curves over the steps: the mean over seeds, between their smallest and largest value.

    Args:
        file: PNG to write.
        curves: the results.
        rows: label and row of each curve.
        panels: in their order, two in a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(10.4, 3.6 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    teachers = list(dict.fromkeys(row.teacher for _, row in rows if row.teacher != NO_TEACHER))
    ticks = sorted({step for _, row in rows for step in curves.steps(row)})
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, 2, number)
        for label, row in rows:
            points = {step: _over(curves, row, step, panel) for step in curves.steps(row)}
            points = {step: values for step, values in points.items() if values}
            style = STYLES[teachers.index(row.teacher) % len(STYLES)] if row.teacher in teachers else "-"
            colour, steps = COLOURS.get(row.row, "#8250df"), list(points)
            axes.plot(steps, list(map(np.mean, points.values())), style, color=colour, marker="o", ms=3, label=label)
            axes.fill_between(
                steps, list(map(min, points.values())), list(map(max, points.values())), color=colour, alpha=0.12
            )
        axes.set(title=panel.title, xscale="log", xlabel="optimiser steps")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=80, format="png", metadata={"Software": None})
    _shrink(file)


def _over(curves: Curves, row: Row, step: int, panel: Panel) -> list[float]:
    values = list(curves.at(row, step, panel.metric).values())
    if panel.base is None:
        return values
    base = list(curves.at(panel.base, step, panel.metric).values())
    return [value / float(np.mean(base)) for value in values] if base else []


def draw_samples(file: Path, steps: Sequence[int], grid: Sequence[tuple[str, Mapping[int, Path]]]) -> None:
    """The first samples in a grid: one line for each row of the study, one column for each step.

    Args:
        file: PNG to write.
        steps: of the columns.
        grid: (name of the line, its picture by step).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    def upper(path: Path) -> np.ndarray:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        size = len(pixels) // 2
        return pixels[:size, : size * min(10, 400 // size)]  # of a width that a page can show

    pictures = [{step: upper(path) for step, path in line.items()} for _, line in grid]
    ratio = max(p.shape[0] / p.shape[1] for line in pictures for p in line.values())
    figure = Figure(figsize=(11, 0.4 + len(grid) * (9.2 / len(steps) * ratio + 0.06)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(grid), len(steps), squeeze=False)
    for cells, (name, _), line in zip(axes, grid, pictures):
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for one, step in zip(cells, steps):
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
            if step in line:
                one.imshow(line[step], interpolation="nearest")
    for one, step in zip(axes[0], steps):
        one.set_title(f"{step:,} steps", fontsize=9)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=80, format="png", metadata={"Software": None})
    _shrink(file)


def _shrink(file: Path) -> None:
    """Write a PNG again with 256 colours: a page shows many of them."""
    from PIL import Image

    few = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with replacing(file) as temporary:
        few.save(temporary, format="png", optimize=True)
