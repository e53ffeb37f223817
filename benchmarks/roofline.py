"""What training should take on a named GPU: operations, bytes, the time no step can beat, the expected one, and its cost.

    python -m benchmarks.roofline --gpu H200 --gpus 8 --recipes recipes/*.yaml

Nothing is measured here. Matrix products and memory traffic of a compiled step are counted and divided by the shares of the
data sheet's rates that one H200 has reached (models/cost.py); the lower bound lets the two overlap fully, "predicted" not at
all, and waits for the host where launching takes longer. Without --recipes: the paper's main rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.reporting import run
from config import UserError, parse, setting

if TYPE_CHECKING:
    from models.sit import SiTConfig

GPU_NAMES = (
    "T4",
    "V100",
    "RTX3090",
    "RTX4090",
    "RTX5090",
    "A10",
    "L4",
    "A6000",
    "L40S",
    "A100",
    "H100",
    "H200",
    "B200",
)


@dataclass(frozen=True)
class Roofline:
    gpu: str = setting("H200", "which GPU", group="machine", choices=GPU_NAMES)
    gpus: int = setting(1, "how many of them", group="machine", at_least=1)
    rent: float | None = setting(
        None, "dollars per GPU and hour; default: the assumed one of models/cost.py", group="machine"
    )
    recipes: tuple[Path, ...] = setting((), "recipe files of train.py", group="what")
    encoder: str = setting("dinov2-vit-b", "runs in the step; cached: it does not", group="what")
    input_size: int = setting(32, "side of the latent", group="what")
    label: str = setting("", "names the result files; default: the GPU", group="what")


class Row(NamedTuple):
    """A recipe: its name, network, number of optimiser steps and images per step."""

    name: str
    network: "SiTConfig"
    steps: int
    batch: int
    recompute: bool


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Roofline, (__doc__ or "").splitlines()[0], argv)
    from benchmarks import harness
    from models.cost import GPUS, USABLE, cost, encoder_macs, step_cost, training_memory

    gpu = GPUS[settings.gpu]
    rent = gpu.rent if settings.rent is None else settings.rent
    rows = []
    for row in rows_of(settings):
        if row.batch % settings.gpus:
            raise UserError(f"--gpus {settings.gpus}: {row.name} has batch size {row.batch}, which it does not divide")
        local, config = row.batch // settings.gpus, row.network
        uses_encoder = settings.encoder != "cached" and (config.class_token_dim or config.align_dims)
        macs = encoder_macs(settings.encoder, config.input_size // config.patch_size) if uses_encoder else 0
        step = step_cost(config, local, gpu, encoder_macs=macs, recompute=row.recompute)
        memory = training_memory(config, recompute=row.recompute)
        hours = row.steps * step.expected / 3600
        counted = cost(config)
        rows.append(
            {
                "recipe": row.name,
                "M parameters": round(counted.parameters / 1e6, 1),
                "GFLOP per image": (step.network_flops + step.encoder_flops) / local / 1e9,
                "GB moved per step": step.traffic / 1e9,
                "lower bound ms": 1e3 * step.floor,
                "predicted ms": 1e3 * step.expected,
                "predicted images/s": round(row.batch / step.expected),
                "GiB per GPU": memory.total(local) / 2**30,
                "largest batch per GPU": max(
                    0, math.floor((gpu.memory * 2**30 * USABLE - memory.state - memory.copies) / memory.activations)
                ),
                "steps": row.steps,
                "hours": hours,
                "dollars": round(hours * settings.gpus * rent),
            }
        )
    path = harness.write(
        "roofline",
        settings.label or f"{settings.gpu}x{settings.gpus}".lower(),
        {"gpu": settings.gpu, "gpus": settings.gpus, "dollars per GPU hour": rent, "encoder": settings.encoder},
        rows,
    )
    print(harness.table(path))


def rows_of(settings: Roofline) -> list[Row]:
    """The recipes given, or the paper's main rows. Raises UserError for a recipe that cannot be read."""
    from models.sit import preset

    if settings.recipes:
        return [recipe_row(path, settings.input_size) for path in settings.recipes]
    paper = [("SiT-B/2", 400_000), ("SiT-L/2", 400_000), ("SiT-XL/2", 400_000), ("SiT-XL/2", 4_000_000)]
    return [
        Row(f"{name} {steps // 1000}K", preset(name, input_size=settings.input_size), steps, 256, False)
        for name, steps in paper
    ]


def recipe_row(path: Path, input_size: int) -> Row:
    """Read what matters here from a recipe of train.py."""
    from models.sit import preset
    from train import TrainConfig

    recipe = parse(TrainConfig, "", ["--config", str(path), "--data-dir", "none", "--exp-name", path.stem])
    sizes = {name: getattr(recipe, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    changes = {name: value for name, value in sizes.items() if value is not None}
    if recipe.encoder_depth is not None:
        changes["align_depth"] = recipe.encoder_depth
    network = preset(
        recipe.model,
        input_size=input_size,
        qk_norm=recipe.qk_norm,
        class_token_dim=768 if recipe.class_token else 0,
        align_dims=(768,) if recipe.proj_coeff else (),
        **changes,
    )
    return Row(path.stem, network, recipe.max_train_steps, recipe.batch_size, recipe.gradient_checkpointing)


if __name__ == "__main__":
    run(main)
