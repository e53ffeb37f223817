"""The images of a level as class-folder trees: `python -m study.images mnist|eurosat OUT --resolution N`.

Writes OUT/train and OUT/test with a folder for each class, named by its number, and train.npz and test.npz beside them.
The images are torchvision's, or those of LEVEL-train.zip and LEVEL-test.zip (CLASS/IMAGE) in a folder.
"""

import argparse
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.reporting import progress, run, say
from config import MissingFile
from quickstart.digits import read_image_folder

Labelled = tuple[int, Image.Image]


def from_zip(file: Path) -> Iterator[Labelled]:
    """The images of a zip of class folders, in the order of their names; classes are numbered by name.

    Raises:
        MissingFile: there is no such file.
    """
    if not file.is_file():
        raise MissingFile(f"{file} does not exist; --source names the folder of LEVEL-train.zip and LEVEL-test.zip")
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".png", ".jpg")))
        classes = sorted({name.split("/")[0] for name in names})
        for name in names:
            yield classes.index(name.split("/")[0]), Image.open(io.BytesIO(archive.read(name)))


def from_torchvision(level: str, part: str, folder: Path) -> Iterator[Labelled]:
    """torchvision's images, downloaded into a folder; EuroSAT has no test part: every fifth image of a class is held out."""
    from torchvision import datasets

    if level == "mnist":
        for picture, label in datasets.MNIST(str(folder), train=part == "train", download=True):
            yield label, picture
        return
    seen: dict[int, int] = {}
    for picture, label in datasets.EuroSAT(str(folder), download=True):
        seen[label] = seen.get(label, 0) + 1
        if (seen[label] % 5 == 0) == (part == "test"):
            yield label, picture


def write(level: str, out: Path, resolution: int, source: Path | None) -> dict[str, int]:
    """Write both parts; returns how many images each has."""
    counts = {}
    for part in ("train", "test"):
        images = from_zip(source / f"{level}-{part}.zip") if source else from_torchvision(level, part, out / "download")
        with progress(0, unit="image", description=part) as bar:
            for number, (label, picture) in enumerate(images):
                file = out / part / str(label) / f"{number:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                size = (resolution, resolution)
                picture.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, compress_level=1)
                bar.update()
        pixels, labels = read_image_folder(out / part)
        np.savez(out / f"{part}.npz", arr_0=pixels, arr_1=labels)
        counts[part] = len(pixels)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("level", choices=("mnist", "eurosat"))
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--resolution", type=int, required=True, metavar="N", help="pixels per side")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of the zips; default: torchvision downloads")
    settings = parser.parse_args()
    counts = write(settings.level, settings.out, settings.resolution, settings.source)
    say(f"{counts['train']:,} images to train on, {counts['test']:,} held out, in {settings.out}")


if __name__ == "__main__":
    run(main)
