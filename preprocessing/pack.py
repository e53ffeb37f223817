"""Pack images for training: crop, VAE moments, encoder tokens or pixels => a packed dataset (see dataset.py, docs/data.md).

    torchrun --nproc_per_node=8 preprocessing/pack.py --source ILSVRC2012_img_train.tar --out data/imagenet256

The same command again finishes what was interrupted.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a script: start again as a module, with the packages in reach
    root = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.execv(sys.executable, [sys.executable, "-m", "preprocessing.pack", *sys.argv[1:]])

from common.reporting import run
from config import UserError, parse, setting


@dataclass(frozen=True)
class PackConfig:
    out: Path = setting(help="folder to write", group="output", also=("output", "dest", "out_dir"))
    shard_size: int = setting(2048, "records per file", group="output")
    extend: bool = setting(
        False,
        "add the images that --source has gained to the finished dataset in --out; its records stay",
        group="output",
    )
    verify: bool = setting(False, "re-read every checksum of --out, name what is broken, and stop", group="output")
    repair: bool = setting(False, "verify, then redo what is broken; give the flags it was packed with", group="output")

    source: Path | None = setting(
        None,
        "folder of class folders, zip, tar (also of tars), parquet or arrow, or the published layout",
        group="input",
        also=("input", "data", "images", "data_dir"),
    )
    classes: Path | None = setting(
        None, "text file: the classes to take, in the order of their labels, one a line", group="input"
    )
    allow_one_class: bool = setting(False, "pack images that are all of one class", group="input")
    resolution: int = setting(256, "pixels, height and width of the crop", group="input", also=("image_size", "size"))
    on_corrupt: str = setting(
        "error",
        "an image that cannot be read ends the packing, or is left out and listed",
        group="input",
        choices=("error", "skip"),
    )
    max_pixels: int = setting(100_000_000, "refuse images of more pixels than this", group="input")

    vae: str = setting("ema", "VAE: ema, mse, a hub id or a local folder", group="networks")
    enc_type: tuple[str, ...] = setting(
        ("dinov2-vit-b",), "encoders of the tokens: published names, timm names or local folders", group="networks"
    )
    tokens: bool = setting(True, "store the encoders' tokens: training never runs them", group="networks")
    pixels: bool = setting(False, "store the crops: training can run any encoder on them", group="networks")
    patch_size: int = setting(2, "of the network to be trained: each of its patches gets one token", group="networks")

    dtype: str = setting("fp32", "arithmetic of VAE and encoders", group="speed", choices=("fp32", "bf16", "fp16"))
    batch_size: int = setting(64, "images at a time", group="speed", also=("bs",))
    num_workers: int | None = setting(
        None,
        "reading processes for each GPU; default: the cores there are",
        group="speed",
        also=("workers", "num_processes"),
    )
    compile: bool = setting(False, "torch.compile the networks", group="speed")


EXAMPLES = (
    "python -m preprocessing.pack --source images --out data/mine --resolution 256",
    "torchrun --nproc_per_node=8 preprocessing/pack.py --source ILSVRC2012_img_train.tar --out data/imagenet256",
    "python -m preprocessing.pack --out data/mine --verify",
)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(PackConfig, "Pack images for training.", argv, examples=EXAMPLES)
    for name in ("resolution", "patch_size", "shard_size", "batch_size", "max_pixels"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least 1")
    if settings.source is None and not settings.verify:
        raise UserError("--source is required: the images to pack")
    if settings.extend and (settings.verify or settings.repair):
        raise UserError("--extend goes with neither --verify nor --repair; verify and repair first, then extend")
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a file; give a folder")

    if settings.verify or settings.repair:
        from preprocessing import verify

        verify.verify(settings.out, repair=settings.repair)
        if settings.verify:
            return
    from preprocessing import packing

    packing.pack(settings)


if __name__ == "__main__":
    run(main)
