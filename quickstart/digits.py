"""The images: 1,797 scans of handwritten digits that scikit-learn ships: `python -m quickstart.digits OUT`.

Writes the class-folder trees OUT/train and OUT/test, and the same pictures as OUT/train.npz and OUT/test.npz (arr_0 pixels,
arr_1 labels) for evaluation.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_json
from common.reporting import run, say
from config import MissingFile, UserError

SIZE = 16  # pixels; the scans are 8 x 8 and are enlarged


def write_image_folders(out: Path, held_out: float = 0.2) -> tuple[int, int]:
    """Write out/train/DIGIT/NNNN.png and out/test/DIGIT/NNNN.png; returns the two counts.

    Every fifth scan of each digit is held out, so both trees have all classes and the split is fixed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError(
            "the digits are scikit-learn's, which is not installed: pip install -r requirements-quickstart.txt"
        ) from error

    digits = load_digits()
    counts = {"train": 0, "test": 0}
    for label in range(10):
        scans = digits.images[digits.target == label]  # (n, 8, 8), ink 0 to 16
        for i, scan in enumerate(scans):
            part = "test" if i % round(1 / held_out) == 0 else "train"
            image = Image.fromarray((scan * 255 / 16).round().astype(np.uint8))
            file = out / part / str(label) / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(file)
            counts[part] += 1
    return counts["train"], counts["test"]


def read_image_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read such a tree: (N, H, W, 3) uint8 pixels and (N,) int64 labels, sorted by path; classes are numbered by name."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise MissingFile(f"no images under {folder}; run with --fresh")
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return pixels, np.unique([file.parent.name for file in files], return_inverse=True)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    train, test = write_image_folders(out)
    for part in ("train", "test"):
        pixels, labels = read_image_folder(out / part)
        np.savez(out / f"{part}.npz", arr_0=pixels, arr_1=labels)
        write_json(out / f"{part}.json", {"source": f"scikit-learn's digits, {part} part"})
    say(f"{train} digits to train on, {test} held out, in {out}")


if __name__ == "__main__":
    run(main)
