"""Results of generate.py and evaluate.py: whole, or named and made again; what is optional never takes them along."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from config import UserError
from sampling import assemble
from tests import toy_model
from tests.toy_model import generate, samples

place = toy_model.place  # a fixture


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A finished folder with everything, without parts."""
    out = tmp_path_factory.mktemp("finished") / "s"
    generate(place, out, "--class-tokens", "--png")
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "s")


@pytest.mark.parametrize("name", ["png/000003.png", "png/000004.png", "grid.png", "gallery.html"])
@pytest.mark.parametrize("content", [b"", None], ids=["empty", "torn"])
def test_torn_pictures_of_a_complete_folder_are_made_again(place, finished, copy, capsys, name, content):
    """After a power cut a file has 0 bytes, or the first ones alone."""
    whole = (finished / name).read_bytes()
    (copy / name).write_bytes(whole[:100] if content is None else content)
    generate(place, copy, "--class-tokens", "--png")
    assert "is complete" in capsys.readouterr().out
    assert (copy / name).read_bytes() == whole


@pytest.mark.parametrize("name", ["class_tokens.npy", "class_token_labels.npy", "samples.npz", "samples.json"])
def test_a_damaged_result_is_never_called_complete(place, copy, name):
    """Without parts it is named; nothing is overwritten."""
    damaged = (copy / name).read_bytes()[:-1] + (b"" if name == "samples.json" else b"\xaa")
    (copy / name).write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{name} .* and its parts are gone; give another --out, or delete"):
        generate(place, copy, "--class-tokens")
    assert (copy / name).read_bytes() == damaged


def test_a_damaged_result_is_assembled_again_from_its_parts(place, finished, tmp_path):
    out = tmp_path / "s"
    generate(place, out, "--class-tokens", "--keep-parts")
    (out / "class_tokens.npy").write_bytes(b"")
    generate(place, out, "--class-tokens")
    assert (out / "class_tokens.npy").read_bytes() == (finished / "class_tokens.npy").read_bytes()


def test_every_file_is_on_the_disk_before_the_parts_go(place, tmp_path, monkeypatch):
    """A power cut after the parts are gone finds all files whole: each was synced under its temporary name, and its folder
    after the renaming."""
    out, synced, removed = tmp_path / "s", [], []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    monkeypatch.setattr(assemble.Parts, "remove", lambda self: removed.append(len(synced)))
    generate(place, out, "--class-tokens", "--png", "--num-fid-samples", "3")
    names = ["samples.npz", "class_tokens.npy", "class_token_labels.npy", "grid.png", "gallery.html", "samples.json"]
    for name in [*names, *(f"png/{i:06d}.png" for i in range(3))]:
        place_of_file = synced.index(f"{out / name}.tmp")
        assert str((out / name).parent) in synced[place_of_file : removed[0]], name


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("a bug")])
def test_pictures_that_fail_do_not_take_the_samples_along(place, finished, tmp_path, monkeypatch, capsys, error):
    """The gallery and the contact sheet are left out with a warning; of a bug the traceback is printed."""
    out = tmp_path / "s"

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "write_gallery", fail)
        generate(place, out)
    captured = capsys.readouterr()
    assert f"warning: {out}/gallery.html is left out: {error}" in captured.out
    assert ("ZeroDivisionError" in captured.err) == (not isinstance(error, OSError))
    assert np.array_equal(samples(out)[0], samples(finished)[0]) and (out / "grid.png").is_file()
    assert set(json.loads((out / "samples.json").read_text())["files"]) == {"samples.npz", "grid.png"}
    generate(place, out)
    assert "is complete" in capsys.readouterr().out
