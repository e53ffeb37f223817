"""Pictures of what the EMA has learned: a grid at fixed noise and labels, every time the same ones."""

from pathlib import Path

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.guidance import Guidance, network_velocity
from models.interpolant import Interpolant
from models.noise import Stream, normal_state
from models.samplers import sde_times
from models.sit import SiT
from models.solvers import euler_maruyama
from models.state import State


def preview_labels(num_classes: int, count: int) -> Tensor:
    """(count,) int64: classes spread evenly over all of them, the same at every step of every run."""
    return torch.arange(count) * num_classes // count if num_classes > count else torch.arange(count) % num_classes


@torch.no_grad()
def sample(
    network: SiT, interpolant: Interpolant, labels: Tensor, index: Tensor, *, seed: int, steps: int, guidance: Guidance
) -> State:
    """Sample by the SDE, sample i a function of (seed, index[i], label). labels, index: (N,) int64 on the device."""
    def noise(step: int) -> State:
        return normal_state(network.config, seed, Stream.PREVIEW, step + 1, index)

    velocity = network_velocity(network, labels, guidance)
    return euler_maruyama(velocity, noise(-1), sde_times(steps), interpolant, noise)


def save_grid(
    file: Path, pixels: Tensor, labels: Tensor, classes: list[str], nearest: Tensor | None, columns: int = 8
) -> None:
    """Write a PNG: each picture over its label and, when known, the class its class token is nearest to.

    pixels: (N, 3, H, W) uint8. The file appears whole, by rename.
    """
    from PIL import Image, ImageDraw

    n, _, height, width = pixels.shape
    scale = max(1, 64 // width)  # enlarge small pictures to a readable size
    columns = min(columns, n)
    cell_w, cell_h = width * scale + 4, height * scale + 28
    canvas = Image.new("RGB", (columns * cell_w, -(-n // columns) * cell_h), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, label) in enumerate(zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist())):
        x, y = i % columns * cell_w + 2, i // columns * cell_h
        canvas.paste(Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + height * scale + 1), _short(classes[label], width * scale), fill="black")
        if nearest is not None:
            right = int(nearest[i]) == label
            text = _short("= " + classes[int(nearest[i])], width * scale)
            pen.text((x, y + height * scale + 13), text, fill="darkgreen" if right else "firebrick")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.png")
    canvas.save(temporary)
    temporary.rename(file)


def _short(name: str, width: int) -> str:
    return name[: max(4, width // 6)].encode("ascii", "replace").decode()


def decode(autoencoder: Autoencoder, latents: Tensor, batch: int = 16) -> Tensor:
    """(N, C, h, w) latents => (N, 3, H, W) uint8 on the CPU, a few at a time."""
    return torch.cat([autoencoder.decode(part).cpu() for part in latents.split(batch)])
