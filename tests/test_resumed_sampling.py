"""A sampling job that was interrupted, is asked for more, or finds no space: the same samples, nothing lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from common.files import check_space
from config import UserError
from sampling import run
from sampling.assemble import is_finished
from sampling.parts import Parts, write_samples
from tests import toy_model
from tests.toy_model import CONFIG, ROOT, flags, generate, loaded, samples, write_model

place, unbroken = toy_model.place, toy_model.unbroken  # fixtures


def test_what_is_missing_is_completed(place, unbroken, tmp_path):
    """Finished parts are kept and not made again, also by another batch size; the result is the same to the byte."""
    out = tmp_path / "s"
    generate(place, out, "--per-proc-batch-size", "3", "--keep-parts")
    parts = sorted((out / "parts").glob("part-*.npz"))
    assert [p.name for p in parts[:2]] == ["part-000000000-000000003.npz", "part-000000003-000000006.npz"]
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:500])  # cut short
    (out / "parts" / "part-000000006-000000009.npz.tmp").write_text("half")
    for file in ("samples.npz", "samples.json"):
        (out / file).unlink()
    generate(place, out, "--per-proc-batch-size", "32", "--keep-parts")
    assert parts[0].stat().st_mtime_ns == kept
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert not list((out / "parts").glob("*.tmp"))


def test_a_damaged_part_is_made_again(place, unbroken, tmp_path):
    """A flipped bit is found by the checksum, the part removed, and the same command makes it again."""
    out = tmp_path / "s"
    generate(place, out, "--keep-parts", "--per-proc-batch-size", "4")
    part = out / "parts" / "part-000000004-000000008.npz"
    content = bytearray(part.read_bytes())
    content[400] ^= 1
    part.write_bytes(content)
    (out / "samples.json").unlink()
    with pytest.raises(
        ValueError, match=r"part-000000004-000000008.npz was damaged and has been removed; run the same"
    ):
        generate(place, out, "--keep-parts")
    generate(place, out)
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert not (out / "parts").exists()


def test_more_samples_continue_from_the_parts(place, unbroken, tmp_path):
    """5 samples with parts kept, then 11: the first five are not made again."""
    out = tmp_path / "s"
    generate(place, out, "--num-fid-samples", "5", "--keep-parts")
    assert len(samples(out)[0]) == 5
    generate(place, out)
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_files_asked_for_later_are_written_from_the_parts(place, tmp_path):
    """With the parts kept, PNGs and tokens need no new sampling; without them PNGs come from samples.npz, tokens cannot."""
    out = tmp_path / "s"
    generate(place, out, "--keep-parts")
    part = next((out / "parts").glob("part-*"))
    before = part.stat().st_mtime_ns
    generate(place, out, "--keep-parts", "--class-tokens")
    assert part.stat().st_mtime_ns == before and (out / "class_tokens.npy").is_file()
    shutil.rmtree(out / "parts")
    generate(place, out, "--png")
    pictures = [np.asarray(Image.open(file)) for file in sorted((out / "png").iterdir())]
    assert np.array_equal(pictures, samples(out)[0])
    (out / "class_tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"is finished without class_tokens.npy and its parts are gone"):
        generate(place, out, "--class-tokens")


def test_a_finished_folder_is_left_alone(place, unbroken, capsys):
    before = (unbroken / "samples.npz").stat().st_mtime_ns
    (unbroken / "parts").mkdir()
    (unbroken / "parts" / "settings.json").write_text("{}")  # a kill came before the parts were deleted
    (unbroken / ".deleting-parts").mkdir()  # or while they were
    generate(place, unbroken)
    assert not (unbroken / "parts").exists() and not (unbroken / ".deleting-parts").exists()
    assert (unbroken / "samples.npz").stat().st_mtime_ns == before
    assert "is complete: 11 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "made with seed = 0, this command says 1"),
        (["--cfg-scale", "2"], "made with cfg_scale = 1.0, this command says 2.0"),
        (["--num-steps", "5"], "made with steps = 4, this command says 5"),
        (["--labels", "balanced"], "made with labels = random, this command says balanced"),
        (["--num-fid-samples", "12"], "is finished with 11 samples and its parts are gone"),
    ],
)
def test_settings_never_mix_in_one_folder(place, unbroken, tmp_path, monkeypatch, change, words):
    """Neither in a finished folder nor in one with parts."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
        if change[0] in ("--seed", "--num-steps"):
            patch.setattr(run, "load", None)  # before anything is loaded
        generate(place, unbroken, *change)
    if change[0] != "--num-fid-samples":
        parts = Parts(tmp_path / "s" / "parts")
        parts.begin(loaded(place).identity)
        parts.close()
        with pytest.raises(ValueError, match=words):
            generate(place, tmp_path / "s", *change)


def test_another_model_does_not_continue(place, unbroken):
    write_model(place, "other", CONFIG, seed=5)
    with pytest.raises(ValueError, match="made with checkpoint_sha256"):
        generate(place, unbroken, "--checkpoint", str(place / "other"))


