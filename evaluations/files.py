"""Single image files: their size, their pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.crop import center_crop
from config import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
READABLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@contextmanager
def _image(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from error


def size(file: Path) -> tuple[int, int]:
    """(height, width), from the file's header. Raises ValueError naming the file."""
    with _image(file) as image:
        return image.height, image.width


def decode(file: Path, height: int, width: int, side: int | None) -> np.ndarray:
    """(height, width, 3) uint8 RGB; an image of another size is cropped to a square of `side` as for training.

    Raises ValueError naming the file.
    """
    with _image(file) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{file} is animated; a still image is needed")
        if image.mode not in READABLE_MODES:
            raise UserError(f"{file} has pixel type {image.mode}; 8 bits per channel are needed")
        if (image.height, image.width) == (height, width):
            return np.asarray(image.convert("RGB"))
        if side is None:
            raise UserError(f"{file} has changed: it was {height} x {width} and is {image.height} x {image.width}")
        return center_crop(image, side)
