"""What a packing prints: its needs before it starts, its speed after the first shard, its result at the end."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.class_names import order_note
from common.files import free_space
from common.units import duration, size_text
from packed.format import MANIFEST, Field
from preprocessing.index import Index
from preprocessing.plan import PLAN, Plan

_SHOWN = 5  # classes whose names and counts are listed


class Totals(NamedTuple):
    """Of one process. seconds: of the whole loop; waiting: of them, for crops to arrive."""

    images: int
    seconds: float
    waiting: float


def needs(out: Path, plan: Plan, index: Index, todo: list[int], device: torch.device, world: int) -> str:
    """What will be packed, and what it takes on disk beside what is free there."""
    settings = plan.settings
    images = sum(stop - start for start, stop in map(plan.range, todo))
    part = plan.part(min(todo, default=0))
    lines = [f"packing {images:,} images of {index.kind} {settings['source']} into {out}"]
    if part.number:
        known = plan.extends[part.number - 1]["classes"]
        added = len(index.classes) - known
        new = f"new classes, with labels from {known} on: {_few(index.classes[known:])}" if added else "no new class"
        lines.append(f"they follow the {part.first_image:,} images that it holds; {new}")
    counts = np.bincount(index.labels[part.first_image :], minlength=len(index.classes))
    filled = np.flatnonzero(counts).tolist()
    names = _few([f"{index.classes[i]} ({counts[i]:,})" for i in filled])
    lines.append(f"{len(filled):,} class{'es' * (len(filled) != 1)}: {names}")
    if plan.copies > 1:
        lines.append("each image is followed by its mirror image")
    networks = ", ".join([f"VAE {plan.vae['name']}", *(f"encoder {e['name']}" for e in plan.encoders)])
    if note := order_note(index.classes):
        lines.append(f"{note}; --classes FILE gives another order")
    missing = len(index.classes) - len(filled)
    if missing and not part.number:
        first = index.classes[int(np.flatnonzero(counts == 0)[0])]
        lines.append(f"{missing:,} of the {len(index.classes):,} classes have no images, such as {first}")
    lines.append(f"crop {settings['resolution']} x {settings['resolution']}; {networks}")
    lines.append(f"{_arithmetic(settings['dtype'], device)} on {_device(device)}, {world} process{'es' * (world > 1)}")
    for name, spec in plan.fields.items():
        shape = " x ".join(map(str, spec["shape"])) or "one number"
        lines.append(f"  {name}: {shape} {spec['dtype']}, {Field.of(spec).record_bytes:,} bytes per record")
    total = sum(Field.of(spec).record_bytes for spec in plan.fields.values())
    lines.append(
        f"  together {total:,} bytes per record, {plan.settings['shard_size'] * plan.copies:,} records per shard"
    )
    if len(todo) < plan.shards:
        lines.append(f"{plan.shards - len(todo):,} of {plan.shards:,} shards are written already")
    free = free_space(out)
    shards = f"{len(todo):,} shard{'s' * (len(todo) != 1)}"
    lines.append(f"to write: {size_text(plan.bytes(todo))} in {shards}; {size_text(free)} are free on the disk")
    return "\n  ".join(lines)


def forecast(done: int, seconds: float, remaining: int, world: int) -> str:
    """After the first shard. done, remaining: images of this process; the others have as many."""
    rate = done / max(seconds, 1e-9)
    return (
        f"first shard: {rate * world:,.1f} images/s; about {duration(remaining / rate)} for the other "
        f"{remaining * world:,} images"
    )


def summary(out: Path, source: dict[str, Any], everyone: list[Totals]) -> str:
    """What was packed. source: Manifest.source."""
    images, seconds = sum(t.images for t in everyone), max(t.seconds for t in everyone)
    lines = [f"{out}: {source['packed']} images of {source['images']}"]
    if images:
        waited = np.mean([t.waiting / max(t.seconds, 1e-9) for t in everyone])
        lines.append(
            f"{images / max(seconds, 1e-9):.1f} images/s, {duration(seconds)} in all; the networks waited for crops "
            f"{waited:.0%} of the time"
        )
    if source["enlarged"]:
        lines.append(f"{source['enlarged']} images were smaller than the crop and were enlarged")
    if source["skipped"]:
        name, reason = source["skipped"][0]
        lines.append(
            f"{len(source['skipped'])} images were left out, listed in {MANIFEST}; the first: {name}: {reason}"
        )
    if source["ignored"]:
        lines.append(f"some files are not images and were ignored: {', '.join(source['ignored'][:3])}")
    errors = ", ".join(f"{name} {value:.2g}" for name, value in source["rounding"].items())
    lines.append(f"largest rounding errors of storage: {errors} (recorded with the settings in {MANIFEST} and {PLAN})")
    return "\n  ".join(lines)


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _arithmetic(dtype: str, device: torch.device) -> str:
    tf32 = device.type == "cuda" and dtype == "fp32" and torch.backends.cudnn.allow_tf32  # as torch has it by default
    return f"{dtype} (convolutions in TF32)" if tf32 else dtype


def _device(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else "the CPU (no GPU was found)"
