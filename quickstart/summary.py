"""What the quickstart says at its end: the table, results.json, report.html and its picture."""

import json
from pathlib import Path

import numpy as np

from common.files import write_json
from common.pictures import write_png as write_picture
from evaluations.report import Report, Table, write_html, write_png
from quickstart.stages import Record

TITLES = {"reg": "SiT + REG", "repa": "SiT + REPA", "sit": "SiT"}


def collect(out: Path, runs: tuple[str, ...], records: list[Record], gpu: bool) -> dict:
    """All numbers of the quickstart, read from the files its programs wrote."""
    by_name = {record.name: record for record in records}
    settings = []
    for file in sorted((out / "samples").glob("*/samples.json")):
        name = file.parent.name
        run, sampler, guidance = name.split("-")
        if run not in runs or f"sample-{name}" not in by_name:
            continue
        sidecar = json.loads(file.read_text(encoding="utf-8"))
        seconds = by_name[f"sample-{name}"].seconds
        settings.append(
            {
                "name": name,
                "run": run,
                "sampler": sampler,
                "guidance": guidance,
                "nfe": sidecar["nfe"],
                "forwards": sidecar["forwards"],
                "seconds": seconds,
            }
            | _metrics(out / "evaluations" / f"{name}.json")
        )
    settings.sort(key=lambda s: (runs.index(s["run"]), s["sampler"], s["guidance"] == "guided"))
    return {
        "settings": settings,
        "real": {
            "held-out": _metrics(out / "evaluations" / "held-out.json"),
            "train": _metrics(out / "evaluations" / "train.json"),
        },
        "seconds": {record.name: round(record.seconds, 1) for record in records},
        "total_seconds": round(sum(record.seconds for record in records), 1),
        "peak_memory_gib": round(max(record.peak_gib for record in records), 2),
        "device": "cuda" if gpu else "cpu",
    }


def rows(results: dict) -> list[list[str]]:
    """The table, header first."""
    table = [["images", "sampler", "guidance", "recognised", "FD to held-out", "n", "NFE", "passes", "seconds"]]
    for name, title in (("held-out", "real, held out"), ("train", "real, training")):
        real = results["real"][name]
        distance = "0 (itself)" if name == "held-out" else f"{real['fd']:.3f}"
        table.append([title, "", "", f"{real['accuracy']:.1%}", distance, str(real["n"]), "", "", ""])
    for s in results["settings"]:
        table.append(
            [
                TITLES[s["run"]],
                s["sampler"].upper(),
                "unguided, early" if s["guidance"] == "early" else s["guidance"],
                f"{s['accuracy']:.1%}",
                f"{s['fd']:.3f}",
                str(s["n"]),
                str(s["nfe"]),
                str(s["forwards"]),
                f"{s['seconds']:.0f}",
            ]
        )
    return table


def summarize(out: Path, runs: tuple[str, ...], records: list[Record], gpu: bool) -> str:
    """Write results.json, report.html and report.png into `out`; returns the text to print."""
    results = collect(out, runs, records, gpu)
    write_json(out / "results.json", results)
    table = rows(results)
    pictures = [("Real digits, held out", _grid_of_real(out))]
    pictures += [
        (f"{TITLES[s['run']]}, {s['sampler'].upper()}, {s['guidance']}", out / "samples" / s["name"] / "grid.png")
        for s in results["settings"]
    ]
    report = Report(
        title="REG quickstart: handwritten digits",
        summary=[
            "Recognised: share of images whose class the judge names, a classifier of real digits that takes no part "
            "in generation. FD: Frechet distance to the held-out digits in the judge's features. NFE: evaluations of the "
            "velocity for each sample; a guided one takes two passes of the network.",
            *(
                [
                    "Early: after 500 of 2,000 steps, where the rows differ; at the end all of them have converged. One "
                    "seed ranks nothing: docs/reproduction.md compares the rows over several."
                ]
                if any(s["guidance"] == "early" for s in results["settings"])
                else []
            ),
            f"{results['total_seconds'] / 60:.1f} minutes in all on {results['device']}, largest process "
            f"{results['peak_memory_gib']:.2f} GiB.",
        ],
        tables=[
            Table("Samples and real digits", table[0], table[1:]),
            Table(
                "Stages",
                ["stage", "seconds", "peak GiB"],
                [[r.name, f"{r.seconds:.1f}", f"{r.peak_gib:.2f}"] for r in records],
            ),
        ],
        runs={TITLES[run]: out / run for run in runs},
        images=pictures,
        commands=[record.command for record in records],
    )
    write_html(report, out / "report.html")
    write_png(report, out / "report.png")
    lines = [_line(row, [max(len(r[i]) for r in table) for i in range(len(table[0]))]) for row in table]
    return "\n".join([*lines, "", *report.summary, f"Report: {out / 'report.html'} (picture: {out / 'report.png'})"])


def _line(row: list[str], widths: list[int]) -> str:
    return "  ".join(
        cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
    )


def _metrics(file: Path) -> dict:
    """Accuracy, FD and n of one results.json of evaluations/evaluate.py."""
    results = json.loads(file.read_text(encoding="utf-8"))
    metrics = results["metrics"]
    return {"accuracy": metrics["class_accuracy"], "fd": metrics["fd_judge"], "n": results["protocol"]["n_samples"]}


def _grid_of_real(out: Path) -> Path:
    """Held-out digits, ten of each class, a class a column, like generate.py's grid of balanced labels."""
    with np.load(out / "images" / "test.npz") as stream:
        pixels, labels = stream["arr_0"], stream["arr_1"]
    rows = [np.concatenate([pixels[np.flatnonzero(labels == c)[r]] for c in range(10)], axis=1) for r in range(10)]
    file = out / "images" / "held-out.png"
    write_picture(file, np.concatenate(rows, axis=0))
    return file
