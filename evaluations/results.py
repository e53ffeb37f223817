"""What a run of evaluate.py leaves: numbers with their protocol, warnings, one row of Markdown."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import existing, read_json, write_text
from config import UserError
from evaluations.registry import COLUMNS, Column, Metric
from evaluations.sidecars import sampler_cells

SCHEMA = 1


@dataclass
class Results:
    """metrics: by key, `fid` or `fd_SPACE`. protocol: everything that decides whether two rows may be compared."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    name: str = ""

    def save(self, path: Path) -> None:
        """Write JSON (values and errors flat, by key), and the Markdown row beside it with the suffix .md."""
        content = {
            "schema": SCHEMA,
            "name": self.name,
            "metrics": {key: metric.value for key, metric in self.metrics.items()},
            "errors": {key: metric.error for key, metric in self.metrics.items()},
            "measured": {
                key: {"space": metric.space, "n_samples": metric.n_samples, "n_reference": metric.n_reference}
                for key, metric in self.metrics.items()
            },
            "protocol": self.protocol,
            "warnings": self.warnings,
        }
        write_text(path, json.dumps(content, indent=2) + "\n")
        write_text(path.with_suffix(".md"), markdown([self]))


def check_writable(path: Path) -> None:
    """Look, before the work begins, whether a results file can be written; nothing is made.

    Raises:
        UserError: the file could not be written.
    """
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file, such as {path / 'results.json'}")
    there = existing(path.parent)
    if not there.is_dir():
        raise UserError(f"{path.parent} cannot be made ({there} is a file); give another --out")
    if not os.access(there, os.W_OK):
        raise UserError(f"results cannot be written to {path.parent} (it is read-only); give another --out")


def load(path: Path) -> Results:
    """Read results.json.

    Raises:
        UserError: names the file; MissingFile without it.
    """
    content = read_json(path)
    try:
        schema = content["schema"]
        if schema != SCHEMA:
            raise UserError(f"{path} has schema {schema}, this program reads {SCHEMA}")
        errors, measured = content["errors"], content["measured"]
        metrics = {key: Metric(value, errors[key], **measured[key]) for key, value in content["metrics"].items()}
        return Results(metrics, content["protocol"], content["warnings"], content["name"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by evaluations/evaluate.py ({error})") from error


def format_value(column: Column, metric: Metric | None) -> str:
    """Value with the decimal places of its column and, where known, its standard error."""
    if metric is None:
        return "-"
    text = f"{metric.value:.{column.digits}f}"
    return text if metric.error is None else f"{text} ± {metric.error:.{column.digits}f}"


def columns(results: Sequence[Results]) -> list[Column]:
    """Columns of all metrics in any result, in the order of the registry; titled e.g. "FD dinov2" in other spaces."""
    order, found = list(COLUMNS), []
    for key in dict.fromkeys(key for result in results for key in result.metrics):
        stem = max((stem for stem in order if key == stem or key.startswith(stem + "_")), key=len, default=None)
        if stem is None:
            found.append((len(order), Column(key, key, 4)))
        else:
            title = f"{COLUMNS[stem].title} {key[len(stem) + 1 :]}".strip()
            found.append((order.index(stem), COLUMNS[stem]._replace(key=key, title=title)))
    return [column for _, column in sorted(found, key=lambda entry: entry[0])]


def table(results: Sequence[Results]) -> list[list[str]]:
    """Header, and one row for each result: its settings and its metrics."""
    shown = columns(results)
    rows = [["Samples", "n", "Sampler", "Guidance", *(column.title for column in shown)]]
    for result in results:
        settings = [result.name, str(result.protocol.get("n_samples", "-")), *sampler_cells(result.protocol)]
        rows.append(settings + [format_value(column, result.metrics.get(column.key)) for column in shown])
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows of texts, the header first."""
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    return "\n".join([lines[0], "|".join(["-"] * len(rows[0])), *lines[1:]]) + "\n"


def markdown(results: Sequence[Results]) -> str:
    """One table, one row for each result, with the settings that define it."""
    return as_markdown(table(results))
