"""Damage of a packed dataset is found and repaired; a dataset is described."""

import shutil

import numpy as np
import pytest
from PIL import Image

from config import UserError
from preprocessing import pack
from tests.packs import content, flags, flip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name",
    [
        "moments-00001.npy",
        "label-00000.npy",
        "pixels-00002.npy",
        "class_token.0-00001.npy",
        "patch_tokens.0-00000.npy",
        "crc-00001.npy",
        "shard-00002.json",
        "packing.json",
        "index.npz",
        "class_means.npy",
        "dataset.json",
    ],
)
def test_a_flipped_byte_is_found_and_repaired(toys, tmp_path, capsys, name):
    """One changed byte in any kind of file is found by --verify, and --repair restores the folder to the byte."""
    out = tmp_path / "out"
    for place in ("last", "first"):
        shutil.copytree(toys / "packed", out, dirs_exist_ok=True)
        flip(out / name, -5 if place == "last" else 3)
        with pytest.raises(UserError, match="broken files, the first is " + name.replace(".", r"\.")):
            pack.main(["--out", str(out), "--verify"])
        assert name in capsys.readouterr().out
        pack.main(flags(toys, out, "--repair"))
        assert content(out) == content(toys / "packed")
    pack.main(["--out", str(out), "--verify"])
    assert "every checksum is right" in capsys.readouterr().out


def test_verify_names_the_record(toys, tmp_path, capsys):
    """A broken record is named by its number and its image; repair redoes its shard alone."""
    out = tmp_path / "out"
    shutil.copytree(toys / "packed", out)
    flip(out / "pixels-00001.npy", 128 + 2 * 192 + 7)
    with pytest.raises(UserError):
        pack.main(["--out", str(out), "--verify"])
    text = capsys.readouterr().out
    assert "pixels-00001.npy: 1 of 6 records do not match their checksums: record 8 (bees/3.png)" in text
    kept = (out / "pixels-00000.npy").stat().st_mtime_ns
    pack.main(flags(toys, out, "--repair"))
    assert (out / "pixels-00000.npy").stat().st_mtime_ns == kept


def test_verify_finds_what_is_missing_or_short(toys, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(toys / "packed", out)
    (out / "label-00000.npy").unlink()
    (out / "shard-00001.json").unlink()
    (out / "moments-00002.npy").write_bytes((out / "moments-00002.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="3 broken files"):
        pack.main(["--out", str(out), "--verify"])
    text = capsys.readouterr().out
    assert "label-00000.npy: is missing" in text and "never finished" in text and "truncated" in text
    pack.main(flags(toys, out, "--repair"))
    assert content(out) == content(toys / "packed")
    with pytest.raises(UserError, match="nothing was packed here"):
        pack.main(["--out", str(tmp_path), "--verify"])


def test_describe(toys, tmp_path, capsys):
    """The description counts classes and storage and draws every image."""

    from preprocessing import describe

    sheet = tmp_path / "sheet.png"
    describe.main(["--data-dir", str(toys / "packed"), "--images", "6", "--sheet", str(sheet)])
    text = capsys.readouterr().out
    assert "15 records, 3 classes, 8 pixels" in text and "2 c: 5" in text and "images per class: 5 to 5" in text
    assert "left out" in text and "class token of" in text
    with Image.open(sheet) as image:
        assert np.asarray(image).std() > 10
