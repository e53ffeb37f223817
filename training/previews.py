"""Pictures of what the EMA has learned: a grid at fixed noise and labels, every time the same ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.pictures import Cell, class_caption, write_sheet
from common.presets import spread_labels
from models import philox
from models.autoencoder import Autoencoder
from models.interpolant import Interpolant
from models.samplers import Guidance, Progress, euler_maruyama, network_velocity, sde_times
from models.sit import SiT
from models.state import State

_PREVIEW = 3  # philox purpose: noise of previews


def preview_labels(num_classes: int, count: int) -> Tensor:
    """(count,) int64: classes spread evenly over all of them, the same at every step of every run."""
    return torch.tensor(spread_labels(num_classes, count), dtype=torch.int64)


@torch.no_grad()
def sample(
    network: SiT, interpolant: Interpolant, labels: Tensor, index: Tensor, *, seed: int, steps: int, guidance: Guidance,
    progress: Progress | None = None,
) -> State:  # fmt: skip
    """Sample by the SDE, sample i a function of (seed, index[i], label). labels, index: (N,) int64 on the device."""
    config = network.config
    shape = (config.in_channels, config.input_size, config.input_size)

    def noise(step: int) -> State:
        z = philox.normal(seed, _PREVIEW, step + 1, index, shape[0] * shape[1] * shape[2] + config.class_token_dim)
        latent, token = z.split([z.shape[1] - config.class_token_dim, config.class_token_dim], dim=1)
        return State(latent.reshape(-1, *shape), token if config.class_token_dim else None)

    velocity = network_velocity(network, labels, guidance)
    return euler_maruyama(velocity, noise(-1), sde_times(steps), interpolant, noise, progress=progress)


def save_grid(
    file: Path, pixels: Tensor, labels: Tensor, classes: Sequence[str], nearest: Tensor | None, columns: int = 8
) -> None:
    """Write a PNG: each picture over its label and, when known, the class its class token is nearest to.

    pixels: (N, 3, H, W) uint8. The file appears whole, by rename.
    """
    tokens = [None] * len(labels) if nearest is None else nearest.tolist()
    cells = [
        Cell(picture, class_caption(label, token, classes))
        for picture, label, token in zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist(), tokens)
    ]
    write_sheet(file, [cells[start : start + columns] for start in range(0, len(cells), columns)])


def decode(autoencoder: Autoencoder, latents: Tensor, batch: int = 16) -> Tensor:
    """(N, C, h, w) latents => (N, 3, H, W) uint8 on the CPU, a few at a time."""
    return torch.cat([autoencoder.decode(part).cpu() for part in latents.split(batch)])
