"""Where results come from: versions of packages, digests of weights."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Version of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The model of this machine's processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def weights_sha256(network: "nn.Module", *, by_name: bool = False) -> str:
    """Hex SHA-256 of names and values of all parameters and buffers, in the order of the state dict or of their names."""
    import torch

    digest = hashlib.sha256()
    items = network.state_dict().items()
    for name, tensor in sorted(items) if by_name else items:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
