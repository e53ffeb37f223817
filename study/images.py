"""The images of a level as class-folder trees: `python -m study.images mnist|eurosat OUT --resolution N`.

Writes OUT/train and OUT/test with a folder for each class, and train.npz and test.npz beside them.
The images are torchvision's, or those of LEVEL-train.zip and LEVEL-test.zip (CLASS/IMAGE) in a folder.
"""

import argparse
import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.reporting import progress, run, say
from config import MissingFile
from quickstart.digits import read_image_folder

Labelled = tuple[str, Image.Image]  # name of the class, image


def from_zip(file: Path) -> Iterator[Labelled]:
    """The images of a zip of class folders, in the order of their names.

    Raises:
        MissingFile: there is no such file.
    """
    if not file.is_file():
        raise MissingFile(f"{file} does not exist; --source names the folder of LEVEL-train.zip and LEVEL-test.zip")
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".png", ".jpg")))
        for name in names:
            yield name.split("/")[0], Image.open(io.BytesIO(archive.read(name)))


def from_torchvision(level: str, part: str, folder: Path) -> Iterator[Labelled]:
    """torchvision's images, downloaded into a folder; EuroSAT has no test part: every fifth image of a class is held out."""
    from torchvision import datasets

    if level == "mnist":
        for picture, label in datasets.MNIST(str(folder), train=part == "train", download=True):
            yield str(label), picture
        return
    seen: Counter[int] = Counter()
    eurosat = datasets.EuroSAT(str(folder), download=True)
    for picture, label in eurosat:
        seen[label] += 1
        if (seen[label] % 5 == 0) == (part == "test"):
            yield eurosat.classes[label], picture


def first(images: Iterable[Labelled], count: int) -> Iterator[Labelled]:
    """The first `count` images of each class."""
    seen: Counter[str] = Counter()
    for label, picture in images:
        seen[label] += 1
        if seen[label] <= count:
            yield label, picture


def write(level: str, out: Path, resolution: int, source: Path | None, per_class: int | None = None) -> dict[str, int]:
    """Write both parts; returns how many images each has."""
    counts = {}
    for part in ("train", "test"):
        images = from_zip(source / f"{level}-{part}.zip") if source else from_torchvision(level, part, out / "download")
        if per_class:
            images = first(images, per_class if part == "train" else per_class // 4)
        with progress(0, unit="image", description=part) as bar:
            for number, (label, picture) in enumerate(images):
                file = out / part / label / f"{number:05d}.png"
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
    parser.add_argument("--per-class", type=int, metavar="N", help="train on N images of each class, hold N / 4 out")
    settings = parser.parse_args()
    counts = write(settings.level, settings.out, settings.resolution, settings.source, settings.per_class)
    say(f"{counts['train']:,} images to train on, {counts['test']:,} held out, in {settings.out}")


if __name__ == "__main__":
    run(main)
