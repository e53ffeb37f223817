"""The end of a sampling job: parts => samples.npz, samples.json, grid.png, gallery.html, class tokens."""

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from common.pictures import Cell, class_caption, write_png, write_sheet
from common.provenance import versions
from config import REMOVED, UserError
from sampling.gallery import Shown, arrange, write_gallery
from sampling.job import Job
from sampling.parts import Parts, refuse_mixing, write_rows, write_samples

SCHEMA = 1
SAMPLES, SIDECAR = "samples.npz", "samples.json"
SEEN = 200  # samples that grid.png chooses from


def is_finished(folder: Path, count: int, identity: dict[str, Any], wanted: list[str], *, have_parts: bool) -> bool:
    """Whether a folder already holds these samples and files; False: go on.

    Args:
        folder: of --out.
        count: number of samples.
        identity: of the job.
        wanted: names of the files that are asked for, beside those that are always written.
        have_parts: whether there are parts to continue from.

    Raises:
        UserError: it holds finished samples of other settings, or fewer files or another number of samples with no parts
            to continue from.
    """
    file = folder / SIDECAR
    if not file.is_file() or not (folder / SAMPLES).is_file():
        return False
    sidecar = json.loads(file.read_text())
    refuse_mixing(folder, {name: sidecar[name] for name in sidecar if name in identity or name in REMOVED}, identity)
    lacking = [name for name in wanted if not (folder / name).exists()]
    if sidecar["n"] == count and not lacking:
        return True
    if have_parts:
        return False
    problem = f"is finished without {lacking[0]}" if lacking else f"is finished with {sidecar['n']} samples"
    raise UserError(f"{folder} {problem} and its parts are gone; give another --out, or delete that folder")


def assemble(job: Job, parts: Parts, measured: dict[str, Any]) -> str:
    """Write all files from the finished parts, one part in memory at a time; the sidecar last. Returns a line to print."""
    settings, info = job.settings, job.model.info
    folder, count, side = settings.out, settings.num_fid_samples, info.resolution
    (folder / SIDECAR).unlink(missing_ok=True)
    write_samples(folder / SAMPLES, parts, count, (side, side, 3))
    labels = np.concatenate(list(parts.rows(count, "label")))
    nearest = np.concatenate(list(parts.rows(count, "nearest"))) if "nearest" in parts.names() else None
    if settings.class_tokens:
        width = info.network.class_token_dim
        write_rows(folder / "class_tokens.npy", (count, width), np.float32, parts.rows(count, "class_token"))
        if nearest is not None:
            write_rows(folder / "class_token_labels.npy", (count,), np.int64, iter([nearest]))
    if settings.png:  # those that were not written with their batch: parts of an earlier run without --png
        for number, pixels in enumerate(chain.from_iterable(parts.rows(count, "pixels"))):
            if not png_file(folder, number).is_file():
                write_png(png_file(folder, number), pixels)
    seen = islice(chain.from_iterable(parts.rows(count, "pixels")), max(SEEN, settings.gallery))
    shown = [
        Shown(i, pixels, int(labels[i]), None if nearest is None else int(nearest[i])) for i, pixels in enumerate(seen)
    ]
    rows = [
        [Cell(s.pixels, class_caption(s.label, s.nearest, info.classes)) for s in row]
        for row in arrange(shown[:SEEN], settings.interpolate)
    ]
    write_sheet(folder / "grid.png", rows)
    cost = {name: _mean(parts, count, name) for name in ("evaluations", "forwards")}
    null = job.labels.kind == "null"
    sidecar = {
        "schema": SCHEMA,
        "n": count,
        **job.identity,
        "nfe": cost["evaluations"],
        "forwards": cost["forwards"],
        "class_token_names_label": None if null or nearest is None else float((nearest == labels).mean()),
        **measured,
        "versions": versions(("torch", "numpy", "diffusers", "timm", "torchdiffeq")),
    }
    if settings.gallery:
        write_gallery(folder / "gallery.html", shown[: settings.gallery], info.classes, sidecar)
    write_json(folder / SIDECAR, sidecar)
    if not settings.keep_parts:
        parts.remove()
    pictures = "grid.png and gallery.html" if settings.gallery else "grid.png"
    made = f"{count} samples of {side} x {side}, {cost['evaluations']:g} evaluations each"
    return f"{folder / SAMPLES}: {made}; look at {pictures}"


def png_file(folder: Path, number: int) -> Path:
    """Where sample `number` of the --out folder is, named as the published sampler names it."""
    return folder / "png" / f"{number:06d}.png"


def _mean(parts: Parts, count: int, name: str) -> int | float:
    """Mean cost of a sample; an integer when all cost the same."""
    mean = float(np.concatenate(list(parts.rows(count, name))).mean())
    return int(mean) if mean.is_integer() else round(mean, 3)
