"""A whole level of the study at toy size; with `torchrun -m tests.toy_study FOLDER`, over several ranks."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.reporting import run
from config import parse
from packed.format import read_manifest, write_manifest
from study import run as running
from study.levels import Level
from study.settings import StudyConfig
from tests import tiny, toy_images

FLAGS = (
    "--resolution",
    "8",
    "--level",
    "digits",
    "--train",
    "recipes/digits.yaml",
    "--ema-decay",
    "0.9",
    "--samples",
    "40",
    "--headline",
    "2",
)


def settings(tmp_path, *extra, steps=("2", "4"), lines=("unlabelled supervised sit,reg 0",)):
    places = ("--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"))
    return parse(StudyConfig, "", [*FLAGS, *places, "--steps", *steps, "--runs", *lines, *extra])


@dataclass(frozen=True)
class Toy(Level):
    """Random images and networks in the place of the digits."""

    @property
    def spaces(self):
        return (f"timm:{self.network('judge')}",)

    def accuracy(self, teacher):
        return {"linear_accuracy": 0.5}

    def prepare(self, spec, runner):
        if self.train_images.exists():
            return
        self.train_images.parent.mkdir(parents=True)
        for file, count in ((self.train_images, 30), (self.held_out, 12)):
            np.savez(file, arr_0=toy_images.pixels(count, 8), arr_1=np.arange(count) % 3)
        toy_images.save_vit(self.network("judge"), classes=3)
        vae, encoder = tiny.write_vae(self.network("vae")), tiny.write_encoder(self.network("supervised"))
        for data in ("labelled", "unlabelled"):
            folder = tiny.write_dataset(self.out / "packed" / f"{data}-supervised", vae=vae)
            manifest = read_manifest(folder)
            write_manifest(folder, replace(manifest, encoders=[replace(manifest.encoders[0], name=str(encoder))]))


def toy_settings(folder: Path, *extra: str) -> StudyConfig:
    """A recipe of a tiny network, written into the folder, for the toy level."""
    text = "\n".join(f"{flag[2:]}: {value}" for flag, value in zip(tiny.FLAGS[::2], tiny.FLAGS[1::2]))
    (folder / "train.yaml").write_text(text)
    flags = ("--train", str(folder / "train.yaml"), "--solver-steps", "1", "--samples", "20", *extra)
    lines = ("labelled supervised sit,reg 0", "labelled supervised reg 0 guided")
    return settings(folder, *flags, "--guidance", "2 1 0.8", lines=lines)


if __name__ == "__main__":
    running.Level = Toy  # type: ignore[misc]
    run(lambda: running.study(toy_settings(Path(sys.argv[1]))))
