"""Image files: which files of a folder are images, and image file => RGB pixels."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

SUFFIX = re.compile(
    r"\.(jpe?g|jpe|jfif|png|bmp|gif|webp|tiff?|ppm|pgm|pbm|pnm|jp2|avif|tga|ico|pcx)\Z", re.IGNORECASE | re.ASCII
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX")  # MPO is JPEG's
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_BYTES = 2**28  # of an image file; the largest of ImageNet has 16 MB

# Once and for all, since warnings.catch_warnings is not safe in threads: they are about metadata, and about sizes that are
# limited here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):
    """An image that cannot be used; the text says why, without its name."""


def is_image(name: str) -> bool:
    """Whether a file name promises an image; hidden files and what macOS adds to archives do not."""
    path = PurePosixPath(name)
    return bool(SUFFIX.search(name)) and not path.name.startswith(".") and "__MACOSX" not in path.parts


def walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, with "/", in the order of the file system.

    Links are followed, but never in a circle; hidden folders are skipped. An unreadable folder is a PermissionError.
    """
    stack: list[tuple[str, frozenset[str]]] = [("", frozenset((os.path.realpath(folder),)))]
    while stack:
        below, above = stack.pop()
        with os.scandir(folder / below) as found:
            for entry in found:
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if real not in above and not entry.name.startswith("."):
                        stack.append((name, above | {real} if entry.is_symlink() else above))
                elif entry.is_file():
                    yield name


def list_images(folder: Path) -> list[str]:
    """Paths of all images below a folder, as `walk` gives them, sorted as text."""
    return sorted(filter(is_image, walk(folder)))


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) by the file's header. Raises BadImage."""
    try:
        with path.open("rb") as stream:
            image = _open(stream)
            return image.height, image.width
    except OSError as error:
        raise _unreadable(error) from error


def decode_image(source: bytes | Path, max_pixels: int | None = None, *, still_8_bit: bool = False) -> Image.Image:
    """An image file => RGB, as Pillow's convert("RGB") does it.

    Alpha is dropped, grey repeated, CMYK converted, 16 bits are scaled to 8 (Pillow would clip grey ones), of an animation
    the first frame is taken, and EXIF orientation is ignored: but for the 16 bits all as in the published code.

    Args:
        source: the content of the file, or its path.
        max_pixels: value of the flag --max-pixels: images whose header promises more are refused before they take memory.
            None: Pillow's own limit of 179 million.
        still_8_bit: refuse animations, and channels of other than 8 bits.

    Raises:
        BadImage: the file cannot be read, or is not such an image.
    """
    data = source if isinstance(source, bytes) else _read(source)
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    image = _open(io.BytesIO(data))
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise BadImage(f"its header says {image.width} x {image.height} pixels, more than --max-pixels {max_pixels}")
    try:
        if still_8_bit and getattr(image, "n_frames", 1) > 1:
            raise BadImage("is animated; a still image is needed")
        if still_8_bit and image.mode not in MODES_OF_8_BITS:
            raise BadImage(f"has pixels of type {image.mode}; 8 bits per channel are needed")
        image.load()
        return _rgb(image)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"truncated or corrupt ({_reason(error)})") from error


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _too_large(size)
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def _open(stream: BinaryIO) -> Image.Image:
    try:
        Image.init()  # registers every format; later calls return at once
        return Image.open(stream, formats=FORMATS)
    except Exception as error:  # whatever a malformed file drives a decoder into
        raise BadImage(f"not a readable image ({_reason(error)})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of 32 bits (mode {image.mode}) have no known range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def _unreadable(error: OSError) -> BadImage:
    return BadImage(f"cannot be read ({error.strerror or error})")


def _too_large(size: int) -> BadImage:
    return BadImage(f"a file of {size} bytes is too large for an image (limit {MAX_BYTES})")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    text = (str(error).splitlines() or [""])[0]
    return "unknown format" if "cannot identify image file" in text else text or type(error).__name__
