"""Published checkpoints <=> model files (the program is convert.py).

Reads the `.pt` files of REG and REPA (model, ema, opt, args, steps; REPA's legacy block names too) and the bare state dicts
of SiT, through an allowlist of classes: nothing in such a file is executed. The network's config is derived from the shapes
of its tensors.
"""

import argparse
import errno
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.files import ReadError, replacing
from config import MissingFile, UserError
from models.autoencoder import LatentNormalization
from models.hub import first_line
from models.model_file import ModelInfo, is_safetensors, load_model, read_header, save_model
from models.original_sit import is_original_sit, unify_sit
from models.sit import PRESETS, SIZES, SiT, SiTConfig, preset

_NAMES = (  # parts of names, ours and published; no other name contains them
    ("class_token_embedder.proj.", "cls_projectors2."),
    ("class_token_embedder.norm.", "wg_norm."),
    ("final_layer.class_token_linear.", "final_layer.linear_cls."),
    (".modulation.", ".adaLN_modulation.1."),
)


@dataclass(frozen=True)
class Given:
    """What the user says of a file that does not say it itself; None: take it from the file, or the published default."""

    num_heads: int | None = None
    encoder_depth: int | None = None
    path_type: str | None = None
    cfg_prob: float | None = None
    resolution: int | None = None
    vae: str = "ema"
    enc_type: tuple[str, ...] = ()
    licence: str | None = None
    family: str | None = None


class Published(NamedTuple):
    """A published file. state_dict: published names. settings: its args, {} if it has none. step: 0 if unknown."""

    state_dict: dict[str, Tensor]
    settings: dict[str, Any]
    step: int


def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a published state dict to ours; tensors are untouched."""
    return _renamed(state_dict, [(published, ours) for ours, published in _NAMES])


def to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return _renamed(state_dict, _NAMES)


def _renamed(state_dict: dict[str, Tensor], table: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    for old, new in table:
        state_dict = {name.replace(old, new): tensor for name, tensor in state_dict.items()}
    return state_dict


def read_published(path: Path, weights: str = "ema") -> Published:
    """Read a published file, of whatever name: tensors, plain values and argparse.Namespace, nothing else.

    Args:
        path: a file of torch.save, or a state dict as safetensors.
        weights: which of its state dicts, "ema" or "model"; a bare state dict is taken as it is.

    Returns:
        The weights, mapped from the file where its format allows it: the file must stay while they are used.

    Raises:
        UserError: the file is missing or damaged, holds other objects, or lacks the weights.
    """
    if not path.is_file():
        raise MissingFile(f"checkpoint {path} does not exist")
    content = _content(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of a checkpoint")
    settings = content.get("args") or {}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    bare = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    state_dict = content if bare else content.get(weights)
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        other = "; convert.py --weights model converts the others" if weights == "ema" and "model" in content else ""
        raise UserError(f"{path} has no {weights!r} weights, only {', '.join(map(str, content)) or 'nothing'}{other}")
    # DDP and torch.compile each put their prefix before the names
    state_dict = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in state_dict.items()}
    step = 0 if bare else content.get("steps", 0)
    if not isinstance(settings, dict) or not isinstance(step, int):
        raise UserError(f"{path}: its args are not settings, or its steps not a number")
    return Published(_modern_names(state_dict), settings, step)


def _content(path: Path) -> Any:
    """What a file holds; its first bytes say which format it has."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
        if is_safetensors(path):
            from safetensors.torch import load_file

            if "reg" in read_header(path):
                raise UserError(f"{path} is a model file of this project already")
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # today's format of torch.save; older ones cannot be mapped
        if not mapped and not start.startswith(b"\x80"):
            raise UserError(f"{path} {_what_it_is(start)}")
        damaged = zipfile.ZipFile(path).testzip() if mapped else None  # torch.load does not look at checksums
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} in it does not fit")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        if reason is None:
            raise UserError(f"{path} is damaged or not a checkpoint: it cannot be unpickled") from error
        raise UserError(
            f"{path} is refused: it holds more than tensors and settings (it asks for {reason[1]})"
        ) from error
    except (RuntimeError, EOFError, LookupError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a seek to nowhere is damage
            raise ReadError(path, error) from error
        what = f"{type(error).__name__}: {first_line(error).split('. ')[0]}"
        raise UserError(f"{path} is damaged or not a checkpoint ({what})") from error


def _what_it_is(start: bytes) -> str:
    """What a file with these first bytes is, when it is neither safetensors nor from torch.save."""
    if not start:
        return "is empty"
    if start.startswith(b"PK"):
        return "is damaged: its end is missing, so copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: download the file itself"
    return "is not a checkpoint: neither a file of torch.save nor safetensors"


def _modern_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the blocks of REPA's first checkpoints: those after the aligned one are decoder_blocks, numbered from 0."""
    first = _count(state_dict, r"^blocks\.(\d+)\.")
    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) + first}.", name): tensor
        for name, tensor in state_dict.items()
    }


