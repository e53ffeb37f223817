"""Measure samples against a reference: `python evaluations/evaluate.py --reference R.npz --samples S.npz`.

FID, sFID, IS, precision and recall as the ADM evaluator computes them, and more on request; see docs/evaluation.md.
"""

if __name__ == "__main__" and not __package__:  # run as a file: start again as a module of the project
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execv(sys.executable, [sys.executable, "-m", "evaluations.evaluate", *sys.argv[1:]])

from dataclasses import dataclass
from pathlib import Path

from common.reporting import run
from config import UserError, parse, setting


@dataclass(frozen=True)
class EvaluateConfig:
    samples: tuple[Path, ...] = setting(
        help="samples: .npz files, image folders or packed datasets", group="images", also=("sample", "sample_batch")
    )
    reference: tuple[Path, ...] = setting(
        (), "the same for the reference; ADM's files with mu, sigma too", group="images", also=("ref", "ref_batch")
    )
    resolution: int | None = setting(
        None,
        "crop all images to this height and width, as for training; default: folders of several sizes are cropped to "
        "the other side's size",
        group="images",
        also=("image_size", "size"),
    )
    num_samples: int | None = setting(None, "use the first so many samples", group="images", also=("n",))
    out: Path | None = setting(None, "results file; default: results.json beside the samples", group="images")

    features: tuple[str, ...] = setting(
        ("inception",),
        "feature spaces: inception, dinov2, clip (or dinov2=FILE, clip=FILE), timm:NAME_OR_FOLDER",
        group="metrics",
    )
    precision_recall: bool = setting(True, "precision and recall (k = 3)", group="metrics")
    density_coverage: bool = setting(False, "density and coverage (k = 5)", group="metrics")
    kernel_distance: bool = setting(False, "kernel distance: KID, KDD", group="metrics")
    pr_dtype: str = setting(
        "adm",
        "distances of precision and recall: ADM's float16 arithmetic, or fp32",
        group="metrics",
        choices=("adm", "fp32"),
    )
    pr_reference: int = setting(10_000, "reference images used by neighbour and kernel metrics", group="metrics")
    split: int = setting(5000, "images in a chunk of the Inception Score", group="metrics")
    error_groups: int = setting(
        5, "jackknife groups for the errors of Frechet distances; 0: no errors", group="metrics"
    )
    classifier: str | None = setting(
        None, "timm network or folder with a head: accuracy of the samples' labels", group="metrics"
    )
    class_tokens: Path | None = setting(
        None, "class_tokens.npy of the samples: agreement with the encoder's tokens of the images", group="metrics"
    )
    encoder: str = setting("dinov2-vit-b", "the encoder of --class-tokens", group="metrics")
    token_grid: int = setting(16, "that encoder's grid of patch tokens: 16 at 256 px, 32 at 512 px", group="metrics")
    memorization: int = setting(0, "samples to show beside their nearest reference images", group="metrics")

    inception_weights: Path | None = setting(None, "default: torch's hub cache, or download", group="networks")
    inception_sha256: str | None = setting(
        None, "what that file must have, default: the published file's; or any", group="networks"
    )
    batch_size: int = setting(64, "images at once in each process", group="networks", also=("bs",))
    dtype: str = setting("fp32", "arithmetic of the networks", group="networks", choices=("fp32", "fp64"))
    device: str = setting("auto", "cpu, cuda, or auto", group="networks", choices=("auto", "cpu", "cuda"))
    cache: bool = setting(True, "keep the reference's statistics, by content", group="networks")
    cache_dir: Path = setting(Path("~/.cache/reg/statistics"), "where", group="networks")
    seed: int = setting(0, "of the subsets of the kernel distance", group="networks")


EXAMPLES = (
    "python evaluations/evaluate.py --reference VIRTUAL_imagenet256_labeled.npz --samples samples/reg-b2/samples.npz",
    "python evaluations/evaluate.py --reference images/ --samples samples/mine/samples.npz --features inception dinov2",
)


def main() -> None:
    settings = parse(EvaluateConfig, "Measure samples against a reference.", examples=EXAMPLES)
    _check(settings)
    from evaluations.measure import measure

    results = measure(settings)
    if results is not None:  # rank 0
        from evaluations.results import markdown

        for warning in results.warnings:
            print(f"warning: {warning}")
        print(markdown([results]), end="")


def _check(settings: EvaluateConfig) -> None:
    for name, least in (("batch_size", 1), ("split", 1), ("pr_reference", 1), ("error_groups", 0), ("memorization", 0)):
        if getattr(settings, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(settings, name)}")
    if settings.resolution is not None and settings.resolution < 1:
        raise UserError(f"--resolution must be at least 1, got {settings.resolution}")
    if settings.error_groups == 1:
        raise UserError("--error-groups 1 leaves no group out; give 0 or at least 2")
    if settings.memorization and not settings.reference:
        raise UserError("--memorization looks for the nearest reference images: give --reference")


if __name__ == "__main__":
    run(main)
