"""EfficientNet-Lite as a teacher that was trained elsewhere: pooled feature and 4 x 4 map, on their leading directions."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.arrays import read_npz
from common.files import replacing
from models.encoder import Tokens, load_encoder

INPUT, GRID = 128, 4  # pixels to which images are enlarged; the last map has a 32nd of them
DIRECTIONS = 96  # width of the tokens, as of the other teachers
PROJECTION = "directions.npz"


class LiteEncoder(nn.Module):
    """uint8 pixels (N, 3, H, W) => Tokens: the pooled feature as class token, the last map's cells as patch tokens."""

    def __init__(self, network: nn.Module, mean: Tensor, directions: Tensor) -> None:
        """Keep a timm network, the mean (C,) of its pooled features, and scaled leading directions (C, D)."""
        super().__init__()
        self.network, config = network.eval().requires_grad_(False), network.pretrained_cfg
        for name, value in (("pixel_mean", config["mean"]), ("pixel_std", config["std"])):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> Tensor:
        """The last feature map, (N, 16, C)."""
        x = F.interpolate(pixels.float() / 255, size=(INPUT, INPUT), mode="bicubic").clamp(0, 1)
        return self.network.forward_features((x - self.pixel_mean) / self.pixel_std).flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tokens:
        """Class and patch tokens, projected alike."""
        cells = (self.maps(pixels) - self.mean) @ self.directions
        return Tokens(cells.mean(1), cells)


def fit(network: nn.Module, pixels: Tensor, batch: int = 100) -> dict[str, np.ndarray]:
    """Mean and leading principal directions of the pooled features of images, scaled so that tokens have unit variance."""
    width = int(network.num_features)
    plain = LiteEncoder(network, torch.zeros(width), torch.eye(width))
    pooled = torch.cat([plain(part).class_token for part in pixels.split(batch)]).double()
    mean = pooled.mean(0)
    _, values, directions = torch.linalg.svd(pooled - mean, full_matrices=False)
    scale = values[:DIRECTIONS].square().sum().div(DIRECTIONS * (len(pooled) - 1)).sqrt()
    return {"mean": mean.float().numpy(), "directions": (directions[:DIRECTIONS].T / scale).float().numpy()}


def save_directions(folder: Path, found: dict[str, np.ndarray]) -> None:
    """Write them beside the network."""
    with replacing(folder / PROJECTION) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **found)  # type: ignore[arg-type]


def load_teacher(folder: str, grid: int) -> nn.Module:
    """The encoder of a folder: an EfficientNet-Lite with its directions, or any that `load_encoder` takes."""
    file = Path(folder) / PROJECTION
    if not file.is_file():
        return load_encoder(folder, grid)
    import timm

    found = read_npz(file)
    mean, directions = (torch.from_numpy(found[name]) for name in ("mean", "directions"))
    return LiteEncoder(timm.create_model(f"local-dir:{folder}", pretrained=True), mean, directions)
