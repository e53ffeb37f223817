"""The end of a sampling job: parts => samples.npz, samples.json, grid.png, gallery.html, class tokens."""

import traceback
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from common.arrays import members, read_npy
from common.files import check_digests, digests, read_json, write_json
from common.images import BadImage, decode_image
from common.pictures import Cell, class_caption, write_png, write_sheet
from common.provenance import versions
from common.reporting import say
from config import REMOVED, UserError
from sampling.gallery import Shown, arrange, write_gallery
from sampling.job import Job
from sampling.parts import OtherSettings, Parts, refuse_mixing, write_rows, write_samples

SCHEMA = 1
SAMPLES, SIDECAR, TOKENS, NEAREST = "samples.npz", "samples.json", "class_tokens.npy", "class_token_labels.npy"
TIMES = ("seconds", "samples_per_second")
DATA, PICTURES = (SAMPLES, TOKENS, NEAREST), ("grid.png", "gallery.html")
SEEN = 200  # samples that grid.png chooses from


def is_finished(folder: Path, count: int, identity: dict[str, Any], wanted: list[str], *, have_parts: bool) -> bool:
    """Whether a folder already holds these samples and files, as they were written; False: go on.

    Args:
        folder: of --out.
        count: number of samples.
        identity: of the job.
        wanted: names of the files that are asked for, beside those that are always written.
        have_parts: whether there are parts to continue from.

    Raises:
        UserError: it holds finished samples of other settings; or, with no parts to continue from, fewer files, another
            number of samples, or a damaged file.
    """
    if not (folder / SIDECAR).is_file() or not (folder / SAMPLES).is_file():
        return False
    try:
        sidecar = read_json(folder / SIDECAR)
        refuse_mixing(
            folder, {name: sidecar[name] for name in sidecar if name in identity or name in REMOVED}, identity
        )
        lacking = [name for name in wanted if not (folder / name).exists()]
        if lacking:
            raise UserError(f"{folder} is finished without {lacking[0]}")
        if sidecar["n"] != count:
            raise UserError(f"{folder} is finished with {sidecar['n']} samples")
        recorded = sidecar.get("files", {})  # folders of former versions have none
        check_digests(folder, {name: recorded[name] for name in recorded if name in DATA and (folder / name).exists()})
    except OtherSettings:
        raise
    except UserError as error:
        if have_parts:
            return False
        raise UserError(f"{error} and its parts are gone; give another --out, or delete {folder}") from error
    return True


def assemble(job: Job, parts: Parts, measured: dict[str, Any]) -> str:
    """Write all files from the finished parts, one part in memory at a time; the sidecar last. Returns a line to print."""
    settings, info = job.settings, job.model.info
    folder, count, side = settings.out, settings.num_fid_samples, info.resolution
    (folder / SIDECAR).unlink(missing_ok=True)
    write_samples(folder / SAMPLES, parts, count, (side, side, 3))
    files = [SAMPLES]
    labels = np.concatenate(list(parts.rows(count, "label")))
    nearest = np.concatenate(list(parts.rows(count, "nearest"))) if "nearest" in parts.names() else None
    if settings.class_tokens:
        width = info.network.class_token_dim
        write_rows(folder / TOKENS, (count, width), np.float32, parts.rows(count, "class_token"))
        files.append(TOKENS)
        if nearest is not None:
            write_rows(folder / NEAREST, (count,), np.int64, iter([nearest]))
            files.append(NEAREST)
    if settings.png:  # those that were not written with their batch: parts of an earlier run without --png
        _write_pngs(folder, chain.from_iterable(parts.rows(count, "pixels")))
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
    files += _draw(job, chain.from_iterable(parts.rows(count, "pixels")), labels, nearest, sidecar)
    write_json(folder / SIDECAR, {**sidecar, "files": digests(folder, files)})
    if not settings.keep_parts:
        parts.remove()
    made = f"{count} samples of {side} x {side}, {cost['evaluations']:g} evaluations each"
    pictures = " and ".join(name for name in files if name in PICTURES)
    return f"{folder / SAMPLES}: {made}" + (f"; look at {pictures}" if pictures else "")


