"""What a packing will write, decided before it starts and kept in `packing.json`: restart and repair rest on it."""

import hashlib
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.files import fingerprint, read_sealed, sha256, write_bytes, write_sealed
from common.provenance import versions
from common.typed import build
from config import MissingFile, UserError, differences, identity
from packed.format import MANIFEST, REPAIR, Field, check_fields, read_entry, read_manifest
from preprocessing.encode import Networks
from preprocessing.extend import merged_classes, new_images, remaining
from preprocessing.identity import forms, lies_elsewhere, located
from preprocessing.index import Index, class_list
from preprocessing.settings import PackConfig
from preprocessing.sources import list_images

PLAN = "packing.json"
INDEX = "index.npz"


@dataclass(frozen=True)
class Part:
    """What one packing added: the first one, or an extension.

    number: counts the parts from 0. id: of its plan, in the entries of its shards. index: SHA-256 of its list of images.
    first_image, first_shard: where it begins in the dataset.
    """

    number: int
    id: str
    index: str
    first_image: int
    count: int
    first_shard: int
    shards: int


@dataclass(frozen=True)
class Plan:
    """What `packing.json` holds.

    settings: as `recorded` gives them. index: SHA-256 of the newest list of images. count: images of all parts. fields, vae,
    encoders: as in the manifest. versions: of the packages that packed, for people. extends: the earlier parts, {"id",
    "index", "count", "classes": their number}; absent from the file of a dataset that was packed at once.
    """

    settings: dict[str, Any]
    index: str
    count: int
    fields: dict[str, dict[str, Any]]
    vae: dict[str, Any]
    encoders: list[dict[str, Any]]
    versions: dict[str, str]
    extends: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shard_size(self) -> int:
        return self.settings["shard_size"]

    @property
    def copies(self) -> int:
        """Records of each image: 2 with its mirror image."""
        return 2 if self.settings.get("flip") else 1

    @property
    def shards(self) -> int:
        return sum(part.shards for part in self.parts)

    @property
    def id(self) -> str:
        """Written in every shard's entry: shards of another plan do not count as done."""
        return fingerprint({name: value for name, value in self.content().items() if name != "versions"})

    def content(self) -> dict[str, Any]:
        """What is written to `packing.json`."""
        return {name: value for name, value in asdict(self).items() if name != "extends" or value}

    @cached_property
    def parts(self) -> list[Part]:
        """The first packing and its extensions, in the order of the records; each begins with a shard of its own."""
        own = {"id": self.id, "index": self.index, "count": self.count - sum(part["count"] for part in self.extends)}
        found: list[Part] = []
        image = shard = 0
        for number, part in enumerate((*self.extends, own)):
            shards = -(-part["count"] // self.shard_size)
            found.append(Part(number, part["id"], part["index"], image, part["count"], shard, shards))
            image, shard = image + part["count"], shard + shards
        return found

    def part(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        return next(part for part in reversed(self.parts) if part.first_shard <= shard)

    def range(self, shard: int) -> tuple[int, int]:
        """First and last + 1 of the shard's items in the index of all parts."""
        part = self.part(shard)
        start = part.first_image + (shard - part.first_shard) * self.shard_size
        return start, min(start + self.shard_size, part.first_image + part.count)

    def bytes(self, shards: list[int]) -> int:
        """Size of the files of shards."""
        counts = [(stop - start) * self.copies for start, stop in map(self.range, shards)]
        return sum(Field.of(spec).file_bytes(count) for spec in self.fields.values() for count in counts)

    def unfinished(self, out: Path) -> list[int]:
        """Shards that have no valid entry yet."""
        return [number for number in range(self.shards) if not self._is_done(out, number)]

    def _is_done(self, out: Path, number: int) -> bool:
        try:
            return read_entry(out, number).get("plan") == self.part(number).id
        except UserError:
            return False


def read_plan(out: Path) -> Plan:
    """Read `packing.json`. Raises UserError if it is missing or damaged."""
    if not (out / PLAN).is_file():
        raise MissingFile(f"{out}: no {PLAN}; no packing was begun here")
    path = out / PLAN
    plan = build(Plan, read_sealed(path, REPAIR), str(path))
    check_fields(plan.fields, path)
    parts = [{"shard_size": plan.settings.get("shard_size"), "count": plan.count}, *plan.extends]
    numbers = [value for part in parts for key, value in part.items() if key in ("shard_size", "count", "classes")]
    if not all(type(number) is int and 0 < number < 2**40 for number in numbers) or not all(
        {"id", "index", "count", "classes"} == part.keys() for part in plan.extends
    ):
        raise UserError(f"{path} does not say how many images there are, and in shards of how many; {REPAIR}")
    return plan


def recorded(settings: PackConfig) -> dict[str, Any]:
    """The settings that decide what is written, which must not change between the parts of one dataset."""
    if settings.classes is not None:
        class_list(settings.classes)
    return {
        **identity(settings),
        "source": str(settings.images.resolve()),
        "classes": settings.classes and sha256(settings.classes),
        "enc_type": list(settings.enc_type) if settings.tokens else [],
    }


def check_settings(settings: PackConfig) -> Plan | None:
    """The plan that `out` was begun with, if it was. Raises UserError if a flag differs from it."""
    out, now = settings.out, recorded(settings)
    if not (out / PLAN).is_file():
        if (out / MANIFEST).is_file():
            raise UserError(f"--out {out}: holds a dataset that was not packed here; give another folder")
        return None
    plan = read_plan(out)
    extending = settings.extend and is_complete(out, plan)
    for name, was, value in differences(plan.settings, now):
        if name == "source":  # may have been moved: its images are compared instead (`located`)
            continue
        if not (extending and name == "classes"):  # may name more classes now
            before, today = (" ".join(x) if isinstance(x, list) else str(x) for x in (was, value))
            raise UserError(
                f"--out {out}: was begun with --{name.replace('_', '-')} {before}, now it is {today}; give the same flags "
                "to finish it, or another --out"
            )
    return plan


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether everything that is planned is written, the manifest included."""
    if not (out / MANIFEST).is_file() or plan.unfinished(out):
        return False
    return not plan.extends or read_manifest(out).files.get(PLAN) == sha256(out / PLAN)


def index_file(out: Path, number: int) -> Path:
    """The list of images of a part."""
    return out / (f"index-{number:05d}.npz" if number else INDEX)


def read_parts(out: Path, plan: Plan) -> list[Index]:
    """The list of images of each part. Raises UserError if one is missing or damaged."""
    return [Index.from_file(index_file(out, part.number)) for part in plan.parts]


def index_source(settings: PackConfig, plan: Plan | None, *, extend: bool) -> list[Index]:
    """The images to pack, by part, listed once and kept beside the shards.

    Args:
        settings: of the program.
        plan: of the packing that was begun, if any.
        extend: list the source again, and add the images that are new as a part of their own, if there are any.

    Returns:
        The parts, with the places that the images have now.

    Raises:
        UserError: if a list has to be made again, or the source lies elsewhere, and the images have changed since.
    """
    out = settings.out
    if plan is None and index_file(out, 1).is_file():  # the plan was lost, the lists are what it was made of
        return [Index.from_file(index_file(out, k)) for k in range(sum(1 for _ in out.glob("index*.npz")))]
    if plan is None:
        index = list_images(settings)
        write_bytes(index_file(out, 0), index.to_bytes())
        return [index]
    broken = [part.number for part in plan.parts if not index_is_whole(out, part)]
    if broken:
        _list_again(settings, plan, broken)
    parts = read_parts(out, plan)
    moved = lies_elsewhere(parts, plan.settings["source"], settings.images)
    if not moved and not extend:
        return parts
    fresh = list_images(settings)
    if moved:
        parts = located(parts, fresh, settings.images, out)
    if extend:
        listed_at = [sys.maxsize if moved else index_file(out, part.number).stat().st_mtime_ns for part in plan.parts]
        new = new_images(parts, listed_at, fresh, settings)
        if len(new):
            write_bytes(index_file(out, len(parts)), new.to_bytes())
            parts.append(new)
    return parts


def check_source(settings: PackConfig, plan: Plan) -> None:
    """Raise UserError if the source lies elsewhere than when the dataset was packed and lacks some of its images."""
    parts = read_parts(settings.out, plan)
    if lies_elsewhere(parts, plan.settings["source"], settings.images):
        located(parts, list_images(settings), settings.images, settings.out)


def index_is_whole(out: Path, part: Part) -> bool:
    """Whether the list of images of a part matches its checksum."""
    path = index_file(out, part.number)
    return path.is_file() and sha256(path) == part.index


def _list_again(settings: PackConfig, plan: Plan, broken: list[int]) -> None:
    """Make a lost list of images again from the source. Raises UserError if that gives another list."""
    out, source = settings.out, settings.images
    fresh = list_images(settings)
    number, last = broken[0], len(plan.extends)
    again: Index | None = None
    if last == 0:
        again = fresh
    elif len(broken) == 1:
        known = {k: Index.from_file(index_file(out, k)) for k in range(last + 1) if k != number}
        if number < last:
            classes = known[last].classes[: plan.extends[number]["classes"]]
        else:
            classes = merged_classes(known[last - 1].classes, fresh.classes)
        if {fresh.classes[label] for label in fresh.labels} <= {*classes, *known[max(known)].classes}:
            again = remaining(fresh, known.values(), classes)
    contents = (form.to_bytes() for form in (forms(again, plan.settings["source"], source) if again else ()))
    content = next((c for c in contents if hashlib.sha256(c).hexdigest() == plan.parts[number].index), None)
    if content is None:
        raise UserError(
            f"--source {source}: its images are not those that packing into {out} began with; give another --out, or "
            "finish with the images of then and add the new ones by --extend afterwards"
        )
    write_bytes(index_file(out, number), content)


def make_plan(settings: PackConfig, parts: list[Index], networks: Networks, begun: Plan | None) -> Plan:
    """The plan for these parts, written unless it was begun before. Raises UserError if networks have changed since."""
    out, plans = settings.out, [begun] if begun else []
    vae, encoders = networks.vae_info, [asdict(encoder) for encoder in networks.encoder_infos]
    for plan in plans:
        for name, was, now in (("--vae", plan.vae, vae), ("--enc-type", plan.encoders, encoders)):
            if was != now:
                raise UserError(f"{name}: its weights are not those that {out} was begun with; give another --out")
    for number in range(len(begun.parts) if begun else 0, len(parts)):
        extends = []
        if plans:
            before, classes = plans[-1], len(parts[number - 1].classes)
            part = {"id": before.id, "index": before.index, "count": before.parts[-1].count, "classes": classes}
            extends = [*before.extends, part]
        plans.append(
            Plan(
                recorded(settings),
                sha256(index_file(out, number)),
                sum(map(len, parts[: number + 1])),
                networks.fields(settings.resolution),
                vae,
                encoders,
                _versions(networks.device),
                extends,
            )
        )
    if plans[-1] is not begun:
        write_sealed(out / PLAN, plans[-1].content())
    return plans[-1]


def _versions(device: torch.device) -> dict[str, str]:
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {**versions(()), "device": device.type, **gpu, **versions(("torch", "timm", "diffusers", "pillow", "numpy"))}
