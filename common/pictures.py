"""Pictures as PNG files: one picture, or a contact sheet of captioned ones. numpy arrays and PIL, no torch."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.files import replacing

if TYPE_CHECKING:
    from PIL import Image, ImageFont

SMALLEST = 64  # pixels: narrower pictures of a sheet are enlarged by a whole factor to at least this
GAP = 4  # pixels between the cells of a sheet


class Line(NamedTuple):
    """One line of a caption."""

    text: str
    colour: str = "black"


class Cell(NamedTuple):
    """One picture of a sheet, (H, W, 3) uint8, over the lines of its caption."""

    pixels: np.ndarray
    caption: tuple[Line, ...] = ()


def class_caption(label: int, nearest: int | None, names: Sequence[str]) -> tuple[Line, ...]:
    """Caption of a sample: its class and, below, the class that its class token is nearest to.

    Args:
        label: class number; that of the null class is the number of classes.
        nearest: the class that the token is nearest to, green where it is the label; None: not known.
        names: of all classes, or empty. A name that the font cannot draw is replaced by the class's number.
    """
    null = bool(names) and label == len(names)

    def text(number: int) -> str:
        name = names[number] if number < len(names) else str(number)
        return name if name.strip() and _can_draw(name) else str(number)

    lines = [Line("no class" if null else text(label))]
    if nearest is not None:
        colour = "dimgray" if null else "darkgreen" if nearest == label else "firebrick"
        lines.append(Line(f"= {text(nearest)}", colour))
    return tuple(lines)


def write_sheet(path: Path, rows: Sequence[Sequence[Cell]]) -> None:
    """Write a PNG of rows of captioned pictures; each is as large as the largest, or less high or wide.

    Args:
        path: file to write, whole or not at all.
        rows: from the top; they may differ in length. Captions that are too long for their picture end in an ellipsis.
    """
    from PIL import Image, ImageDraw

    cells = [cell for row in rows for cell in row]
    factor = -(-SMALLEST // cells[0].pixels.shape[1])
    height, width = (factor * max(cell.pixels.shape[axis] for cell in cells) for axis in (0, 1))
    size = max(10, width // 16)  # of the letters: readable also when a sheet of large pictures is seen as a whole
    line_height = size + 2
    lines = max(len(cell.caption) for cell in cells)
    cell_width, cell_height = width + GAP, height + GAP + lines * line_height
    sheet = Image.new("RGB", (max(map(len, rows)) * cell_width, len(rows) * cell_height), "white")
    pen, font = ImageDraw.Draw(sheet), _font(size)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            x, y = column * cell_width + GAP // 2, number * cell_height + GAP // 2
            sheet.paste(Image.fromarray(cell.pixels.repeat(factor, axis=0).repeat(factor, axis=1)), (x, y))
            for below, line in enumerate(cell.caption):
                pen.text((x, y + height + below * line_height), _fit(line.text, width, font), line.colour, font)
    _save(sheet, path)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """One picture (H, W, 3) uint8 as a PNG file, whole or not at all."""
    from PIL import Image

    _save(Image.fromarray(pixels), path, compress_level=1)


def _save(image: "Image.Image", path: Path, **options: int) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", **options)


@cache
def _font(size: int = 10) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek and Cyrillic letters; without it PIL's own font."""
    from PIL import ImageFont

    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


@cache
def _glyph(character: str) -> bytes:
    return bytes(_font().getmask(character, mode="L"))


def _can_draw(text: str) -> bool:
    """Whether the font has all letters of a text; it draws the same box for each one that it does not have."""
    try:
        return all(c.isspace() or _glyph(c) != _glyph("\uffff") for c in unicodedata.normalize("NFC", text))
    except UnicodeError:  # half of a surrogate pair, from a folder name that is not UTF-8
        return False


def _fit(text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> str:
    """The text in one line, cut so that it is at most `width` pixels wide."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
