"""The end of a sampling job: parts => samples.npz, samples.json, grid.png, gallery.html, class tokens."""

import importlib.metadata
import json
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from common.pictures import Cell, class_caption, write_png, write_sheet
from config import REMOVED, UserError
from sampling.gallery import Shown, arrange, write_gallery
from sampling.parts import Parts, refuse_mixing, write_json, write_rows, write_samples

SCHEMA = 1
SAMPLES, SIDECAR = "samples.npz", "samples.json"
SEEN = 200  # samples that grid.png chooses from
_PACKAGES = ("torch", "numpy", "diffusers", "timm", "torchdiffeq")


@dataclass(frozen=True)
class Output:
    """What to write. strip: samples in each row of an interpolation, 0: none; names: of the classes, or empty."""

    folder: Path
    count: int
    resolution: int
    names: tuple[str, ...] = ()
    strip: int = 0
    gallery: int = 200
    class_tokens: bool = False
    png: bool = False
    keep_parts: bool = False


def is_finished(folder: Path, count: int, identity: dict[str, Any], wanted: list[str], *, have_parts: bool) -> bool:
    """Whether the folder already holds these `count` samples and the `wanted` files; False: go on.

    Raises ValueError when it holds finished samples of other settings, or fewer files or another number of samples with no
    parts to continue from.
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


def assemble(output: Output, parts: Parts, identity: dict[str, Any], measured: dict[str, Any]) -> str:
    """Write all files from the finished parts, one part in memory at a time; the sidecar last. Returns a line to print."""
    folder, count, side = output.folder, output.count, output.resolution
    (folder / SIDECAR).unlink(missing_ok=True)
    write_samples(folder / SAMPLES, parts, count, (side, side, 3))
    labels = np.concatenate(list(parts.rows(count, "label")))
    names = parts.names()
    nearest = np.concatenate(list(parts.rows(count, "nearest"))) if "nearest" in names else None
    if output.class_tokens:
        width = next(parts.rows(count, "class_token")).shape[1]
        write_rows(folder / "class_tokens.npy", (count, width), np.float32, parts.rows(count, "class_token"))
        if nearest is not None:
            write_rows(folder / "class_token_labels.npy", (count,), np.int64, iter([nearest]))
    if output.png:
        write_missing_png(folder / "png", parts, count)
    seen = np.stack(list(islice(chain.from_iterable(parts.rows(count, "pixels")), max(SEEN, output.gallery))))
    shown = [
        Shown(i, pixels, int(labels[i]), None if nearest is None else int(nearest[i])) for i, pixels in enumerate(seen)
    ]
    write_sheet(
        folder / "grid.png",
        [
            [Cell(s.pixels, class_caption(s.label, s.nearest, output.names)) for s in row]
            for row in arrange(shown[:SEEN], output.strip)
        ],
    )
    named = float((nearest == labels).mean()) if nearest is not None else None
    cost = {name: _mean(parts, count, name) for name in ("evaluations", "forwards")}
    sidecar = {
        "schema": SCHEMA,
        "n": count,
        **identity,
        "nfe": cost["evaluations"],
        "forwards": cost["forwards"],
        "class_token_names_label": None if identity["labels"] == "null" else named,
        **measured,
        "versions": _versions(),
    }
    if output.gallery:
        write_gallery(folder / "gallery.html", shown[: output.gallery], output.names, sidecar)
    write_json(folder / SIDECAR, sidecar)
    if not output.keep_parts:
        parts.remove()
    pictures = "grid.png and gallery.html" if output.gallery else "grid.png"
    made = f"{count} samples of {side} x {side}, {cost['evaluations']:g} evaluations each"
    return f"{folder / SAMPLES}: {made}; look at {pictures}"


def write_missing_png(folder: Path, parts: Parts, count: int) -> None:
    """Those that were not written with their batch: parts of an earlier run without --png."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(chain.from_iterable(parts.rows(count, "pixels"))):
        file = png_file(folder, number)
        if not file.is_file():
            write_png(file, pixels)


def png_file(folder: Path, number: int) -> Path:
    """Where sample `number` is, named as the published sampler names it."""
    return folder / f"{number:06d}.png"


def _mean(parts: Parts, count: int, name: str) -> int | float:
    """Mean cost of a sample; an integer when all cost the same."""
    mean = float(np.concatenate(list(parts.rows(count, name))).mean())
    return int(mean) if mean.is_integer() else round(mean, 3)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
