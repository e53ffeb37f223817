"""Finished shards => manifest and class means; a function of the files alone, so the same after any interruption."""

from pathlib import Path
from typing import Any

import numpy as np

from common.arrays import read_npy
from common.files import replacing, sha256
from config import UserError
from packed.format import EncoderInfo, Manifest, read_entry
from preprocessing.index import Index
from preprocessing.plan import PLAN, Plan, index_file


def means_file(plan: Plan) -> str:
    """Class means; of an extended dataset in a file of their own, since a training run may be reading the former ones."""
    return f"class_means-{len(plan.extends):05d}.npy" if plan.extends else "class_means.npy"


def build_manifest(out: Path, plan: Plan, index: Index) -> Manifest:
    """The manifest of finished shards and class means. Raises UserError when no image is left."""
    entries = [read_entry(out, number) for number in range(plan.shards)]
    shards = [{"count": entry["count"], "files": entry["files"]} for entry in entries if entry["count"]]
    if not shards:
        name, reason = entries[0]["skipped"][0]
        raise UserError(f"{out}: none of the {plan.count} images could be read; the first, {name}: {reason}")
    means = means_file(plan) if has_means(plan) else None
    indices = [index_file(out, part.number).name for part in plan.parts]
    files = {name: sha256(out / name) for name in (*indices, PLAN, *((means,) if means else ()))}
    return Manifest(
        count=sum(shard["count"] for shard in shards),
        shard_size=plan.shard_size * plan.copies,
        resolution=plan.settings["resolution"],
        fields=plan.fields,
        classes=index.classes,
        vae=plan.vae,
        encoders=[EncoderInfo(**encoder) for encoder in plan.encoders],
        shards=shards,
        source=_provenance(plan, index, entries),
        class_means=means,
        files=files,
    )


def _provenance(plan: Plan, index: Index, entries: list[dict[str, Any]]) -> dict[str, Any]:
    rounding: dict[str, float] = {}
    for entry in entries:
        for name, value in entry["error"].items():
            rounding[name] = max(value, rounding.get(name, 0.0))
    return {
        "kind": index.kind,
        "images": plan.count,
        "packed": sum(entry["count"] for entry in entries) // plan.copies,
        "enlarged": sum(entry["enlarged"] for entry in entries),
        "skipped": [bad for entry in entries for bad in entry["skipped"]],
        "ignored": index.ignored,
        "rounding": rounding,
        "settings": plan.settings,
        "versions": plan.versions,
    } | ({"extensions": [part.count for part in plan.parts[1:]]} if plan.extends else {})


def has_means(plan: Plan) -> bool:
    """Whether class means are computed: of encoder 0's class tokens, where they are stored."""
    return "class_token.0" in plan.fields


def write_class_means(out: Path, plan: Plan, index: Index) -> None:
    """Mean class token of each class, (classes, D) float32, summed in float64; zeros for a class without images."""
    if not has_means(plan):
        return
    sums = np.zeros((len(index.classes), plan.encoders[0]["dim"]))
    counts = np.zeros(len(index.classes), np.int64)
    for number in range(plan.shards):
        files = read_entry(out, number)["files"]
        if files:
            labels, tokens = (read_npy(out / files[name]["file"]) for name in ("label", "class_token.0"))
            np.add.at(sums, labels, tokens.astype(np.float64))
            counts += np.bincount(labels, minlength=len(counts))
    with replacing(out / means_file(plan)) as temporary, temporary.open("wb") as stream:
        np.save(stream, (sums / np.maximum(counts, 1)[:, None]).astype(np.float32), allow_pickle=False)
