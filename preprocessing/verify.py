"""Re-read every checksum of a packed dataset, name what is broken, down to the record, and delete it to be packed again."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from common.arrays import read_npy
from common.files import crc32, sha256
from common.reporting import progress, say
from config import MissingFile, UserError
from packed.format import CRC, MANIFEST, Field, entry_file, read_entry, read_manifest
from preprocessing.extend import joined
from preprocessing.index import Index
from preprocessing.manifest import build_manifest, has_means, means_file
from preprocessing.plan import PLAN, Plan, index_file, index_is_whole, read_parts, read_plan
from preprocessing.read import mirrored

_SHOWN = 5  # names of broken records in a line


class Fault(NamedTuple):
    """file: what is broken, relative to the folder. text: how. shard: the one to redo, None if the file is not a shard's."""

    file: str
    text: str
    shard: int | None


def verify(out: Path) -> None:
    """Print the faults of a dataset, on rank 0. Raises UserError if there are any."""
    if int(os.environ.get("RANK", "0")):
        return
    faults = find_faults(out)
    if faults:
        raise UserError(f"{out}: {len(faults)} broken files, the first is {faults[0].file}; --repair redoes only those")


def repair(out: Path) -> None:
    """Print the faults of a dataset and delete what is broken, so that packing does it again.

    Broken files go with the entries of their shards; the manifest goes first, as there is no dataset until it is whole.
    The manifest of a dataset whose extension is not finished stays if all faults are of the extension.
    """
    faults = find_faults(out)
    plan = None if any(fault.file == PLAN for fault in faults) else read_plan(out)
    first = plan.parts[-1].first_shard if plan is not None and _is_being_extended(out, plan) else sys.maxsize
    faults = [fault for fault in faults if fault.file != MANIFEST or first == sys.maxsize]
    if any(fault.shard is None or fault.shard < first for fault in faults):
        (out / MANIFEST).unlink(missing_ok=True)
    for fault in faults:
        if fault.shard is not None:
            entry_file(out, fault.shard).unlink(missing_ok=True)
        (out / fault.file).unlink(missing_ok=True)


def find_faults(out: Path) -> list[Fault]:
    """All faults of a packed dataset, which are said. Raises UserError if nothing was packed here."""
    faults = _find_faults(out)
    for fault in faults:
        say(f"{out / fault.file}: {fault.text}")
    if not faults:
        say(f"{out}: every checksum is right")
    return faults


def _find_faults(out: Path) -> list[Fault]:
    if not (out / PLAN).is_file() and not (out / MANIFEST).is_file():
        raise UserError(f"--out {out}: holds neither {MANIFEST} nor {PLAN}; nothing was packed here")
    try:
        plan = read_plan(out)
    except UserError as error:
        return [Fault(PLAN, str(error), None), *_faults_without_plan(out)]
    faults = [
        Fault(index_file(out, part.number).name, "is missing or does not match its checksum", None)
        for part in plan.parts
        if not index_is_whole(out, part)
    ]
    index = None if faults else joined(read_parts(out, plan))
    if _is_being_extended(out, plan):
        return [
            Fault(MANIFEST, "its extension is not finished: give the packing command again", None),
            *faults,
            *_faults_of_shards(out, plan, index),
        ]
    faults += _faults_of_shards(out, plan, index)
    if index is not None and not any(fault.shard is not None for fault in faults):
        faults += _manifest_faults(out, plan, index)
    return faults


def _is_being_extended(out: Path, plan: Plan) -> bool:
    """Whether there is a whole dataset and a plan for more."""
    try:
        return bool(plan.extends) and read_manifest(out).files.get(PLAN) != sha256(out / PLAN)
    except UserError:
        return False


def _faults_of_shards(out: Path, plan: Plan, index: Index | None) -> list[Fault]:
    numbers = range(plan.shards)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        with progress(len(numbers), unit="shard", description="verifying") as bar:
            faults = []
            for found in pool.map(lambda number: _shard_faults(out, plan, index, number), numbers):
                faults += found
                bar.update()
    return faults


