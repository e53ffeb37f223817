"""Settings of `python -m study LEVEL`: a recipe of recipes/study, and flags. Nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path

from config import RUN, parse, setting

LEVELS = {
    "digits": "Digits",
    "mnist": "MNIST",
    "eurosat": "EuroSAT",
    "imagenet": "ImageNet",
}  # and what they are called
RECIPES = Path(__file__).parents[1] / "recipes" / "study"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One level of the study: images, networks, the runs in their order, and how their samples are judged."""

    level: str = setting(help="which images", group="study", choices=tuple(LEVELS))
    resolution: int = setting(help="of the images, in pixels", group="images", above=0)
    per_class: int | None = setting(
        None, "take the first images of each class, and a fourth as many held out", group="images", above=3
    )
    grid: int = setting(
        4, "patches per side: of the small VAE's latents, 2 x 2, and of the encoders", group="images", above=0
    )
    flip: bool = setting(False, "pack each image a second time, mirrored", group="images")
    vae_steps: int = setting(400, "steps of the small VAE", group="images", above=0)
    vae_width: int = setting(16, "channels of the small VAE at full resolution", group="images", above=0)
    encoder_steps: int = setting(600, "steps of the supervised encoder", group="images", above=0)
    source: Path | None = setting(
        None, "folder of LEVEL-train.zip and LEVEL-test.zip; default: torchvision downloads", group="images", role=RUN
    )
    packed: Path | None = setting(
        None, "packed dataset of the user's, in the place of images and small networks", group="images"
    )
    train_images: Path | None = setting(None, "with --packed: images to judge against", group="images")
    held_out: Path | None = setting(None, "with --packed: images that were held out", group="images")
    spaces: tuple[str, ...] = setting(
        (), "with --packed: feature spaces of the judges, as of evaluate.py", group="images"
    )
    train: Path = setting(help="recipe of train.py that all rows share", group="training")
    steps: tuple[int, ...] = setting(help="optimiser steps after which a run is judged", group="training", above=0)
    ema_decay: float = setting(help="of the averaged weights, which are judged", group="training", at_least=0, below=1)
    runs: tuple[str, ...] = setting(
        help="'DATA TEACHER ROW[,ROW...] SEED[,SEED...] [guided]', in the order of their importance", group="training"
    )
    headline: int = setting(help="which of them stands beside the paper's numbers", group="judging", role=RUN)
    samples: int = setting(help="images that are judged, with the same noise in all runs", group="judging", above=1)
    solver_steps: int = setting(25, "Heun steps of the ODE, unguided", group="judging", above=0)
    guidance: tuple[str, ...] = setting(
        (),
        "'SCALE TOKEN_SCALE HIGH' of guided samples, within [0, HIGH]",
        group="judging",
        role=RUN,
    )
    only: tuple[str, ...] = setting(
        (), "run only what has these words in its name, such as unlabelled reg", group="machine", role=RUN
    )
    compile: bool = setting(
        False,
        "torch.compile the network in training; without it all machines do the same arithmetic",
        group="machine",
        role=RUN,
    )
    cuda_graph: bool = setting(
        False, "each optimiser step as one CUDA graph: the same arithmetic, fewer launches", group="machine", role=RUN
    )
    batch_size: int = setting(100, "images that are sampled at a time", group="machine", above=0, role=RUN)
    max_hours: float | None = setting(None, "begin no further run after this time", group="machine", above=0, role=RUN)
    dry_run: bool = setting(False, "list the runs and what is finished, and stop", group="machine", role=RUN)
    out: Path = setting(Path("runs/study"), "images, networks and runs; may be deleted", group="machine", role=RUN)
    results: Path = setting(Path("study/results"), "raw results, LEVEL.jsonl", group="machine", role=RUN)


def recipe(level: str, *flags: str) -> StudyConfig:
    """The settings of a level as its recipe gives them, and flags."""
    return parse(StudyConfig, "", ["--config", str(RECIPES / f"{level}.yaml"), *flags])


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `python -m study report`."""

    results: Path = setting(Path("study/results"), "raw results", group="report")
    page: Path = setting(
        Path("docs/reproduction.md"), "page to write; pictures go to images beside it", group="report", role=RUN
    )
    readme: Path = setting(Path("README.md"), "file whose table of results is written again", group="report", role=RUN)
