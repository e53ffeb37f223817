"""Results of generate.py and evaluate.py: whole, or named and made again; what is optional never takes them along."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.files import WriteError
from config import UserError
from evaluations import measure
from evaluations.results import load
from generate import read
from sampling import assemble, run
from tests import toy_model
from tests.toy_model import generate, samples, write_model

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


def test_tokens_that_have_changed_are_not_used(place, copy, measurement):
    """One bit of class_tokens.npy, for --like and for evaluate --class-tokens: its digest stands in samples.json."""
    content = bytearray((copy / "class_tokens.npy").read_bytes())
    content[-3] ^= 4
    (copy / "class_tokens.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"--like .*class_tokens.npy has changed since it was written"):
        generate(place, copy.with_name("other"), "--like", f"{copy}/class_tokens.npy:0")
    asked = measurement(samples=(copy / "samples.npz",), class_tokens=copy / "class_tokens.npy")
    with pytest.raises(UserError, match=r"class_tokens.npy has changed since it was written"):
        measure.measure(asked)


def test_a_cache_that_cannot_be_written_is_a_warning(measurement, tmp_path, monkeypatch, capsys):
    """A full disk, a read-only one, and no home folder at all: the numbers do not depend on the cache."""
    usual = measure.measure(measurement(cache=False)).metrics
    for number in (errno.ENOSPC, errno.EROFS):
        with monkeypatch.context() as patch:
            patch.setattr(
                "evaluations.reference.np.savez", lambda *_, n=number, **__: _raise(OSError(n, os.strerror(n)))
            )
            assert measure.measure(measurement()).metrics == usual
        assert "warning: the statistics of the reference are not kept (" in capsys.readouterr().out
    monkeypatch.setattr("pathlib.Path.home", lambda: _raise(RuntimeError("Could not determine home directory.")))
    monkeypatch.setattr(
        "pathlib.Path.expanduser", lambda path: _raise(RuntimeError("no home")) if "~" in str(path) else path
    )
    assert measure.measure(measurement(cache_dir=Path("~/.cache/reg/statistics"))).metrics == usual
    assert "not kept (no home); --cache-dir names another folder" in capsys.readouterr().out
    assert not Path("~").exists()


def test_results_are_printed_when_they_cannot_be_written(measurement, monkeypatch, capsys):
    """The disk fills up during the measurement."""
    monkeypatch.setattr(
        "evaluations.results.write_text", lambda path, _: _raise(WriteError(f"the disk is full at {path}"))
    )
    with pytest.raises(WriteError, match=r"the disk is full at .*results.json"):
        measure.measure(measurement())
    printed = capsys.readouterr().out
    assert "FD judge" in printed and "warning: only 40 samples" in printed


def test_what_fails_later_does_not_take_the_first_results_along(measurement, tmp_path, capsys):
    """A second feature space whose weights are missing, and pairs that cannot be drawn."""
    (tmp_path / "memorization.png").mkdir()
    with pytest.raises(UserError, match=r"no-such-folder does not exist"):
        measure.measure(measurement(features=(*measurement().features, "timm:/no-such-folder"), memorization=2))
    found = load(tmp_path / "results.json")
    assert {"fd_judge", "authenticity"} <= set(found.metrics)
    assert "not everything was measured: /no-such-folder does not exist" in found.warnings[-1]
    printed = capsys.readouterr().out
    assert "the closest pairs are not shown" in printed and "FD judge" in printed
    with pytest.raises(UserError, match=r"tokens.npy does not exist"):  # before anything is measured
        measure.measure(measurement(class_tokens=tmp_path / "tokens.npy"))


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), MemoryError("none left"), OSError(errno.EIO, "broken disk")])
def test_whatever_ends_it_the_first_results_are_kept(measurement, tmp_path, monkeypatch, capsys, cause):
    """Ctrl-C, no memory, a broken disk in the second step; a disk that is full at that moment does not replace the cause."""
    monkeypatch.setattr(measure._Measurement, "classifier", lambda *_: _raise(cause))
    for full in (False, True):
        if full:
            monkeypatch.setattr("evaluations.results.write_text", lambda *_: _raise(WriteError("the disk is full")))
        with pytest.raises(type(cause)) as raised:
            measure.measure(measurement(classifier="judge"))
        printed = capsys.readouterr().out
        assert raised.value is cause and "FD judge" in printed and ("warning: the disk is full" in printed) == full
    assert "not everything was measured" in load(tmp_path / "results.json").warnings[-1]


def test_samples_beside_the_record_of_others(measurement, tmp_path):
    """The npz is whole, but not the one that the JSON beside it describes: the results say so."""
    from common.files import digests

    sidecar = tmp_path / "s.json"
    for content, warned in (({"s.npz": {"bytes": 1, "sha256": "0"}}, True), (None, False)):
        asked = measurement()
        sidecar.write_text(json.dumps({"steps": 250, "files": content or digests(tmp_path, ["s.npz"])}))
        assert any("s.npz has changed since" in text for text in measure.measure(asked).warnings) == warned


def _raise(error):
    raise error


def test_class_folders_in_latin_1_do_not_end_a_finished_job(place, tmp_path, capfdbinary):
    """Names with bytes that are not UTF-8 go to the sheet, the gallery, samples.json and the terminal."""
    names = tuple(os.fsdecode(f"caf\xe9 {i}".encode("latin-1")) for i in range(5))
    write_model(place, "latin", toy_model.CONFIG, classes=names)
    out = tmp_path / os.fsdecode(b"stra\xdfe")
    generate(place, out, "--checkpoint", str(place / "latin"), "--classes", names[2])
    assert {"samples.json", "grid.png", "gallery.html"} < set(os.listdir(out))
    assert json.loads((out / "samples.json").read_text(encoding="utf-8"))["classes"] == [names[2]]
    assert b"stra" in capfdbinary.readouterr().out


def test_every_rank_samples_the_checkpoint_that_rank_0_resolved(place, tmp_path, monkeypatch):
    """`--checkpoint RUN` while RUN trains: a newer checkpoint that appears between the starts of two ranks is not taken."""
    run_folder = tmp_path / "run"
    for step, seed in (("0000010", 0), ("0000020", 1)):
        (run_folder / "checkpoints" / step).mkdir(parents=True)
        write_model(run_folder / "checkpoints" / step, "ema.safetensors", toy_model.CONFIG, seed=seed)
    newer = run_folder / "checkpoints" / "0000020"
    newer.rename(tmp_path / "later")
    settings = read(["--checkpoint", str(run_folder), "--out", str(tmp_path / "s"), "--num-fid-samples", "3"])
    settings = replace(settings, vae=str(place / "vae"), num_steps=2)
    agreed = []
    monkeypatch.setattr(run, "share", lambda value: agreed.append(value) or value)
    run.generate(settings)  # rank 0
    (tmp_path / "later").rename(newer)
    jobs = []
    monkeypatch.setattr(run, "on_first", lambda _: None)
    monkeypatch.setattr(run, "share", lambda _: agreed[0])
    monkeypatch.setattr(run, "_compare", jobs.append)
    monkeypatch.setattr(run, "sample_parts", lambda *_: None)
    monkeypatch.setattr(run, "assemble", lambda *_: "")
    run.generate(settings)  # another one
    assert jobs[0].model.path == run_folder / "checkpoints" / "0000010" / "ema.safetensors"
