"""Results side by side: `python -m evaluations.compare A.json B.json ...`. Ranks only what one protocol measured."""

if __name__ == "__main__" and not __package__:  # run as a file: start again as a module of the project
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execv(sys.executable, [sys.executable, "-m", "evaluations.compare", *sys.argv[1:]])

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.reporting import run
from config import UserError, parse, setting
from evaluations.results import (
    Results,
    check_writable,
    columns,
    format_value,
    larger_is_better,
    load,
    markdown,
    sampler_cells,
    title,
)

# What decides a number besides the model and the sampler.
MEASUREMENT = (
    "n_samples",
    "image_size",
    "reference_sha256",
    "networks",
    "pr_dtype",
    "pr_reference",
    "split",
    "dtype",
)
# Of the samples' own description all counts but this: which model and seed, on which machine, how fast.
NOT_PROTOCOL = frozenset(
    {
        "schema",
        "n",
        "seed",
        "checkpoint",
        "checkpoint_sha256",
        "guide_sha256",
        "step",
        "versions",
        "seconds",
        "samples_per_second",
        "processes",
        "device",
        "per_proc_batch_size",
        "batches",
        "compile",
        "tf32",
        "vae_tiling",
        "class_token_names_label",
        "label_values_sha256",
        "vae_sha256",
    }
)


@dataclass(frozen=True)
class CompareConfig:
    results: tuple[Path, ...] = setting(help="results.json files", group="compare")
    across: tuple[str, ...] = setting(
        (), "protocol keys that may differ (cfg_scale, steps, ...), or all: rank all the same", group="compare"
    )
    out: Path | None = setting(None, "also write the table to this Markdown file", group="compare")


EXAMPLES = (
    "python -m evaluations.compare samples/a/results.json samples/b/results.json",
    "python -m evaluations.compare samples/*/results.json --across cfg_scale steps --out table.md",
)


def main() -> None:
    files_first = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    argv = ["--results", *sys.argv[1:]] if files_first else sys.argv[1:]
    settings = parse(CompareConfig, "Compare results of evaluate.py.", argv, examples=EXAMPLES)
    rows = [load(path) for path in settings.results]
    if len({row.name for row in rows}) < len(rows):
        for path, row in zip(settings.results, rows, strict=True):
            row.name = str(path)
    differing = differences(rows, settings.across)
    text = table(rows, ranked=not differing)
    print(text, end="")
    if settings.out is not None:
        check_writable(settings.out)
        settings.out.write_text(text)
    if differing:
        told = "; ".join(f"{key}: {' / '.join(map(str, values))}" for key, values in differing.items())
        raise UserError(
            f"these results are not ranked, their protocols differ in {told} (--across {' '.join(differing)} allows it)"
        )


def differences(rows: list[Results], across: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Protocol keys on which the rows differ, with each row's value; `across` names those that may.

    Raises UserError for a name in `across` that is no protocol key.
    """
    sampling = {key for row in rows for key in row.protocol.get("sampling", {})} - NOT_PROTOCOL
    known = {*MEASUREMENT, *(f"sampling.{key}" for key in sampling)}
    allowed = set()
    for key in across:
        full = key if key in known else f"sampling.{key}"
        if key != "all" and full not in known:
            raise UserError(f"--across {key}: no protocol key of that name ({', '.join(sorted(known))})")
        allowed.add(full)
    found = {}
    for key in sorted(known):
        values = [_value(row, key) for row in rows]
        if any(value != values[0] for value in values) and key not in allowed and "all" not in across:
            found[key] = [value if len(value) <= 40 else value[:37] + "..." for value in values]
    return found


def _value(row: Results, key: str) -> str:
    content: Any = row.protocol
    if key == "sampling.vae":  # two names may stand for the same weights
        sampling = content.get("sampling", {})
        content = {"sampling": {"vae": sampling.get("vae_sha256", sampling.get("vae"))}}
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return json.dumps(content, sort_keys=True)


def table(rows: list[Results], *, ranked: bool) -> str:
    """Markdown; when ranked, sorted by the first metric that all rows have, the best value of each column in bold."""
    keys = columns(rows)
    if not ranked:
        return markdown(rows)
    shared = [key for key in keys if all(key in row.metrics for row in rows)]
    if shared:
        rows = sorted(rows, key=lambda row: row.metrics[shared[0]].value, reverse=larger_is_better(shared[0]))
    head = ["Rank", "Samples", "n", "Sampler", "Guidance", *map(title, keys)]
    lines = [" | ".join(head), "|".join(["-"] * len(head))]
    for place, row in enumerate(rows, start=1):
        cells = [str(place), row.name, str(row.protocol.get("n_samples", "-")), *sampler_cells(row.protocol)]
        for key in keys:
            text = format_value(key, row.metrics.get(key))
            cells.append(f"**{text}**" if len(rows) > 1 and _is_best(row, rows, key) else text)
        lines.append(" | ".join(cells))
    return "\n".join(lines) + "\n"


def _is_best(row: Results, rows: list[Results], key: str) -> bool:
    if key not in row.metrics:
        return False
    values = [other.metrics[key].value for other in rows if key in other.metrics]
    best = max(values) if larger_is_better(key) else min(values)
    return row.metrics[key].value == best


if __name__ == "__main__":
    run(main)
