"""Reports of training runs: curves, sample grids, tables and commands as one HTML file and one PNG.

`python -m evaluations.report --runs runs/a runs/b --out report.html` reads metrics.jsonl, previews/*.png and
results*.json of each run folder.
"""

if not __package__:  # run as a file
    __import__("script")  # starts it again as a module

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.files import parse_json, replacing, write_text
from common.reporting import run, say
from config import MissingFile, UserError, parse
from evaluations import results
from evaluations.settings import ReportConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn first, in this order, when a run logs them; all other numbers follow by name
CURVES = ("loss", "velocity", "class_velocity", "alignment", "fd", "fid", "grad_norm", "lr", "images_per_second")
NOT_CURVES = ("step", "epoch", "time", "seconds", "hours_left")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .3em 0; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; }
figure img { image-rendering: pixelated; max-width: 100%; border: 1px solid #ddd; }
img.curves { max-width: 100%; }
figcaption { font-size: 13px; color: #555; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }
"""


Drawing = Callable[["Axes"], None]
Band = tuple[float, int, list[Drawing]]


class Table(NamedTuple):
    """A titled table; `rows` hold as many texts as `header`."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Curve(NamedTuple):
    """One logged number of one run."""

    steps: list[float]
    values: list[float]


class Report(NamedTuple):
    """What a report shows, in this order but for the curves, which come after the images.

    runs: name -> run folder, whose metrics.jsonl gives the curves. images: (caption, PNG).
    """

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    runs: Mapping[str, Path]
    images: Sequence[tuple[str, Path]]
    commands: Sequence[str] = ()

    def curves(self) -> dict[str, dict[str, Curve]]:
        """Run name -> curves; see `read_curves`."""
        return {name: read_curves(folder) for name, folder in self.runs.items()}


def write_html(report: Report, file: Path) -> None:
    """Write one HTML file that needs no other: curves and images are inside it.

    Raises:
        UserError: an image is missing, metrics.jsonl is broken, or a table is ragged.
    """
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in report.summary]
    parts += [_html_table(table) for table in report.tables]
    if report.images:
        parts.append("<h2>Images</h2>")
    for caption, image in report.images:
        picture = f'<img alt="{html.escape(caption)}" src="{_data_uri(_read_png(image))}">'
        parts.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    figure = _curve_figure(report.curves())
    if figure is not None:
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        parts.append(f'<h2>Training</h2><img class="curves" alt="curves" src="{_data_uri(stream.getvalue())}">')
    if report.commands:
        parts.append(f"<h2>Commands</h2><pre>{html.escape(chr(10).join(report.commands))}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_text(file, page)


def write_png(report: Report, file: Path) -> None:
    """Write the content of `write_html` as one picture, of the curves only those of CURVES. Raises as `write_html`."""
    curves = report.curves()
    names = [name for name in _curve_names(curves) if name in CURVES]
    # Bands from top to bottom: inches in height, with 0.5 for titles; columns; what draws each of them.
    bands: list[Band] = []
    if report.summary:
        bands.append(_text_band(report.summary))
    for table in report.tables:
        bands.append((0.22 * len(table.rows) + 0.72, 1, [partial(_draw_table, table=table)]))
    pictures: list[Drawing] = [partial(_draw_image, caption=caption, image=image) for caption, image in report.images]
    bands += [(3.9, 3, pictures[start : start + 3]) for start in range(0, len(pictures), 3)]
    plots: list[Drawing] = [partial(_draw_curve, name=name, curves=curves) for name in names]
    bands += [(2.8, 3, plots[start : start + 3]) for start in range(0, len(plots), 3)]
    if report.commands:
        bands.append(_text_band(["Commands:", *report.commands]))
    heights = [height for height, _, _ in bands] or [1.0]
    total = sum(heights) + 0.6
    figure = _figure(12, total)
    figure.suptitle(report.title, fontsize=15, y=1 - 0.3 / total)
    top = 1 - 0.6 / total
    for height, columns, drawings in bands:
        bottom = top - height / total
        grid = figure.add_gridspec(1, columns, left=0.06, right=0.97, wspace=0.2, top=top - 0.5 / total, bottom=bottom)
        for column, draw in enumerate(drawings):
            draw(figure.add_subplot(grid[0, column]))
        top = bottom
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _text_band(lines: Sequence[str]) -> Band:
    import textwrap

    wrapped = [textwrap.fill(line, 130, subsequent_indent="    ", break_long_words=False) for line in lines]
    text = "\n".join(wrapped)
    return 0.17 * text.count("\n") + 0.7, 1, [partial(_draw_text, text=text)]


def read_curves(folder: Path) -> dict[str, Curve]:
    """All numbers logged in metrics.jsonl of a run folder, by name; a step logged again (after a resume) counts once."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise MissingFile(f"{file} does not exist; is {folder} the folder of a training run?")
    points: dict[str, dict[float, float]] = {}
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, str(file))
            step = entry["step"]
        except (UserError, KeyError, TypeError) as error:
            if number == len(lines):
                continue  # a run that was killed, or still writes
            raise UserError(f"{file}, line {number}, is not a JSON object with a step") from error
        for name, value in entry.items():
            if name in NOT_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                points.setdefault(name, {})[step] = value
    return {name: Curve(sorted(by_step), [by_step[s] for s in sorted(by_step)]) for name, by_step in points.items()}


def _curve_names(curves: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    found = {name for run_curves in curves.values() for name in run_curves}
    return [name for name in CURVES if name in found] + sorted(found - set(CURVES))


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))  # without pyplot: no global state, no display
    FigureCanvasAgg(figure)
    return figure


def _curve_figure(curves: Mapping[str, Mapping[str, Curve]]) -> "Figure | None":
    names = _curve_names(curves)
    if not names:
        return None
    rows = math.ceil(len(names) / 3)
    figure = _figure(12, 2.7 * rows)
    for place, name in enumerate(names, start=1):
        _draw_curve(figure.add_subplot(rows, 3, place), name, curves)
    figure.tight_layout()
    return figure


def _draw_curve(axes: "Axes", name: str, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    for number, (run_name, run_curves) in enumerate(curves.items()):
        if name in run_curves:
            curve, colour = run_curves[name], COLOURS[number % len(COLOURS)]
            few = len(curve.steps) < 30
            axes.plot(
                curve.steps, curve.values, color=colour, label=run_name, lw=1.3, marker="o" if few else None, ms=3
            )
    axes.set_title(name.replace("_", " "), fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if len(curves) > 1:
        axes.legend(fontsize=7)


def _draw_text(axes: "Axes", text: str) -> None:
    axes.axis("off")
    axes.text(0, 1, text, fontsize=9, va="top", family="monospace", transform=axes.transAxes)


def _draw_image(axes: "Axes", caption: str, image: Path) -> None:
    import textwrap

    import matplotlib.image

    axes.imshow(matplotlib.image.imread(io.BytesIO(_read_png(image)), format="png"), cmap="gray")
    axes.set_title(textwrap.fill(caption, 50, break_long_words=False), fontsize=9)
    axes.axis("off")


def _draw_table(axes: "Axes", table: Table) -> None:
    _check_table(table)
    axes.axis("off")
    axes.set_title(table.title, fontsize=10, loc="left")
    if not table.rows:
        return
    drawn = axes.table(cellText=[list(row) for row in table.rows], colLabels=list(table.header), loc="upper left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.25)
    drawn.auto_set_column_width(list(range(len(table.header))))


def _check_table(table: Table) -> None:
    for row in table.rows:
        if len(row) != len(table.header):
            raise UserError(f"table {table.title!r}: a row has {len(row)} cells, the header {len(table.header)}")


def _html_table(table: Table) -> str:
    _check_table(table)
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in table.header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<table><caption>{html.escape(table.title)}</caption>\n<tr>{head}</tr>\n{body}</table>"


def _read_png(file: Path) -> bytes:
    if not Path(file).is_file():
        raise MissingFile(f"image {file} does not exist")
    return Path(file).read_bytes()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


EXAMPLES = (
    "python -m evaluations.report --runs runs/sit-b2 runs/reg-b2 --out report.html",
    "python -m evaluations.report --runs runs/mine --results samples/mine/results.json",
)


def main() -> None:
    settings = parse(ReportConfig, "Report on training runs.", examples=EXAMPLES)
    names = {str(folder): folder for folder in settings.runs}
    if len({folder.name for folder in settings.runs}) == len(settings.runs):
        names = {folder.name: folder for folder in settings.runs}
    images, files = [], list(settings.results)
    for name, folder in names.items():
        files += sorted(folder.glob("**/results*.json"))
        previews = sorted(folder.glob("previews/*.png"))
        images += [(f"{name}, {previews[-1].stem.replace('_', ' ')}", previews[-1])] if previews else []
        images += [(f"{name}, {grid.parent.name}", grid) for grid in sorted(folder.glob("**/grid.png"))]
    tables = [_last_values(names)]
    if files:
        head, *rows = results.table([results.load(file) for file in dict.fromkeys(files)])
        tables.append(Table("Metrics", head, rows))
    summary = [f"{name}: {folder}" for name, folder in names.items()]
    report = Report(settings.title, summary, tables, names, images)
    write_html(report, settings.out)
    write_png(report, settings.out.with_suffix(".png"))
    say(f"wrote {settings.out} and {settings.out.with_suffix('.png')}")


def _last_values(runs: Mapping[str, Path]) -> Table:
    """The last logged value of every curve, one row for each run."""
    curves = {name: read_curves(folder) for name, folder in runs.items()}
    names = _curve_names(curves)
    rows = []
    for run_name, found in curves.items():
        last = max((curve.steps[-1] for curve in found.values()), default=0)
        rows.append([run_name, f"{last:g}", *(f"{found[n].values[-1]:.4g}" if n in found else "-" for n in names)])
    return Table("Last logged values", ["Run", "Step", *(name.replace("_", " ") for name in names)], rows)


if __name__ == "__main__":
    run(main)
