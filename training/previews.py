"""Pictures of what the EMA has learned: a grid at fixed noise and labels, every time the same ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.pictures import Cell, class_caption, write_sheet
from common.presets import spread_labels
from models.autoencoder import Autoencoder
from models.guidance import Guidance, network_velocity
from models.interpolant import Interpolant
from models.noise import Stream, normal_state
from models.samplers import sde_times
from models.sit import SiT
from models.solvers import Progress, euler_maruyama
from models.state import State


def preview_labels(num_classes: int, count: int) -> Tensor:
    """(count,) int64: classes spread evenly over all of them, the same at every step of every run."""
    return torch.tensor(spread_labels(num_classes, count), dtype=torch.int64)


@torch.no_grad()
def sample(
    network: SiT,
    interpolant: Interpolant,
    labels: Tensor,
    index: Tensor,
    *,
    seed: int,
    steps: int,
    guidance: Guidance,
    progress: Progress | None = None,
) -> State:
    """Sample by the SDE, sample i a function of (seed, index[i], label). labels, index: (N,) int64 on the device."""

    def noise(step: int) -> State:
        return normal_state(network.config, seed, Stream.PREVIEW, step + 1, index)

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
