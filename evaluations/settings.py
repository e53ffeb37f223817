"""Settings of the programs of this folder: evaluate, compare, cknna and report."""

from dataclasses import dataclass
from pathlib import Path

from config import RUN, UserError, setting
from models.choices import DEVICES, DISTANCE_RULES


@dataclass(frozen=True)
class EvaluateConfig:
    samples: tuple[Path, ...] = setting(
        help="samples: .npz files, folders, zips or tars of images, or packed datasets",
        group="images",
        also=("sample", "sample_batch"),
    )
    reference: tuple[Path, ...] = setting(
        (), "the same for the reference; also npz files with mu, sigma", group="images", also=("ref", "ref_batch")
    )
    resolution: int | None = setting(
        None,
        "crop all images to this height and width, as for training; default: folders of several sizes are cropped to "
        "the other side's size",
        group="images",
        also=("image_size", "size"),
        at_least=1,
    )
    num_samples: int | None = setting(
        None,
        "use only N samples: the first ones, or evenly spaced ones where those of a class lie together",
        group="images",
        also=("n",),
        at_least=1,
    )
    out: Path | None = setting(None, "results file; default: results.json beside the samples", group="images", role=RUN)

    features: tuple[str, ...] = setting(
        ("inception",),
        "feature spaces: inception, dinov2, clip (or dinov2=FILE, clip=FILE), timm:NAME_OR_FOLDER",
        group="metrics",
    )
    precision_recall: bool = setting(True, "precision and recall (k = 3)", group="metrics")
    density_coverage: bool = setting(False, "density and coverage (k = 5)", group="metrics")
    mind: bool = setting(False, "MIND, a sliced Wasserstein distance that 5,000 samples suffice for", group="metrics")
    kernel_distance: bool = setting(False, "kernel distance: KID, KDD", group="metrics")
    pr_dtype: str = setting(
        "adm",
        "distances of precision and recall: ADM's float16 arithmetic, or fp32",
        group="metrics",
        choices=DISTANCE_RULES,
    )
    pr_reference: int = setting(
        10_000, "reference images used by neighbour and kernel metrics", group="metrics", at_least=1
    )
    split: int = setting(5000, "images per chunk of the Inception Score", group="metrics", at_least=1)
    error_groups: int = setting(
        5, "jackknife groups for the errors of Frechet distances; 0: no errors", group="metrics", at_least=0
    )
    classifier: str | None = setting(
        None, "timm network or folder with a head: accuracy of the samples' labels", group="metrics"
    )
    class_tokens: Path | None = setting(
        None, "class_tokens.npy of the samples: agreement with the encoder's tokens of the images", group="metrics"
    )
    encoder: str = setting("dinov2-vit-b", "the encoder of --class-tokens", group="metrics")
    token_grid: int = setting(
        16, "that encoder's grid of patch tokens: 16 at 256 px, 32 at 512 px", group="metrics", at_least=1
    )
    training_images: tuple[Path, ...] = setting(
        (),
        "the images trained on, where --reference holds held-out ones: how often samples are nearer to the former",
        group="metrics",
    )
    memorization: int = setting(0, "samples to show beside their nearest reference images", group="metrics", at_least=0)

    inception_weights: Path | None = setting(None, "default: torch's hub cache, or a download", group="networks")
    inception_sha256: str | None = setting(
        None, "expected SHA-256 of that file, or any; default: the published file's", group="networks"
    )
    batch_size: int = setting(64, "images per batch of each rank", group="networks", also=("bs",), at_least=1, role=RUN)
    dtype: str = setting("fp32", "arithmetic of the networks", group="networks", choices=("fp32", "fp64"))
    device: str = setting("auto", "cpu, cuda, or auto", group="networks", choices=DEVICES, role=RUN)
    cache: bool = setting(True, "keep the statistics of the reference, by content", group="networks", role=RUN)
    cache_dir: Path = setting(Path("~/.cache/reg/statistics"), "folder of that cache", group="networks", role=RUN)
    seed: int = setting(0, "seed of the subsets of the kernel distance", group="networks")

    def __post_init__(self) -> None:
        if self.error_groups == 1:
            raise UserError("--error-groups 1 leaves no group out; give 0 or at least 2")
        if self.memorization and not self.reference:
            raise UserError("--memorization looks for the nearest reference images: give --reference")
        if self.training_images and not self.reference:
            raise UserError("--training-images are compared with held-out images: give those with --reference")


@dataclass(frozen=True)
class CompareConfig:
    results: tuple[Path, ...] = setting(help="results.json files", group="compare")
    across: tuple[str, ...] = setting(
        (), "protocol keys that may differ (cfg_scale, steps, ...), or all: rank all the same", group="compare"
    )
    seeds: int = setting(
        1,
        "training seeds of each method: so many results in a row are one method's, in the same order of seeds; "
        "differences within their spread are not ranked",
        group="compare",
        at_least=1,
    )
    floor: Path | None = setting(
        None, "results.json of held-out images: adds FDr, Frechet distances over theirs", group="compare"
    )
    out: Path | None = setting(None, "also write the table to this Markdown file", group="compare", role=RUN)


@dataclass(frozen=True)
class CknnaConfig:
    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]", group="input"
    )
    dataset: Path = setting(help="packed dataset, with cached tokens or with pixels", group="input")
    encoder: str | None = setting(
        None, "encoder for a dataset of pixels; default: the first one the model was trained with", group="input"
    )
    num_images: int = setting(10_000, "images, spread evenly over the dataset", group="measurement", at_least=4)
    times: tuple[float, ...] = setting(
        (0.1, 0.3, 0.5, 0.7, 0.9), "t of the noisy input, in (0, 1)", group="measurement", above=0, below=1
    )
    layers: tuple[int, ...] = setting(
        (), "blocks to measure, counted from 1; default: all", group="measurement", at_least=1
    )
    neighbours: int = setting(10, "number of nearest neighbours, k", group="measurement", at_least=2)
    seed: int = setting(0, "seed of the noise", group="measurement")
    batch_size: int = setting(64, "images per batch", group="machine", at_least=1, role=RUN)
    device: str = setting("auto", "cpu, cuda, or auto", group="machine", choices=DEVICES, role=RUN)
    out: Path = setting(Path("cknna.json"), "results; a plot is written beside it as PNG", group="output", role=RUN)


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[Path, ...] = setting(help="run folders of train.py", group="report")
    out: Path = setting(Path("report.html"), "HTML file; a PNG of it is written beside", group="report", role=RUN)
    title: str = setting("Training report", "headline", group="report")
    results: tuple[Path, ...] = setting((), "further results.json files for the table", group="report")
