"""Model files: what inference needs, in one safetensors file from which the network is rebuilt without any flag."""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import parse_json, replacing, sha256
from common.typed import build
from config import MissingFile, UserError
from models.sit import SiT, SiTConfig

SCHEMA = 1
MODEL_FILE = "ema.safetensors"  # in a checkpoint
SHARED_FILE = "model.safetensors"  # in a folder that is handed on


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says beside the weights, stored as JSON in the file's header.

    network: the SiT's config. path: interpolant. vae, normalization: as in the dataset it was trained on. encoders: names.
    vae_weights, encoder_weights: SHA-256 of their weights, "" where not known; a local folder has its last name and this.
    cfg_prob: label dropout it was trained with (guidance needs > 0). step: optimiser steps taken. classes: names.
    """

    network: SiTConfig
    path: str
    resolution: int
    vae: str
    normalization: dict[str, Any]
    encoders: tuple[str, ...] = ()
    cfg_prob: float = 0.1
    step: int = 0
    classes: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    vae_weights: str = ""
    encoder_weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("encoders", "encoder_weights", "classes"):  # lists, when read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))


def save_model(path: Path, state_dict: dict[str, Tensor], info: ModelInfo, class_means: Tensor | None = None) -> None:
    """Write a model file, whole or not at all.

    Args:
        path: of the file.
        state_dict: of the network, on any device.
        info: its header.
        class_means: (classes, D) mean class token of each class, with which tokens are named; None: not known.

    Raises:
        WriteError: the file system refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state_dict.items()}
    if class_means is not None:
        tensors["class_means"] = class_means.contiguous().cpu()
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask: safetensors makes files that nobody else can read
        try:
            save_file(tensors, temporary, metadata={"reg": json.dumps(asdict(info))})
        except SafetensorError as error:  # wraps the error of the operating system
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error)) from error
        temporary.chmod(mode)


@dataclass
class Model:
    """A model file in memory. path: of the file itself. class_means: (classes, D), or None."""

    path: Path
    network: SiT
    info: ModelInfo
    class_means: Tensor | None

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the file, read at the first use."""
        return sha256(self.path)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """Rebuild the network of a model file, in eval mode. On the CPU its weights stay mapped from the file, copy-on-write.

    Args:
        path: the file, a checkpoint folder, or a run folder (its newest checkpoint).
        device: of the network.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    from safetensors import safe_open

    path = find_model(Path(path))
    info = read_info(path)
    with safe_open(path, framework="pt", device=str(device)) as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
    class_means = tensors.pop("class_means", None)
    network = blank_network(info.network, "meta")
    try:
        network.load_state_dict({name: x.float() for name, x in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the config in its header: {error}") from error
    network.t_embedder.frequencies = torch.empty_like(network.t_embedder.frequencies, device=device)
    network.t_embedder.reset_frequencies()
    return Model(path, network.eval(), info, class_means)


def read_info(path: Path) -> ModelInfo:
    """The header of a model file. Raises UserError for a file that is truncated, of another kind or another schema."""
    header = read_header(path)
    if "reg" not in header:
        raise UserError(
            f"{path} is not a model file of this project: its header has no config (convert.py converts published ones)"
        )
    content = parse_json(header["reg"], f"{path}: its header")
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}")
    return build(ModelInfo, content, f"{path}: its header")


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises UserError when it is truncated or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            return stream.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors do: the length of a JSON header, and its first brace."""
    with path.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def blank_network(config: SiTConfig, device: torch.device | str = "cpu") -> SiT:
    """A network whose weights are yet to be loaded, without the time to initialise them."""
    with torch.device("meta"):
        network = SiT(config)
    network.to_empty(device=device)
    network.t_embedder.reset_frequencies()
    return network


def find_model(path: Path) -> Path:
    """The model file meant by `path`: itself, the one in a checkpoint folder, or the newest one of a run folder."""
    if path.is_file():
        return path
    for name in (MODEL_FILE, SHARED_FILE):
        if (path / name).is_file():
            return path / name
    candidates = sorted(file for file in path.glob(f"checkpoints/*/{MODEL_FILE}") if file.parent.name.isdigit())
    if not candidates:
        held = sorted(str(file) for file in path.glob("*.pt"))
        raise MissingFile(
            f"no model file at {path}: give a model file, checkpoint folder or run folder, a published .pt"
            f"{f' ({held[0]} perhaps)' if held else ''}, or OWNER/NAME or OWNER/NAME/FILE on the Hugging Face hub"
        )
    return candidates[-1]