def _shard_faults(out: Path, plan: Plan, index: Index | None, number: int) -> list[Fault]:
    path = entry_file(out, number)
    try:
        entry = read_entry(out, number)
    except MissingFile:
        return [Fault(path.name, "is missing: this shard was never finished", number)]
    except UserError as error:
        return [Fault(path.name, str(error), number)]
    if entry.get("plan") != plan.part(number).id:
        return [Fault(path.name, f"was written by a packing other than that of {PLAN}", number)]
    return [
        Fault(file["file"], _damage(out, plan, index, number, entry, name), number)
        for name, file in entry["files"].items()
        if _differs(out / file["file"], file["sha256"])
    ]


def _differs(path: Path, digest: str) -> bool:
    return not path.is_file() or sha256(path) != digest


def _damage(out: Path, plan: Plan, index: Index | None, number: int, entry: dict[str, Any], name: str) -> str:
    """What is wrong with a file of a shard: which records, by their own checksums."""
    path, checksums = (out / entry["files"][key]["file"] for key in (name, CRC))
    if not path.is_file():
        return "is missing"
    if name == CRC:
        return "does not match its checksum (checksums of single records; the records may be whole)"
    field = Field.of(plan.fields[name])
    size, expected = path.stat().st_size, field.file_bytes(entry["count"])
    if size != expected:
        return f"is truncated or longer than it was: {size} bytes, not {expected}"
    if _differs(checksums, entry["files"][CRC]["sha256"]):
        return "does not match its checksum"
    wanted = read_npy(checksums)[:, sorted(plan.fields).index(name)]
    with path.open("rb") as stream:
        stream.seek(len(field.header(0)))
        broken = [row for row, crc in enumerate(wanted) if crc32(stream.read(field.record_bytes)) != crc]
    if not broken:
        return "does not match its checksum; its header is broken"
    start = sum(_count(out, plan, before) for before in range(number))
    skipped = {image for image, _ in entry["skipped"]}
    images = [image for image in index.names[slice(*plan.range(number))] if image not in skipped] if index else None
    if images and plan.copies > 1:
        images = [name for image in images for name in (image, mirrored(image))]
    shown = [f"record {start + row}" + (f" ({images[row]})" if images else "") for row in broken[:_SHOWN]]
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return f"{len(broken)} of {len(wanted)} records do not match their checksums: {', '.join(shown)}{more}"


def _count(out: Path, plan: Plan, number: int) -> int:
    """Records of a shard, as planned where its entry is broken."""
    try:
        return read_entry(out, number)["count"]
    except UserError:
        start, stop = plan.range(number)
        return (stop - start) * plan.copies


def _manifest_faults(out: Path, plan: Plan, index: Index) -> list[Fault]:
    means = out / means_file(plan)
    missing = [Fault(means.name, "is missing or does not match its checksum", None)]
    try:
        manifest = read_manifest(out)
    except UserError as error:
        return [Fault(MANIFEST, str(error), None), *(missing if has_means(plan) and not means.is_file() else [])]
    if has_means(plan) and _differs(means, manifest.files.get(means.name, "")):
        return missing
    if asdict(manifest) != asdict(build_manifest(out, plan, index)):
        return [Fault(MANIFEST, "does not describe the shards that are here", None)]
    return []


def _faults_without_plan(out: Path) -> list[Fault]:
    """The plan is broken, the shards can be checked against the manifest's copy of their entries."""
    try:
        manifest = read_manifest(out)
    except UserError as error:
        return [Fault(MANIFEST, str(error), None)]
    return [
        Fault(file["file"], "is missing or does not match its checksum", int(file["file"].split("-")[-1].split(".")[0]))
        for shard in manifest.shards
        for file in shard["files"].values()
        if _differs(out / file["file"], file["sha256"])
    ]
