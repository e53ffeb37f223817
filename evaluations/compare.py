"""Results side by side: `python -m evaluations.compare A.json B.json ...`. Only results of one protocol are ranked."""

if not __package__:  # run as a file
    __import__("script")  # starts it again as a module

import json
import sys
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from common.files import write_text
from common.reporting import run, say
from config import REMOVED, UserError, parse
from config import differences as differing_settings
from evaluations.results import Results, as_markdown, check_writable, columns, load, table
from evaluations.seeds import mean_of, sign
from evaluations.settings import CompareConfig

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
# Everything in the samples' own description counts but this: which model and seed, on which machine, how fast.
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
        "files",
        "vae_sha256",
    }
)
EXAMPLES = (
    "python -m evaluations.compare samples/a/results.json samples/b/results.json",
    "python -m evaluations.compare samples/*/results.json --across cfg_scale steps --out table.md",
    "python -m evaluations.compare sit-{0,1,2}.json reg-{0,1,2}.json --seeds 3 --floor held-out.json",
)


def main() -> None:
    files_first = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    argv = ["--results", *sys.argv[1:]] if files_first else sys.argv[1:]
    settings = parse(CompareConfig, "Compare results of evaluate.py.", argv, examples=EXAMPLES)
    rows = [load(path) for path in settings.results]
    if len({row.name for row in rows}) < len(rows):
        for path, row in zip(settings.results, rows, strict=True):
            row.name = str(path)
    if len(rows) % (n := settings.seeds):
        raise UserError(f"--seeds {n}: {len(rows)} results cannot be divided into groups of {n}")
    if settings.floor is not None:
        add_ratios(rows, load(settings.floor))
    differing = differences(rows, settings.across)
    if settings.seeds > 1 and not differing:
        text = over_seeds([rows[i : i + settings.seeds] for i in range(0, len(rows), settings.seeds)])
    else:
        text = as_markdown(table(rows) if differing else ranked(rows))
    say(text.rstrip())
    if settings.out is not None:
        check_writable(settings.out)
        write_text(settings.out, text)
    if differing:
        found = "; ".join(f"{key}: {' / '.join(values)}" for key, values in differing.items())
        raise UserError(
            f"these results are not ranked, their protocols differ in {found} (--across {' '.join(differing)} allows it)"
        )


def differences(rows: list[Results], across: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Protocol keys on which the results differ, with the value of each; `across` names those that may.

    Raises:
        UserError: a name in `across` is not a protocol key.
    """
    sampling = {key for row in rows for key in row.protocol.get("sampling", {})} - NOT_PROTOCOL
    known = {*MEASUREMENT, *(f"sampling.{key}" for key in sampling)}
    allowed = set()
    for key in across:
        full = key if key in known else f"sampling.{key}"
        if key != "all" and full not in known:
            raise UserError(f"--across {key}: no protocol key has that name ({', '.join(sorted(known))})")
        allowed.add(full)
    if "all" in across:
        return {}
    found = {}
    for prefix, sides in (
        ("", [{key: row.protocol.get(key) for key in MEASUREMENT} for row in rows]),
        ("sampling.", [_sampler(row.protocol.get("sampling", {}), sampling) for row in rows]),
    ):
        names = {name for side in sides for name, _, _ in differing_settings(sides[0], side)}
        for name in names - {key.removeprefix(prefix) for key in allowed if key.startswith(prefix)}:
            values = [json.dumps(side[name], sort_keys=True) for side in sides]
            found[prefix + name] = [value if len(value) <= 40 else value[:37] + "..." for value in values]
    return dict(sorted(found.items()))


def _sampler(sampling: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """The keys of a sidecar that count, None where it does not say; the VAE by its weights, which may have two names."""
    values = {key: sampling.get(key, REMOVED.get(key)) for key in keys}
    return values | ({"vae": sampling.get("vae_sha256", sampling.get("vae"))} if "vae" in keys else {})


def ranked(rows: list[Results]) -> list[list[str]]:
    """The table sorted by the first metric that all results have, the best value of each column in bold."""
    shown = columns(rows)
    shared = next((column for column in shown if all(column.key in row.metrics for row in rows)), None)
    if shared is not None:
        rows = sorted(rows, key=lambda row: row.metrics[shared.key].value, reverse=shared.larger)
    head, *body = table(rows)
    for number, column in enumerate(shown, start=len(head) - len(shown)):
        values = [row.metrics[column.key].value if column.key in row.metrics else None for row in rows]
        known = [value for value in values if value is not None]
        best = max(known) if column.larger else min(known)
        for cells, value in zip(body, values):
            if value == best and len(rows) > 1:
                cells[number] = f"**{cells[number]}**"
    return [["Rank", *head], *([str(place), *cells] for place, cells in enumerate(body, start=1))]


def add_ratios(rows: list[Results], floor: Results) -> None:
    """Give each result FDr: its Frechet distances over those of held-out images to the same reference.

    Raises:
        UserError: the two were not measured against the same reference.
    """
    for row in rows:
        if row.protocol.get("reference_sha256") != floor.protocol.get("reference_sha256"):
            raise UserError(f"--floor {floor.name} was measured against another reference than {row.name}")
        for key in [key for key in row.metrics if key == "fid" or key.startswith("fd_")]:
            if floor.metrics.get(key) is not None and floor.metrics[key].value > 0:
                least, value = floor.metrics[key].value, row.metrics[key]
                error = None if value.error is None else value.error / least
                name = "fdr" if key == "fid" else key.replace("fd_", "fdr_", 1)
                row.metrics[name] = value._replace(value=value.value / least, error=error)


def over_seeds(methods: list[list[Results]]) -> str:
    """Markdown: each method's metrics over its seeds, and the differences of every pair, seed by seed.

    A method's rank is 1 + the number of methods that are surely better in the first metric (evaluations/seeds.py), so that
    those within the spread of the seeds share a rank.

    Args:
        methods: the results of each, in the same order of seeds.
    """
    every = [row for rows in methods for row in rows]
    shown = [column for column in columns(every) if all(column.key in row.metrics for row in every)]
    if not shown:
        raise UserError("--seeds: no metric is in all of the results")
    names = [rows[0].name for rows in methods]
    values = {c.key: [[row.metrics[c.key].value for row in rows] for rows in methods] for c in shown}
    first, better = values[shown[0].key], 1 if shown[0].larger else -1
    ranks = [1 + sum(sign(other, own) == better for other in first) for own in first]
    head = ["Rank", "Method", "Seeds", *(column.title for column in shown)]
    body = [
        [str(ranks[k]), names[k], str(len(methods[k])), *(mean_of(values[c.key][k]).text(c.digits) for c in shown)]
        for k in sorted(range(len(methods)), key=lambda k: (ranks[k], -better * sum(first[k])))
    ]
    pairs = [["Difference", *(column.title for column in shown)]]
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        cells = [f"{b} - {a}"]
        for column in shown:
            x, y = values[column.key][i], values[column.key][j]
            verdict = {0: "within the spread", 1: "higher", -1: "lower"}[sign(y, x)]
            cells.append(f"{mean_of([q - p for p, q in zip(x, y, strict=True)]).text(column.digits)}: {verdict}")
        pairs.append(cells)
    return as_markdown([head, *body]) + "\n" + as_markdown(pairs)


if __name__ == "__main__":
    run(main)
