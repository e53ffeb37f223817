"""Where a program is run: what lies in the current folder, and what the machine grants."""

import errno
import io
import os
import subprocess
import sys

import pytest
import torch
from torch._utils import ExceptionWrapper

from common import files
from common.files import read_sealed
from config import UserError
from models.published import read_published
from preprocessing import pack, packing
from sampling.labels import read_labels
from tests.packs import ROOT, encoded, flags, noise, write_folder


@pytest.mark.parametrize("program", ["preprocessing/pack.py", "evaluations/evaluate.py"])
def test_modules_of_ours_in_the_current_folder(tmp_path, program):
    """A config.py and a common.py of the user do not take the place of ours."""
    for name in ("config.py", "common.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')", encoding="utf-8")
    command = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and "--batch-size" in done.stdout, done.stderr


def test_small_shared_memory(monkeypatch, capsys):
    """Docker gives 64 MB: what the reading processes will hold is compared with it before they start."""
    monkeypatch.setattr(packing, "SHARED_MEMORY", ROOT)
    monkeypatch.setattr(packing, "free_space", lambda folder: 1_000_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9))
    assert packing._workers(2, 250_000) == 2 and packing._workers(0, 10**9) == 0
    with pytest.raises(
        UserError, match=r"--num-workers 2: 2 reading processes take 1\.2 MB .*1\.0 MB are free.* at most .*1,"
    ):
        packing._workers(2, 300_000)
    assert packing._workers(None, 60_000) == 8 and not capsys.readouterr().out
    assert packing._workers(None, 130_000) == 3 and "8 reading processes take 2.1 MB" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # its ranks share the memory
    assert packing._workers(None, 130_000) == 1


def test_batch_that_does_not_fit_the_shared_memory(toys, tmp_path, monkeypatch):
    """It ends the packing with a sentence; it would be lost on its way, and waited for forever."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"have failed \(shared memory is full\); the same command goes on"):
        pack.main([*flags(toys, tmp_path / "out"), "--num-workers", "1"])


def test_all_of_a_new_folder_is_flushed_before_its_rename(tmp_path, monkeypatch):
    """After a power cut it is there with its files, not as a folder of empty ones."""
    flushed, real = [], files.sync

    def sync(path):
        flushed.append((path.name, (tmp_path / "out").exists()))
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    with files.replacing(tmp_path / "out") as temporary:
        write_folder(temporary, {"a.json": b"1", "b/c.npy": b"2"})
    before = sorted(name for name, renamed in flushed if not renamed)
    assert before == ["a.json", "b", "c.npy", "out.tmp"] and flushed[-1] == (tmp_path.name, True)


def test_a_bug_in_a_reading_process_keeps_its_traceback():
    """Torch passes a RuntimeError on in words of its own, which name the DataLoader as those of a killed process do."""

    def batches(text, where=None):
        try:
            raise RuntimeError(text)
        except RuntimeError:
            if where is None:
                raise
            ExceptionWrapper(where=where).reraise()
        yield

    where = "in DataLoader worker process 0"
    for raised in (batches("a bug", where), batches("a bug")):
        with pytest.raises(RuntimeError, match="a bug"):
            packing._next(raised)
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. "
    for raised, words in (
        (batches(killed), r"have failed \(DataLoader worker \(pid 7\) is killed by signal: Killed\.\)"),
        (batches("unable to allocate shared memory(shm)", where), r"have failed \(shared memory is full\)"),
    ):
        with pytest.raises(UserError, match=words):
            packing._next(raised)


@pytest.mark.slow
def test_shared_memory_that_is_full(toys, tmp_path):
    """A real /dev/shm of 160 kB, which the check at the start does not see: the command ends by itself."""
    images = {f"{name}/{i:02d}.png": encoded(noise(70, 70)) for name in "ab" for i in range(60)}
    source = write_folder(tmp_path / "images", images)
    words = [
        *flags(toys, tmp_path / "out", source=source),
        "--num-workers",
        "2",
        "--resolution",
        "64",
        "--batch-size",
        "16",
    ]
    code = "import sys, preprocessing.packing as p, preprocessing.pack as k; from common.reporting import run\n"
    code += "p.free_space = lambda folder: 10**12; run(lambda: k.main(sys.argv[1:]))"
    mount = 'mount -t tmpfs -o size=160k tmpfs /dev/shm || exit 77; exec "$0" "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode in (1, 77) and "Error" not in done.stderr:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()[-100:]}")
    assert done.returncode == 2 and "have failed (shared memory is full)" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_user_without_a_home(measurement, tmp_path):
    """A number that no account has, and no environment, as in a container: measured without a cache, with one warning."""
    asked = measurement()
    command = ["unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-i", "OMP_NUM_THREADS=1"]
    command += [f"PATH={os.environ['PATH']}", sys.executable, "evaluations/evaluate.py", "--device", "cpu"]
    command += ["--samples", str(asked.samples[0]), "--reference", str(asked.reference[0])]
    command += ["--features", *asked.features, "--out", str(asked.out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode == 1 and "Error" not in done.stderr:
        pytest.skip(f"needs the right to name another user: {done.stderr.strip()[-100:]}")
    assert done.returncode == 0 and asked.out.is_file(), done.stderr
    assert done.stdout.count("--cache-dir names another folder") == 1, done.stdout


def test_files_without_permission(toys, tmp_path, monkeypatch):
    """One sentence with the cause, which calls nothing damaged and repairs nothing."""
    refused = tmp_path / "file"
    refused.write_bytes(b"PK")

    def refuse(file, *arguments, **more):
        if str(file) == str(refused):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real_open(file, *arguments, **more)

    real_open = io.open
    monkeypatch.setattr("io.open", refuse)  # of pathlib
    sentence = f"{refused} cannot be read (Permission denied)"
    for read, flag in (
        (lambda: pack.main(flags(toys, tmp_path / "out", "--classes", str(refused))), "--classes "),
        (lambda: read_labels([str(refused)], (), 3, (), 8), "--labels "),
        (lambda: read_sealed(refused, "repair"), ""),
        (lambda: read_published(refused), ""),
    ):
        with pytest.raises(UserError) as raised:
            read()
        assert str(raised.value) == flag + sentence
    assert not (tmp_path / "out").exists()
