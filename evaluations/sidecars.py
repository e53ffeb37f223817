"""The JSON beside samples that says how they were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import check_digests, read_json
from config import UserError


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The content of SAMPLES.json beside an npz, or of samples.json in a folder; None without it.

    Raises:
        UserError: it is not a JSON object.
    """
    file = path.with_suffix(".json") if path.is_file() else path / "samples.json"
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; it should say how {path.name} was made") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object; it should say how {path.name} was made")
    return content


def check_recorded(path: Path) -> None:
    """Compare a file with what samples.json beside it recorded of it, if there is one that did.

    Raises:
        UserError: it is not as it was written.
    """
    files = (read_sidecar(path.parent) or {}).get("files", {})
    if path.name in files:
        check_digests(path.parent, {path.name: files[path.name]})


def check_digest(sidecar: Mapping[str, Any] | None, name: str, digest: str) -> list[str]:
    """A warning where a file, whose SHA-256 is `digest`, is not the one that its sidecar describes."""
    files = (sidecar or {}).get("files")
    recorded = files.get(name) if isinstance(files, dict) else None
    if not isinstance(recorded, dict) or recorded.get("sha256", digest) == digest:
        return []
    return [f"{name} has changed since the JSON beside it was written (its SHA-256 differs)"]


def common_sidecar(sidecars: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What all sidecars agree on; a key on which they differ becomes "mixed"."""
    keys = sorted(set().union(*sidecars))
    mixed = {
        key: sidecars[0].get(key) if all(side.get(key) == sidecars[0].get(key) for side in sidecars) else "mixed"
        for key in keys
    }
    return mixed or None


def sampler_cells(protocol: Mapping[str, Any]) -> tuple[str, str]:
    """("sde euler 250", "2.3 / 2.3 in [0, 0.85]") from the sidecar's settings; "-" where it does not say."""
    sampling = protocol.get("sampling", {})
    sampler = (
        " ".join(str(sampling[key]) for key in ("mode", "solver", "steps") if sampling.get(key) is not None) or "-"
    )
    scale = sampling.get("cfg_scale")
    if scale is None:
        return sampler, "-"
    if scale == 1 and sampling.get("cls_cfg_scale", 1) in (0, 1, None):
        return sampler, "none"
    guidance = f"{scale:g}" if isinstance(scale, int | float) else str(scale)
    if sampling.get("cls_cfg_scale") is not None:
        guidance += f" / {sampling['cls_cfg_scale']}"
    if sampling.get("guidance_low") is not None and sampling.get("guidance_high") is not None:
        guidance += f" in [{sampling['guidance_low']}, {sampling['guidance_high']}]"
    return sampler, guidance
