"""Image files of any kind => RGB crops, in bounded memory."""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.crop import center_crop

SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".tga",
        ".ico",
        ".pcx",
    )
)
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "TGA",
    "ICO",
    "PCX",
)  # JPEG opens MPO too
MAX_BYTES = 2**28  # of an image file; the largest of ImageNet has 16 MB


class BadImage(ValueError):
    """An image that cannot be packed; the text says why, without its name."""


class Crop(NamedTuple):
    """pixels: (size, size, 3) uint8. enlarged: whether the image was smaller than the crop."""

    pixels: np.ndarray
    enlarged: bool


def crop_file(data: bytes, size: int, max_pixels: int) -> Crop:
    """Decode an image file and cut its centre square. Raises BadImage."""
    image = decode(data, max_pixels)
    shorter = min(image.size)
    scale = max(1.0, size / shorter)
    if image.width * scale * image.height * scale > max_pixels:
        raise BadImage(
            f"{image.width} x {image.height} pixels would be enlarged to more than --max-pixels {max_pixels} before the crop"
        )
    return Crop(center_crop(image, size), shorter < size)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An image file => RGB, as Pillow's convert("RGB") does it: alpha is dropped, grey repeated, CMYK converted, of an
    animation the first frame is taken, and EXIF orientation is ignored, all as in the published code.

    16 bits are scaled to 8 (Pillow would clip grey ones). The header is read first: more than max_pixels pixels are
    refused before they take memory. Raises BadImage.
    """
    if len(data) > MAX_BYTES:
        raise BadImage(f"a file of {len(data)} bytes is no image to train on (limit {MAX_BYTES})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bombs are refused below; the rest is about metadata
        try:
            Image.init()  # register every format; done once, later calls return at once
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # whatever a malformed file drives a decoder into
            raise BadImage(f"not a readable image ({_reason(error)})") from error
        if image.width * image.height > max_pixels:
            raise BadImage(
                f"its header says {image.width} x {image.height} pixels, more than --max-pixels {max_pixels}"
            )
        try:
            image.load()
            return _rgb(image)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(f"truncated or corrupt ({_reason(error)})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of 32 bits (mode {image.mode}) have no known range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    text = (str(error).splitlines() or [""])[0]
    return "unknown format" if "cannot identify image file" in text else text or type(error).__name__