def test_two_jobs_in_one_folder(place, unbroken, tmp_path, monkeypatch):
    """The second is refused, naming the first, before anything is loaded; when that has ended it continues."""
    out = tmp_path / "s"
    first = Parts(out / "parts")
    first.claim()
    with monkeypatch.context() as patch:
        patch.setattr(run, "load", None)
        with pytest.raises(UserError, match=rf"parts is in use by process {os.getpid()} on .*; wait for its end, or"):
            generate(place, out)
    first.close()
    generate(place, out)
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert not (out / "parts").exists()


def test_a_folder_that_cannot_be_made(place, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"file/s/parts/lock cannot be written: Not a directory"):
        generate(place, tmp_path / "file" / "s")
    assert (tmp_path / "file").read_text() == "kept"


def test_ranks_must_load_the_same(place, tmp_path, monkeypatch):
    """Another file under the same name on one of the machines is found before anything is sampled."""
    monkeypatch.setattr(run, "gather", lambda identity: [identity, {**identity, "checkpoint_sha256": "another"}])
    with pytest.raises(
        UserError, match=r"rank 1 has checkpoint_sha256 = another and rank 0 has [0-9a-f]{64}: all ranks"
    ):
        generate(place, tmp_path / "s")
    assert not list((tmp_path / "s" / "parts").glob("part-*"))


@pytest.mark.slow
def test_killed_at_any_time(place, unbroken, tmp_path):
    """kill -9 after 2, 2.5, 3 ... seconds (start-up, sampling, assembly) until it is done: equal to the unbroken run."""
    out = tmp_path / "s"
    command = [sys.executable, "generate.py", *flags(place, out, "--per-proc-batch-size", "1", "--num-steps", "200")]
    reference = tmp_path / "whole"
    generate(place, reference, "--num-steps", "200", "--per-proc-batch-size", "1")
    kills, wait, between = 0, 2.0, 0
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, text = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills, wait = kills + 1, wait + 0.5
            between += 0 < sum(map(len, Parts(out / "parts").done())) < 11
            assert kills < 60
            continue
        assert process.returncode == 0, text
        break
    assert kills > 2 and between, "some were killed between the first and the last part"
    assert (out / "samples.npz").read_bytes() == (reference / "samples.npz").read_bytes()


@pytest.mark.slow
def test_killed_while_files_are_assembled(place, unbroken, tmp_path, monkeypatch):
    """Stopped before each file of the end: the next run makes the same npz."""
    from sampling import assemble

    for name in ("write_samples", "write_sheet", "write_gallery", "write_json"):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(assemble, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generate(place, out)
        generate(place, out)
        assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_finished_means_all_that_was_asked_for(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"")
    (tmp_path / "samples.json").write_text(json.dumps({"n": 3, "seed": 0}))
    assert is_finished(tmp_path, 3, {"seed": 0}, [], have_parts=False)
    assert not is_finished(tmp_path, 3, {"seed": 0}, ["class_tokens.npy"], have_parts=True)
    with pytest.raises(ValueError, match=r"is finished without class_tokens.npy and its parts are gone"):
        is_finished(tmp_path, 3, {"seed": 0}, ["class_tokens.npy"], have_parts=False)


def test_disk_need_is_checked_first(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        ValueError, match=r"--out .*: 0.0 GB are needed and 0.0 GB are free; name a folder on another disk"
    ):
        generate(place, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert check_space("--out", tmp_path / "s" / "deeper", 999) == 1000


def test_a_full_disk_keeps_finished_work(place, unbroken, tmp_path, monkeypatch):
    """The disk fills up at the second part: one sentence; with space again the same command completes."""
    out, write = tmp_path / "s", np.savez
    with monkeypatch.context() as patch:
        calls = []

        def full(stream, **arrays):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(stream, **arrays)

        patch.setattr(np, "savez", full)
        with pytest.raises(
            ValueError, match=r"the disk is full at .*; finished samples are kept, the same command continues"
        ):
            generate(place, out, "--per-proc-batch-size", "4")
    assert [r.stop for r in Parts(out / "parts").done()] == [4]
    generate(place, out, "--per-proc-batch-size", "4")
    assert (out / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_the_npz_is_streamed(tmp_path):
    """48 MB of samples in 16 parts are assembled with less than three parts in memory, and read back as they were."""
    parts = Parts(tmp_path / "parts")
    parts.begin({})
    for start in range(0, 256, 16):
        pixels = np.full((16, 256, 256, 3), start, dtype=np.uint8)
        parts.write(range(start, start + 16), {"pixels": pixels, "label": np.arange(start, start + 16)})
    del pixels
    tracemalloc.start()
    write_samples(tmp_path / "s.npz", parts, 250, (256, 256, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 16 * 256 * 256 * 3 + 2**20, f"{peak / 2**20:.1f} MiB"
    with np.load(tmp_path / "s.npz", allow_pickle=False) as stream:
        assert stream["arr_0"].shape == (250, 256, 256, 3) and stream["arr_1"].tolist() == list(range(250))
        assert stream["arr_0"][:, 0, 0, 0].tolist() == [i // 16 * 16 for i in range(250)]
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert archive.testzip() is None and archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
