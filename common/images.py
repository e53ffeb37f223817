"""Image files: which names promise an image, and image file => RGB pixels."""

import io
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, features

SUFFIX = re.compile(
    r"\.(jpe?g|jpe|jfif|png|apng|bmp|gif|webp|tiff?|ppm|pgm|pbm|pnm|jp2|j2k|jpx|avif|tga|ico|pcx|hei[cf]|hif|jxl|jxr)\Z",
    re.IGNORECASE | re.ASCII,
)
UNREAD = {"heic": "", "heif": "", "hif": "", "jxl": "", "jxr": "", "avif": "avif", "webp": "webp"} | dict.fromkeys(
    ("jp2", "j2k", "jpx"), "jpg_2000"
)  # suffix => the feature of Pillow that it takes, "" if there is none
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "PCX")  # MPO is JPEG's
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_BYTES = 2**28  # of an image file; the largest of ImageNet has 16 MB

# Once and for all, since warnings.catch_warnings is not safe in threads: they are about metadata, and about sizes that are
# limited here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):
    """An image that cannot be used; the text says why, without its name."""


def is_image(name: str) -> bool:
    """Whether a file name promises an image."""
    return SUFFIX.search(name) is not None


def unread_format(name: str) -> str | None:
    """Why an image of this name cannot be read here; None where it can."""
    suffix = name.rpartition(".")[2].lower()
    if suffix in UNREAD and not (UNREAD[suffix] and features.check(UNREAD[suffix])):
        return f"the format {suffix} cannot be read here; convert it to JPEG or PNG"
    return None


def image_size(source: bytes | Path) -> tuple[int, int]:
    """(height, width) by the header of a file, or of its content. Raises BadImage."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            image = _open(stream)
    except OSError as error:
        raise _unreadable(error) from error
    except BadImage:
        data = source if isinstance(source, bytes) else _read(source)
        image = _open(io.BytesIO(_without_metadata(data)))
    return image.height, image.width


def decode_image(source: bytes | Path, max_pixels: int | None = None, *, still_8_bit: bool = False) -> Image.Image:
    """An image file => RGB, as Pillow's convert("RGB") does it.

    Alpha is dropped, grey repeated, CMYK converted, 16 bits are scaled to 8 (Pillow would clip grey ones), of an animation
    the first frame is taken, and EXIF orientation is ignored: but for the 16 bits all as in the published code. Metadata
    never decides whether an image can be read.

    Args:
        source: the content of the file, or its path.
        max_pixels: value of the flag --max-pixels: images whose header promises more are refused before they take memory.
            None: Pillow's own limit of 179 million.
        still_8_bit: refuse animations (not the further views of a phone's MPO), and channels of other than 8 bits.

    Raises:
        BadImage: the file cannot be read, or is not such an image.
    """
    data = source if isinstance(source, bytes) else _read(source)
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    try:
        return _decode(data, max_pixels, still_8_bit)
    except BadImage:
        bare = _without_metadata(data)
        if bare == data:
            raise
    return _decode(bare, max_pixels, still_8_bit)


def _decode(data: bytes, max_pixels: int | None, still_8_bit: bool) -> Image.Image:
    image = _open(io.BytesIO(data))
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise BadImage(f"its header says {image.width} x {image.height} pixels, more than --max-pixels {max_pixels}")
    try:
        if still_8_bit and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise BadImage("is animated; a still image is needed")
        if still_8_bit and image.mode not in MODES_OF_8_BITS:
            raise BadImage(f"has pixels of type {image.mode}; 8 bits per channel are needed")
        image.load()
        return _rgb(image)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"truncated or corrupt ({_reason(error)})") from error


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without texts, profiles, previews and the like, which Pillow may stumble over."""
    kept, place = [data[:8]], 8
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        while len(data) - place >= 8:
            kind, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], "big")
            if kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT"):  # pixels, transparency, animation
                kept.append(data[place:end])
            place = end
    elif data[:2] == b"\xff\xd8":
        kept, place = [data[:2]], 2
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (
            b"",
            b"\xda",
        ):  # before the pixels
            marker, end = data[place + 1], place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):  # APP0 and APP14 say how colours are stored
                kept.append(data[place:end])
            place = end
    return b"".join([*kept, data[place:]])


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
