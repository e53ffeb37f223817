"""Preview grids: samples of the EMA at fixed noise and labels, the same ones at every step."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.pictures import Cell, class_caption, write_sheet
from common.presets import GUIDANCE_HIGH, spread_labels
from common.reporting import progress
from models.acceleration import DTYPES
from models.autoencoder import Autoencoder
from models.class_token import nearest_class
from models.guidance import Guidance, network_velocity
from models.interpolant import Interpolant
from models.noise import Stream, normal_state
from models.samplers import sde_times
from models.sit import SiT
from models.solvers import Progress, euler_maruyama
from models.state import State
from training.interrupt import Stopped
from training.plan import Plan
from training.settings import TrainConfig

PREVIEWS, COLUMNS = 16, 8  # pictures of a grid, and of each of its rows


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
    precision: str = "fp32",
    progress: Progress | None = None,
) -> State:
    """Sample by the SDE, sample i a function of (seed, index[i], label). labels, index: (N,) int64 on the device.

    precision: of the run; one that is trained in bf16 is sampled in it, others in float32.
    """

    def noise(step: int) -> State:
        return normal_state(network.config, seed, Stream.PREVIEW, step + 1, index)

    velocity = network_velocity(network, labels, guidance, dtype=DTYPES["bf16" if precision == "bf16" else "fp32"])
    return euler_maruyama(velocity, noise(-1), sde_times(steps), interpolant, noise, progress=progress)


def draw(
    file: Path,
    network: SiT,
    plan: Plan,
    autoencoder: Autoencoder,
    class_means: Tensor | None,
    settings: TrainConfig,
    precision: str,
    requested: Callable[[], str | None] = lambda: None,
) -> None:
    """Write a contact sheet of guided samples, each over its label and the class that its class token is nearest to.

    Args:
        file: PNG; its name says the step.
        network: the EMA.
        plan: of the run.
        autoencoder: on the network's device.
        class_means: (classes, E) mean class tokens, or None.
        settings: seed, steps and guidance scale.
        precision: of the run; see `sample`.
        requested: why to stop, if a stop was requested; asked at each step.

    Raises:
        Stopped: a stop was requested.
        OSError: the file cannot be written.
    """
    device = next(network.parameters()).device
    labels = preview_labels(plan.network.num_classes, PREVIEWS).to(device)

    def moved(done: int) -> None:
        bar.update()
        if reason := requested():
            raise Stopped(reason)

    with progress(settings.preview_steps, unit="step", description=f"preview of step {int(file.stem[-7:])}") as bar:
        sampled = sample(
            network,
            plan.objective.interpolant,
            labels,
            torch.arange(PREVIEWS, device=device),
            seed=settings.seed,
            steps=settings.preview_steps,
            guidance=Guidance(settings.preview_scale, high=GUIDANCE_HIGH),
            precision=precision,
            progress=moved,
        )
    nearest: list[int | None] = [None] * PREVIEWS
    if class_means is not None and sampled.class_token is not None:
        nearest = nearest_class(sampled.class_token, class_means).tolist()
    pixels = autoencoder.decode(sampled.latent).permute(0, 2, 3, 1).cpu().numpy()
    cells = [
        Cell(picture, class_caption(label, token, plan.manifest.classes))
        for picture, label, token in zip(pixels, labels.tolist(), nearest)
    ]
    write_sheet(file, [cells[start : start + COLUMNS] for start in range(0, PREVIEWS, COLUMNS)])
