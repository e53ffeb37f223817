"""Pictures of what the EMA has learned: a grid at fixed noise and labels, every time the same ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import philox
from models.autoencoder import Autoencoder
from models.interpolant import Interpolant
from models.samplers import Guidance, euler_maruyama, network_velocity, sde_times
from models.sit import SiT
from models.state import State

_PREVIEW = 3  # philox purpose: noise of previews


def preview_labels(num_classes: int, count: int) -> Tensor:
    """(count,) int64: classes spread evenly over all of them, the same at every step of every run."""
    return torch.arange(count) * num_classes // count if num_classes > count else torch.arange(count) % num_classes


@torch.no_grad()
def sample(
    network: SiT, interpolant: Interpolant, labels: Tensor, index: Tensor, *, seed: int, steps: int, guidance: Guidance,
    before_step: Callable[[], Any] = lambda: None,
) -> State:  # fmt: skip
    """Sample by the SDE, sample i a function of (seed, index[i], label). labels, index: (N,) int64 on the device.

    before_step: called before each of the `steps` steps, on the host.
    """
    config = network.config
    shape = (config.in_channels, config.input_size, config.input_size)

    def noise(step: int) -> State:
        z = philox.normal(seed, _PREVIEW, step + 1, index, shape[0] * shape[1] * shape[2] + config.class_token_dim)
        latent, token = z.split([z.shape[1] - config.class_token_dim, config.class_token_dim], dim=1)
        return State(latent.reshape(-1, *shape), token if config.class_token_dim else None)

    guided = network_velocity(network, labels, guidance)

    def velocity(state: State, t: Tensor) -> State:
        before_step()
        return guided(state, t)

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
