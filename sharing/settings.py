"""Settings of sharing.export; without torch."""

from dataclasses import dataclass
from pathlib import Path

from config import setting
from models.choices import EXPORTS, PRECISIONS


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]",
        group="what",
        also=("ckpt", "model", "run", "source"),
    )
    out: Path = setting(help="folder to write; it must not exist", group="what", also=("output", "output_dir", "dest"))
    format: str = setting(
        "model",
        "model: for this project; diffusers: a pipeline with its code",
        group="what",
        choices=EXPORTS,
        also=("to",),
    )
    dtype: str = setting(
        "fp32", "precision of the stored weights; the VAE keeps its own", group="what", choices=PRECISIONS
    )
    vae: str | None = setting(None, "where the model's VAE is; default: as at packing", group="what")

    name: str | None = setting(None, "title of the model card; default: the folder's name", group="model card")
    results: tuple[Path, ...] = setting((), "results.json files for the card's table", group="model card")
    files: tuple[Path, ...] = setting(
        (), "sample files (samples.json and .npz, folders) whose SHA-256 the card lists", group="model card"
    )
    data: str = setting("", "a sentence on the images it was trained on, and their licence", group="model card")
    licence: str | None = setting(
        None, "of the weights, e.g. mit or cc-by-4.0; default: the one in the model file", group="model card"
    )
