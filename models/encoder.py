"""Frozen vision encoders over timm: uint8 pixels => class token and patch tokens (REG section 3)."""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import read_json
from config import MissingFile, UserError
from models import hub

PUBLISHED = {  # published names => timm names
    f"dinov2{reg}-vit-{letter}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
    for reg in ("", "reg")
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
}


class Tokens(NamedTuple):
    """What `forward_features` of timm gives.

    class_token: (N, D), of an encoder without one (N, 0). patch_tokens: (N, grid * grid, D), row-major.
    """

    class_token: Tensor
    patch_tokens: Tensor


class VisionEncoder(nn.Module):
    """A frozen network of timm that reads uint8 pixels (N, 3, H, W) of any size and gives grid x grid patch tokens."""

    def __init__(self, vit: nn.Module, name: str, grid: int) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.grid = grid
        self.dim = int(vit.num_features)
        self.input_size = grid * _stride(vit)
        self.has_class_token = _has_class_token(vit)
        mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tokens:
        """uint8 pixels (N, 3, H, W) => Tokens. Runs in autocast's type where autocast is on."""
        tokens = self.vit.forward_features(self.preprocess(pixels))  # (N, class token and registers + grid^2, D)
        return Tokens(tokens[:, 0, : self.dim * self.has_class_token], tokens[:, -(self.grid**2) :])

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Published input path: / 255, normalise, then bicubic without antialias to the encoder's size."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")
        return x


def load_encoder(name: str, grid: int, *, weights: bool = True, class_token: bool = True) -> VisionEncoder:
    """Load a frozen encoder; its position embedding is resampled to the grid by timm, with antialias, as published.

    Args:
        name: a published name (dinov2-vit-b, dinov2reg-vit-l, ...), any timm network that gives tokens of patches on a
            grid, a local folder in timm's format (config.json + model.safetensors), or NAME=FILE for a checkpoint file of
            a named architecture.
        grid: patch tokens per side: 16 at 256 px and 32 at 512 px in the paper.
        weights: False for the architecture alone, on the meta device: nothing is read or downloaded.
        class_token: whether it must have one; patch tokens alone serve the alignment of REPA.

    Raises:
        MissingFile: the weights are not available; one sentence with the cause.
        UserError: it gives other tokens, or the weights belong to another architecture.
    """
    import timm

    architecture, _, file = name.partition("=")
    folder = Path(architecture).expanduser()
    arguments: dict = {"num_classes": 0}
    if file:
        if not Path(file).expanduser().is_file():
            raise MissingFile(f"encoder {name!r}: no checkpoint file {file}")
        arguments["pretrained_cfg_overlay"] = {"file": str(Path(file).expanduser())}
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingFile(f"encoder folder {folder} has no config.json; expected timm's save_for_hf format")
        if "architecture" not in read_json(folder / "config.json"):
            raise UserError(f"encoder folder {folder}: its config.json names no architecture of timm")
        source = f"local-dir:{folder}"
    else:
        source = PUBLISHED.get(architecture, architecture)
        if "/" in source and not source.startswith("hf-hub:"):
            raise MissingFile(f"encoder folder {architecture} does not exist (hub models: hf-hub:OWNER/NAME)")
        if not file and (weights or "/" in source):
            hub.go_offline_if_unreachable()
    try:
        with torch.device("meta"):
            blank = timm.create_model(source, pretrained=False, num_classes=0)
            _check_tokens(blank, name, class_token=class_token)
        with nullcontext() if weights else torch.device("meta"):
            vit = timm.create_model(source, pretrained=weights, img_size=grid * _stride(blank), **arguments)
    except OSError as error:
        if folder.is_dir():
            raise MissingFile(f"encoder folder {folder} cannot be read: {hub.first_line(error)}") from error
        repo = hub.timm_repository(source)
        elsewhere = (
            f"`hf download {repo} --local-dir encoder` and pass --enc-type encoder, or give a checkpoint file as "
            f"--enc-type {architecture}=FILE"
        )
        raise MissingFile(
            f"the weights of encoder {name!r} are missing: {hub.cause(error, repo, elsewhere)}"
        ) from error
    except (RuntimeError, TypeError) as error:  # timm: unknown model, weights of another architecture, no img_size
        raise UserError(f"encoder {name!r} cannot be loaded: {hub.first_line(error)}") from error
    return VisionEncoder(vit, name, grid)


def _stride(vit: nn.Module) -> int:
    """Pixels from one patch to the next."""
    return int(vit.feature_info[-1]["reduction"])


def _has_class_token(vit: nn.Module) -> bool:
    """Whether the first token is a class token. Few classes of timm say so; the others have the parameter or not."""
    return bool(getattr(vit, "has_class_token", getattr(vit, "cls_token", None) is not None))


def _check_tokens(vit: nn.Module, name: str, *, class_token: bool) -> None:
    """Raise UserError unless a network on the meta device gives a token for each patch and, if asked for, a class token."""
    kind, (channels, height, width) = type(vit).__name__, vit.pretrained_cfg["input_size"]
    tokens = vit.eval().forward_features(torch.zeros(1, channels, height, width, device="meta"))
    patches = (height // _stride(vit)) * (width // _stride(vit))
    has = _has_class_token(vit)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < patches + has or channels != 3:
        raise UserError(
            f"encoder {name!r} ({kind}) does not give a token for each patch of an RGB image; name a vision transformer of "
            "timm"
        )
    if class_token and not has:
        raise UserError(
            f"encoder {name!r} ({kind}) has no class token, which REG needs: name one that has, such as dinov2-vit-b, or "
            "train REPA on its patch tokens with --no-class-token"
        )
