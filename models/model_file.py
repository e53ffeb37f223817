"""Model files: what inference needs, in one safetensors file from which the network is rebuilt without any flag."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import check_digests, fingerprint, parse_json, read_sealed, replacing, sha256
from common.typed import build
from config import MissingFile, UserError
from models.autoencoder import LatentNormalization
from models.sit import SiT, SiTConfig

SHARED_FILE = "model.safetensors"  # in a folder that is handed on
SCHEMA = STATE_SCHEMA = 1
MODEL_FILE, STATE = "ema.safetensors", "state.json"  # of a checkpoint


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
            save_file(tensors, temporary, metadata={"reg": json.dumps(_sealed(info, tensors))})
        except SafetensorError as error:  # wraps the error of the operating system
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error)) from error
        temporary.chmod(mode)


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class State:
    """What state.json says of a checkpoint. files: every other file by name. settings: of the run."""

    schema: int
    step: int
    files: dict[str, FileRecord]
    settings: dict[str, Any]


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, altered or unreadable; the message names the file."""


def read_state(checkpoint: Path) -> State:
    """Read state.json; those of earlier versions have no checksum of their own.

    Raises:
        DamagedCheckpoint: it is not what was written.
        UserError: the checkpoint is of a later version of this code.
    """
    path = checkpoint / STATE
    try:
        content = read_sealed(path, "take another checkpoint, or copy this one again", optional=True)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
    schema = content.get("schema")
    if type(schema) is int and schema > STATE_SCHEMA:
        raise UserError(f"{path} has schema {schema}, this code reads up to {STATE_SCHEMA}: update the code")
    try:
        return build(State, content, str(path))
    except UserError as error:
        raise DamagedCheckpoint(f"{error}; the file is damaged") from error


@dataclass
class Model:
    """A model file in memory. path: of the file itself. class_means: (classes, D), or None. recorded: SHA-256."""

    path: Path
    network: SiT
    info: ModelInfo
    class_means: Tensor | None
    recorded: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the file: as it was compared with, or read at the first use."""
        return self.recorded or sha256(self.path)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """Rebuild the network of a model file, in eval mode. On the CPU its weights stay mapped from the file, copy-on-write.

    The file is verified first (see `verify_model`).

    Args:
        path: the file, a checkpoint folder, or a run folder (its newest checkpoint).
        device: of the network.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    path = find_model(Path(path))
    info, recorded = read_info(path), verify_model(path)
    tensors = _tensors(path, device)
    if info.network.depth > len(tensors):
        raise UserError(f"{path}: has {len(tensors)} tensors, too few for {info.network.depth} blocks")
    class_means = tensors.pop("class_means", None)
    network = blank_network(info.network, "meta")
    try:
        network.load_state_dict({name: x.float() for name, x in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the config in its header: {error}") from error
    network.t_embedder.frequencies = torch.empty_like(network.t_embedder.frequencies, device=device)
    network.t_embedder.reset_frequencies()
    return Model(path, network.eval(), info, class_means, recorded)


def verify_model(path: Path) -> str | None:
    """Read a model file and compare it with what was written.

    In a checkpoint it is compared with the SHA-256 in state.json, elsewhere its weights with the one in its own header;
    files of earlier versions have none there.

    Args:
        path: of the file itself.

    Returns:
        The SHA-256 of the file, where it was compared with that.

    Raises:
        UserError: it has changed, or state.json beside it is damaged.
    """
    recorded = read_state(path.parent).files.get(path.name) if path.with_name(STATE).is_file() else None
    if recorded:
        check_digests(path.parent, {path.name: asdict(recorded)})
        return recorded.sha256
    digest = _read_sealed(path)[1]
    if digest and _weights_digest(_tensors(path, "cpu")) != digest:
        raise UserError(
            f"{path} has changed since it was written (SHA-256 of its weights differs); copy or make it again"
        )
    return None


def _tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error})") from error


def _weights_digest(tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 of names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sealed(info: ModelInfo, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The header: `info`, the digest of the weights, and a checksum of both."""
    content = {**json.loads(json.dumps(asdict(info))), "weights": _weights_digest(tensors)}
    return {**content, "checksum": fingerprint(content)}


def read_info(path: Path) -> ModelInfo:
    """The header of a model file. Raises UserError for a file that is damaged, of another kind or another schema."""
    return _read_sealed(path)[0]


def _read_sealed(path: Path) -> tuple[ModelInfo, str | None]:
    """The header, and the digest of the weights, which files of earlier versions do not have."""
    header = read_header(path)
    if "reg" not in header:
        raise UserError(
            f"{path} is not a model file of this project: its header has no config (convert.py converts published ones)"
        )
    content = parse_json(header["reg"], f"{path}: its header")
    if isinstance(content, dict) and content.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}, this code reads {SCHEMA}")
    if isinstance(content, dict) and "checksum" in content and content.pop("checksum") != fingerprint(content):
        raise UserError(
            f"{path} has changed since it was written (checksum of its header differs); copy or make it again"
        )
    digest = content.pop("weights", None) if isinstance(content, dict) else None
    info = build(ModelInfo, content, f"{path}: its header")
    build(LatentNormalization, info.normalization, f"{path}: its header: normalization")
    return info, digest


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
    found = (file for file in path.glob(f"checkpoints/*/{MODEL_FILE}") if file.parent.name.isdecimal())
    candidates = sorted(found, key=lambda file: int(file.parent.name))
    if not candidates:
        held = sorted(str(file) for file in path.glob("*.pt"))
        raise MissingFile(
            f"no model file at {path}: give a model file, checkpoint folder or run folder, a published .pt"
            f"{f' ({held[0]} perhaps)' if held else ''}, or OWNER/NAME or OWNER/NAME/FILE on the Hugging Face hub"
        )
    return candidates[-1]
