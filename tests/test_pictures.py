"""The contact sheet of captioned pictures, and which pictures grid.png shows."""

import sys

import numpy as np
import pytest
from PIL import Image

from common import pictures
from common.pictures import Cell, Line, class_caption, write_png, write_sheet
from sampling.gallery import Shown, arrange

NAMES = ("cat", "Übergröße", "собака", "ελληνικά", "猫", "bad\udce9name", "", "a\u0308pfel")


def picture(side=16, value=0):
    return np.full((side, side, 3), value, dtype=np.uint8)


def shown(labels):
    return [Shown(i, picture(), label, None) for i, label in enumerate(labels)]


def numbers(rows):
    return [[entry.number for entry in row] for row in rows]


def test_pictures_are_enlarged_and_stay_as_they_are(tmp_path):
    """16 pixels become 64 by repetition, 100 stay; rows may be of different lengths, empty places are white."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_sheet(tmp_path / "a" / "s.png", [[Cell(picture())], [Cell(picture()), Cell(pixels)]])
    sheet = np.asarray(Image.open(tmp_path / "a" / "s.png"))
    assert sheet.shape == (2 * 68, 2 * 68, 3)
    assert np.array_equal(sheet[70:134, 70:134][::4, ::4], pixels) and (sheet[:68, 68:] == 255).all()
    write_sheet(tmp_path / "b.png", [[Cell(picture(100), (Line("x"),))]])
    assert Image.open(tmp_path / "b.png").size == (104, 104 + 12)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["s.png"], "no temporary file stays"


def test_captions_are_drawn_below_their_picture_and_within_its_width(tmp_path):
    """In their colour; a long one is cut with an ellipsis and does not reach the next picture."""
    cells = [Cell(picture(64), (Line("a very long name " * 20, "firebrick"), Line("b"))), Cell(picture(64))]
    write_sheet(tmp_path / "s.png", [cells])
    sheet = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    inked = (sheet[66:] < 200).any(axis=2)
    assert inked[:, :66].any() and not inked[:, 68:].any()
    red = sheet[66:78, :66]
    assert (red[..., 0] - red[..., 1]).max() > 80, "the first line is red"
    assert pictures._fit("short", 64, pictures._font(10)) == "short"
    assert pictures._fit("a\nvery   long name", 64, pictures._font(10)).startswith("a very")
    assert pictures._fit("a very long name", 64, pictures._font(10)).endswith("…")


def test_names_in_any_script():
    """Latin, Greek and Cyrillic as they are; what the font has no letters for is named by its number."""
    drawn = [class_caption(i, None, NAMES)[0].text for i in range(len(NAMES))]
    assert drawn == ["cat", "Übergröße", "собака", "ελληνικά", "4", drawn[5], "6", "a\u0308pfel"]
    assert class_caption(3, None, ())[0].text == "3" and class_caption(8, 0, NAMES)[0].text == "no class"


def test_the_token_is_green_or_red():
    assert class_caption(0, 0, NAMES)[1] == Line("= cat", "darkgreen")
    assert class_caption(1, 0, NAMES)[1] == Line("= cat", "firebrick")
    assert class_caption(8, 0, NAMES)[1] == Line("= cat", "dimgray"), "the null label cannot be contradicted"


@pytest.mark.parametrize("matplotlib", [True, False])
def test_every_name_can_be_written(tmp_path, monkeypatch, matplotlib):
    """Also without matplotlib's font, and a name that is not UTF-8."""
    pictures._font.cache_clear()
    pictures._glyph.cache_clear()
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    cells = [Cell(picture(), (*class_caption(i, i, NAMES), Line(name))) for i, name in enumerate(NAMES)]
    write_sheet(tmp_path / "s.png", [cells])
    assert class_caption(4, None, NAMES)[0].text == "4"
    pictures._font.cache_clear()
    pictures._glyph.cache_clear()
    assert Image.open(tmp_path / "s.png").size == (8 * 68, 68 + 3 * 12)


def test_a_picture_is_written_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "p.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), pixels)


def test_at_least_eight_columns():
    """In the order of the samples, about as many rows as columns, 100 pictures at most."""
    assert numbers(arrange(shown(range(3)))) == [[0, 1, 2]]
    assert numbers(arrange(shown(range(16)))) == [list(range(8)), list(range(8, 16))]
    assert [len(row) for row in arrange(shown(range(200)))] == [10] * 10
    assert [len(row) for row in arrange(shown([0] * 20))] == [8, 8, 4], "one class"


def test_a_row_for_each_of_few_classes():
    """From 8 samples of each on, up to 20 classes; a class with fewer samples leaves its row short."""
    assert numbers(arrange(shown([1, 0] * 8))) == [list(range(1, 16, 2)), list(range(0, 16, 2))]
    assert [len(row) for row in arrange(shown([i % 10 for i in range(200)]))] == [10] * 10
    assert [len(row) for row in arrange(shown([i % 3 for i in range(200)]))] == [16] * 3
    assert [len(row) for row in arrange(shown([i % 20 for i in range(200)]))] == [8] * 20
    assert [len(row) for row in arrange(shown([0] * 15 + [4] * 3))] == [15, 3]
    assert [len(row) for row in arrange(shown([i % 10 for i in range(79)]))] == [9] * 8 + [7], "not enough of each"


def test_the_rows_of_an_interpolation_stay_whole():
    assert [len(row) for row in arrange(shown([0, 1] * 100), strip=30)] == [30] * 3
    assert [len(row) for row in arrange(shown([0, 1] * 8), strip=4)] == [4] * 4
    assert [len(row) for row in arrange(shown([0] * 200), strip=150)] == [100]
