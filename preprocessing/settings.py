"""Settings of the programs of this folder."""

from dataclasses import dataclass
from pathlib import Path

from config import RUN, UserError, setting

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class PackConfig:
    """Settings of preprocessing.pack; those of role RESULT are recorded in packing.json, in this order."""

    out: Path = setting(help="folder to write", group="output", also=("output", "dest", "out_dir"), role=RUN)
    extend: bool = setting(
        False,
        "add the images that --source has gained to the finished dataset in --out; its records stay",
        group="output",
        role=RUN,
    )
    verify: bool = setting(
        False, "re-read every checksum of --out, name what is broken, and stop", group="output", role=RUN
    )
    repair: bool = setting(
        False, "verify, then redo what is broken; give the flags it was packed with", group="output", role=RUN
    )

    source: Path | None = setting(
        None,
        "folder of class folders or of class archives, zip, tar (also of tars), a folder inside one (x.zip/train), parquet "
        "or arrow, or the published layout",
        group="input",
        also=("input", "data", "images", "data_dir"),
    )
    classes: Path | None = setting(
        None, "text file: the classes to take, in the order of their labels, one per line", group="input"
    )
    allow_one_class: bool = setting(False, "pack images that are all of one class", group="input", role=RUN)
    resolution: int = setting(
        256, "pixels, height and width of the crop", group="input", also=("image_size", "size"), at_least=1
    )
    flip: bool = setting(
        False,
        "pack each image a second time, mirrored: horizontal flips, encoded by VAE and encoders like any other image",
        group="input",
        also=("hflip", "horizontal_flip", "random_flip"),
    )
    on_corrupt: str = setting(
        "error",
        "an image that cannot be read ends the packing, or is left out and listed",
        group="input",
        choices=("error", "skip"),
        role=RUN,
    )
    max_pixels: int = setting(
        100_000_000, "refuse images of more pixels than this", group="input", at_least=1, role=RUN
    )

    vae: str = setting("ema", "VAE: ema, mse, a hub id or a local folder", group="networks")
    enc_type: tuple[str, ...] = setting(
        ("dinov2-vit-b",), "encoders of the tokens: published names, timm names or local folders", group="networks"
    )
    tokens: bool = setting(True, "store the encoders' tokens: training never runs them", group="networks")
    pixels: bool = setting(False, "store the crops: training can run any encoder on them", group="networks")
    patch_size: int = setting(
        2, "of the network to be trained: each of its patches gets one token", group="networks", at_least=1
    )

    dtype: str = setting("fp32", "arithmetic of VAE and encoders", group="speed", choices=PRECISIONS)
    batch_size: int = setting(64, "images per batch of the networks", group="speed", also=("bs",), at_least=1)
    shard_size: int = setting(2048, "records per shard", group="output", at_least=1)
    num_workers: int | None = setting(
        None,
        "reading processes for each GPU; default: the cores there are",
        group="speed",
        also=("workers", "num_processes"),
        at_least=0,
        role=RUN,
    )
    compile: bool | None = setting(
        None, "torch.compile the networks; auto: on a GPU, for 50,000 images or more", group="speed", role=RUN
    )

    @property
    def images(self) -> Path:
        """--source, which all but --verify needs. Raises UserError if it was not given."""
        if self.source is None:
            raise UserError("--source is required: the images to pack")
        return self.source


@dataclass(frozen=True)
class DescribeConfig:
    """Settings of preprocessing.describe."""

    data_dir: Path = setting(help="packed dataset", group="input", also=("dataset", "data", "out"))
    vae: str | None = setting(
        None, "decodes the sheet: ema, mse, hub id or folder; default: the dataset's", group="input"
    )
    sheet: Path | None = setting(None, "PNG to write; default: contact_sheet.png in the dataset", group="output")
    images: int = setting(40, "images on the sheet; 0: no sheet, and no VAE is loaded", group="output", at_least=0)
    classes: int = setting(10, "classes to list: the largest and the smallest ones", group="output", at_least=0)
    seed: int = setting(0, "of the choice of images", group="input")