def restore_pictures(job: Job) -> None:
    """Make the pictures of a finished folder again that are not as they were written, from its samples.

    These are the PNG files, where they are asked for, and the contact sheet and the gallery, where the folder had them.
    """
    folder, sidecar = job.settings.out, read_json(job.settings.out / SIDECAR)
    arrays = members(folder / SAMPLES)
    pixels, labels = arrays["arr_0"], arrays["arr_1"].all()
    images = (
        image for start in range(0, len(labels), 64) for image in pixels.rows(start, min(start + 64, len(labels)))
    )
    made = 0
    if job.settings.png:
        made = _write_pngs(folder, images)
    recorded = sidecar.pop("files", {})
    try:
        check_digests(folder, {name: recorded[name] for name in recorded if name in PICTURES})
    except UserError:
        nearest = read_npy(folder / NEAREST) if (folder / NEAREST).is_file() else None
        first = pixels.rows(0, min(max(SEEN, job.settings.gallery), len(labels)))
        drawn = _draw(job, first, labels, nearest, sidecar)
        kept = {name: recorded[name] for name in recorded if name in DATA}
        write_json(folder / SIDECAR, {**sidecar, "files": kept | digests(folder, drawn)})
        made += len(drawn)
    if made:
        say(f"{folder}: {made} pictures that were missing or damaged are made again")


def _draw(
    job: Job, images: Iterable[np.ndarray], labels: np.ndarray, nearest: np.ndarray | None, sidecar: dict[str, Any]
) -> list[str]:
    """Write the contact sheet and the gallery of the first images; returns the names of those that could be written."""
    settings, classes, folder = job.settings, job.model.info.classes, job.settings.out
    shown = [
        Shown(i, pixels, int(labels[i]), None if nearest is None else int(nearest[i]))
        for i, pixels in enumerate(islice(images, max(SEEN, settings.gallery)))
    ]
    rows = [
        [Cell(s.pixels, class_caption(s.label, s.nearest, classes)) for s in row]
        for row in arrange(shown[:SEEN], settings.interpolate)
    ]
    writers: dict[str, Callable[[], None]] = {"grid.png": lambda: write_sheet(folder / "grid.png", rows)}
    if settings.gallery:
        gallery = shown[: settings.gallery]
        same = {name: value for name, value in sidecar.items() if name not in TIMES}  # whenever the job was interrupted
        writers["gallery.html"] = lambda: write_gallery(folder / "gallery.html", gallery, classes, same)
    written = []
    for name, write in writers.items():
        try:
            write()
            written.append(name)
        except Exception as error:  # the samples do not depend on it
            if not isinstance(error, OSError):
                traceback.print_exc()  # a bug
            say(f"warning: {folder / name} is left out: {error}")
    return written


def _write_pngs(folder: Path, images: Iterable[np.ndarray]) -> int:
    """Write the PNG files of images 0, 1, ... that are missing or hold something else; returns their number."""
    made = 0
    for number, pixels in enumerate(images):
        file = png_file(folder, number)
        try:
            right = file.is_file() and np.array_equal(np.asarray(decode_image(file)), pixels)
        except BadImage:
            right = False
        if not right:
            write_png(file, pixels)
            made += 1
    return made


def png_file(folder: Path, number: int) -> Path:
    """Where sample `number` of the --out folder is, named as the published sampler names it."""
    return folder / "png" / f"{number:06d}.png"


def _mean(parts: Parts, count: int, name: str) -> int | float:
    """Mean cost of a sample; an integer when all cost the same."""
    mean = float(np.concatenate(list(parts.rows(count, name))).mean())
    return int(mean) if mean.is_integer() else round(mean, 3)
