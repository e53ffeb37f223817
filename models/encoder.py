"""Frozen vision encoders over timm: uint8 pixels => class token and patch tokens (REG section 3)."""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import MissingFile, UserError
from models import hub

PUBLISHED = {  # published names => timm names
    f"dinov2{reg}-vit-{letter}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
    for reg in ("", "reg")
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
}


class Tokens(NamedTuple):
    """class_token: (N, D). patch_tokens: (N, grid * grid, D), row-major. Both after the encoder's last normalisation."""

    class_token: Tensor
    patch_tokens: Tensor


class VisionEncoder(nn.Module):
    """A frozen ViT that reads uint8 pixels (N, 3, H, W) of any size and gives grid x grid patch tokens."""

    def __init__(self, vit: nn.Module, name: str, grid: int) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.grid = grid
        self.dim = int(vit.num_features)
        self.input_size = grid * vit.patch_embed.patch_size[0]
        mean, std = vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tokens:
        """uint8 pixels (N, 3, H, W) => Tokens. Runs in autocast's type where autocast is on."""
        tokens = self.vit.forward_features(self.preprocess(pixels))  # (N, prefix + grid^2, D)
        return Tokens(tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :])

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Published input path: / 255, normalise, then bicubic without antialias to the encoder's size."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")
        return x


def load_encoder(name: str, grid: int, *, weights: bool = True) -> VisionEncoder:
    """Load a frozen encoder; its position embedding is resampled to the grid by timm, with antialias, as published.

    Args:
        name: a published name (dinov2-vit-b, dinov2reg-vit-l, ...), any timm ViT with a class token, a local folder in
            timm's format (config.json + model.safetensors), or NAME=FILE for a checkpoint file of a named architecture.
        grid: patch tokens per side: 16 at 256 px and 32 at 512 px in the paper.
        weights: False for the architecture alone, on the meta device: nothing is read or downloaded.

    Raises:
        MissingFile: the weights are not available; one sentence with the cause.
        UserError: it is not a ViT with a class token, or the weights belong to another architecture.
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
        source = f"local-dir:{folder}"
    else:
        source = PUBLISHED.get(architecture, architecture)
        if "/" in source and not source.startswith("hf-hub:"):
            raise MissingFile(f"encoder folder {architecture} does not exist (hub models: hf-hub:OWNER/NAME)")
        if not file and (weights or "/" in source):
            hub.go_offline_if_unreachable()
    try:
        with torch.device("meta"):
            patch_size = _patch_size(timm.create_model(source, pretrained=False, num_classes=0), name)
        with nullcontext() if weights else torch.device("meta"):
            vit = timm.create_model(source, pretrained=weights, img_size=grid * patch_size, **arguments)
    except OSError as error:
        if folder.is_dir():
            raise MissingFile(f"encoder folder {folder} cannot be read: {hub.first_line(error)}") from error
        repo = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else f"timm/{source}"
        elsewhere = (
            f"`hf download {repo} --local-dir encoder` and pass --enc-type encoder, or give a checkpoint file as "
            f"--enc-type {architecture}=FILE"
        )
        raise MissingFile(
            f"the weights of encoder {name!r} are missing: {hub.cause(error, repo, elsewhere)}"
        ) from error
    except RuntimeError as error:  # timm: unknown model, or weights of another architecture
        raise UserError(f"encoder {name!r} cannot be loaded: {hub.first_line(error)}") from error
    return VisionEncoder(vit, name, grid)


def _patch_size(vit: nn.Module, name: str) -> int:
    """Side of a patch in pixels. Raises UserError for a network without class token or patches."""
    if not getattr(vit, "has_class_token", False) or not hasattr(vit, "patch_embed"):
        raise UserError(f"encoder {name!r} ({type(vit).__name__}) is not a ViT with a class token")
    return int(vit.patch_embed.patch_size[0])