def derive_config(state_dict: dict[str, Tensor], settings: dict[str, Any], given: Given = Given()) -> SiTConfig:
    """The network's config from the shapes of a published state dict; heads and alignment depth from args or `given`.

    Raises:
        UserError: the tensors are not those of a SiT, or a number is neither there nor given.
    """
    try:
        patch_weight = state_dict["x_embedder.proj.weight"]
        if patch_weight.ndim != 4:
            raise UserError(
                f"these are not the weights of a SiT: x_embedder.proj.weight is {tuple(patch_weight.shape)}"
            )
        hidden_size, channels, patch_size, _ = patch_weight.shape
        class_token_dim = state_dict["cls_projectors2.weight"].shape[1] if "cls_projectors2.weight" in state_dict else 0
        patches = state_dict["pos_embed"].shape[1] - (class_token_dim > 0)
        heads = _heads(state_dict, settings, given, hidden_size)
        depth = _count(state_dict, r"^blocks\.(\d+)\.")
        aligned = range(_count(state_dict, r"^projectors\.(\d+)\."))
        return SiTConfig(
            depth=depth,
            hidden_size=hidden_size,
            num_heads=heads,
            patch_size=patch_size,
            input_size=math.isqrt(patches) * patch_size,
            in_channels=channels,
            num_classes=state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
            mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
            qk_norm="blocks.0.attn.q_norm.weight" in state_dict,
            class_token_dim=class_token_dim,
            align_dims=tuple(state_dict[f"projectors.{k}.4.weight"].shape[0] for k in aligned),
            align_depth=_align_depth(settings, given, depth),
            projector_dim=state_dict["projectors.0.0.weight"].shape[0] if aligned else 2048,
        )
    except KeyError as error:
        raise UserError(f"these are not the weights of a SiT: {error} is missing") from error
    except IndexError as error:
        raise UserError("these are not the weights of a SiT: a tensor has too few dimensions") from error


def _heads(state_dict: dict[str, Tensor], settings: dict[str, Any], given: Given, hidden_size: int) -> int:
    if given.num_heads is not None:
        return given.num_heads
    if "blocks.0.attn.q_norm.weight" in state_dict:
        return hidden_size // state_dict["blocks.0.attn.q_norm.weight"].shape[0]
    known = {width: heads for _, width, heads in SIZES.values()}
    if settings.get("model") in PRESETS and preset(settings["model"]).hidden_size == hidden_size:
        return preset(settings["model"]).num_heads
    if hidden_size not in known:
        raise UserError(
            f"it does not say how many attention heads a width of {hidden_size} has: convert it with `python convert.py` "
            "and give --num-heads"
        )
    return known[hidden_size]


def _align_depth(settings: dict[str, Any], given: Given, depth: int) -> int:
    if given.encoder_depth is not None:
        return given.encoder_depth
    return int(settings.get("encoder_depth", min(depth, 4 if depth <= 12 else 8)))


def convert_published(
    source: Path, weights: str = "ema", given: Given = Given()
) -> tuple[dict[str, Tensor], ModelInfo]:
    """A published checkpoint as the weights and the header of a model file.

    Args:
        source: the file, which must stay while the weights are used.
        weights: "ema" or "model".
        given: what the file does not say.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    published = read_published(source, weights)
    settings = published.settings
    try:
        network = derive_config(published.state_dict, settings, given)
        state_dict = published.state_dict
        if is_original_sit(state_dict, settings, given.family):
            state_dict = unify_sit(state_dict)
        state_dict = from_published(state_dict)
        with torch.device("meta"):
            SiT(network).load_state_dict(state_dict, strict=True, assign=True)  # every tensor has its place
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    except KeyError as error:
        raise UserError(f"{source}: these are not the weights of a SiT: {error} is missing") from error
    except RuntimeError as error:  # of load_state_dict: a heading, then a line for each kind of difference
        reason = " ".join(str(error).splitlines()[1].split())
        raise UserError(f"{source}: these are not the weights of a SiT: {reason[:200]}") from error
    licence = given.licence or settings.get("licence")
    encoders = given.enc_type or tuple(filter(None, str(settings.get("enc_type") or "").split(",")))
    return state_dict, ModelInfo(
        network=network,
        path=given.path_type or settings.get("path_type", "linear"),
        resolution=given.resolution or int(settings.get("resolution", 8 * network.input_size)),
        vae=given.vae,
        normalization=asdict(LatentNormalization()),
        encoders=encoders if network.class_token_dim or network.align_dims else (),
        cfg_prob=0.1 if given.cfg_prob is None else given.cfg_prob,  # their code does not read its --cfg-prob
        step=published.step,
        classes=imagenet_classes() if network.num_classes == 1000 else (),
        notes={"imported": source.name, "weights": weights, **({"licence": licence} if licence else {})},
    )


def import_published(source: Path, out: Path, weights: str = "ema", given: Given = Given()) -> ModelInfo:
    """Convert the published checkpoint `source` into the model file `out`; returns what its header says."""
    state_dict, info = convert_published(source, weights, given)
    save_model(out, state_dict, info)
    return info


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 classes of ImageNet by label, each by its first name in WordNet and with its label where two share that."""
    from timm.data import ImageNetInfo

    words = ImageNetInfo("imagenet-1k")
    names = [words.index_to_description(label).split(",")[0] for label in range(1000)]
    times = Counter(names)
    return tuple(name if times[name] == 1 else f"{name} ({label})" for label, name in enumerate(names))


def export_published(source: Path, out: Path) -> ModelInfo:
    """Write a model file in the published layout: {"model", "ema", "args", "steps"}, names and shapes as published."""
    model = load_model(source)
    network, info = model.info.network, model.info
    state_dict = to_published(model.network.state_dict())
    args = argparse.Namespace(
        path_type=info.path,
        resolution=info.resolution,
        num_classes=network.num_classes,
        encoder_depth=network.align_depth,
        qk_norm=network.qk_norm,
        enc_type=",".join(info.encoders) or None,
        cfg_prob=info.cfg_prob,
        **({"licence": info.notes["licence"]} if "licence" in info.notes else {}),
    )
    content = {"model": state_dict, "ema": state_dict, "args": args, "steps": info.step}
    with (
        replacing(out) as temporary,
        temporary.open("wb") as stream,
    ):  # an open file: its errors are those of the system
        torch.save(content, stream)
    return info


def _count(state_dict: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})
