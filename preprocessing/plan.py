"""What a packing will write, decided before it starts and kept in `packing.json`: the ground of restart and repair."""

import hashlib
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import fingerprint, sha256
from config import UserError
from packed.format import MANIFEST, entry_file, npy_size, read_json, write_json
from preprocessing.index import Choice, Index
from preprocessing.networks import Networks
from preprocessing.sources import list_source

PLAN = "packing.json"
INDEX = "index.npz"
COMPARED = (  # settings that decide what is written: the same for the whole of a dataset
    "source", "classes", "resolution", "vae", "enc_type", "tokens", "pixels", "patch_size", "dtype", "batch_size",
    "shard_size", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What `packing.json` holds. settings: those of COMPARED. index: SHA-256 of index.npz. fields, vae, encoders: as in the
    manifest. versions: of what packed, for people."""

    settings: dict[str, Any]
    index: str
    count: int
    fields: dict[str, dict[str, Any]]
    vae: dict[str, Any]
    encoders: list[dict[str, Any]]
    versions: dict[str, str]

    @property
    def shard_size(self) -> int:
        return self.settings["shard_size"]

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    @property
    def id(self) -> str:
        """Stands in every shard's entry: shards of another plan do not count as done."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "versions"})

    def range(self, shard: int) -> tuple[int, int]:
        """First and last + 1 of the shard's items in the index."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.count)

    def bytes(self, shards: list[int]) -> int:
        """Size of the files of shards."""
        counts = [stop - start for start, stop in map(self.range, shards)]
        specs = [(np.dtype(spec["dtype"]), tuple(spec["shape"])) for spec in self.fields.values()]
        return sum(npy_size(*spec, count) for spec in specs for count in counts)

    def unfinished(self, out: Path) -> list[int]:
        """Shards that have no valid entry yet."""
        return [number for number in range(self.shards) if not self._is_done(out, number)]

    def _is_done(self, out: Path, number: int) -> bool:
        path = entry_file(out, number)
        try:
            return path.is_file() and read_json(path)["plan"] == self.id
        except (ValueError, KeyError):
            return False


def read_plan(out: Path) -> Plan:
    """Raises FileNotFoundError or ValueError."""
    if not (out / PLAN).is_file():
        raise FileNotFoundError(f"{out}: no {PLAN}; no packing was begun here")
    try:
        return Plan(**read_json(out / PLAN))
    except TypeError as error:
        raise ValueError(f"{out / PLAN} was written by another version of this code; pack into a new folder") from error


def compared_settings(settings: Any) -> dict[str, Any]:
    """The flags that must not change between the parts of one packing."""
    values = {name: getattr(settings, name) for name in COMPARED}
    values["source"] = str(settings.source.resolve())
    values["classes"] = settings.classes and sha256(_file(settings.classes, "--classes"))
    values["enc_type"] = list(settings.enc_type) if settings.tokens else []
    return values


def check_settings(out: Path, settings: Any) -> Plan | None:
    """The plan that `out` was begun with, if it was. Raises UserError if a flag differs from it."""
    if not (out / PLAN).is_file():
        if (out / MANIFEST).is_file():
            raise UserError(f"--out {out}: holds a dataset that was not packed here; give another folder")
        return None
    plan = read_plan(out)
    for name, value in compared_settings(settings).items():
        if plan.settings[name] != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"--out {out}: was begun with {flag} {_show(plan.settings[name])}, now it is {_show(value)}; give the same "
                "flags to finish it, or another --out"
            )
    return plan


def index_source(out: Path, settings: Any, plan: Plan | None) -> Index:
    """The images to pack, listed once and kept in `index.npz`. Raises UserError if they have changed since."""
    path = out / INDEX
    if plan is not None and path.is_file() and sha256(path) == plan.index:
        return Index.from_file(path)
    index = list_source(settings.source, Choice(settings.classes, settings.allow_one_class))
    content = index.to_bytes()
    if plan is not None and hashlib.sha256(content).hexdigest() != plan.index:
        raise UserError(
            f"--source {settings.source}: its images are not those that packing into {out} began with; give another --out"
        )
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    return index


def make_plan(out: Path, settings: Any, index: Index, networks: Networks, begun: Plan | None) -> Plan:
    """The plan of these settings, written unless it was begun before. Raises UserError if networks have changed since."""
    vae, encoders = networks.vae_info, [asdict(encoder) for encoder in networks.encoder_infos]
    if begun is not None:
        for name, was, now in (("--vae", begun.vae, vae), ("--enc-type", begun.encoders, encoders)):
            if was != now:
                raise UserError(f"{name}: its weights are not those that {out} was begun with; give another --out")
        return begun
    plan = Plan(
        compared_settings(settings), sha256(out / INDEX), len(index), networks.fields(settings.resolution, settings.pixels),
        vae, encoders, _versions(networks.device),
    )  # fmt: skip
    write_json(out / PLAN, asdict(plan))
    return plan


def check_room(out: Path, plan: Plan, shards: list[int]) -> None:
    """Raises UserError if the disk has no room for the shards that are to be written."""
    need, free = plan.bytes(shards), shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"--out {out}: {need / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free; --pixels without --tokens "
            "(--no-tokens) takes less"
        )


def _file(path: Path, flag: str) -> Path:
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    return path


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "device": device.type}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in ("torch", "timm", "diffusers", "pillow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
