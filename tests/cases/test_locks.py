"""Two programs in one folder, a rank that outlives the others, and file systems without locks."""

import errno
import os
import socket
from pathlib import Path

import numpy as np
import pytest

import train
from common import lock as locks
from common.lock import FolderLock
from config import UserError
from tests.tiny import train_flags


def take(folder: Path, joins: bool = False) -> FolderLock:
    return FolderLock(folder, "run.lock", "wait", joins=joins)


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def file_system(request, monkeypatch):
    """With locks, and those that answer with an error."""
    if request.param is not None:

        def flock(*arguments: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(locks.fcntl, "flock", flock)
    return request.param


def test_the_second_of_two_is_refused(file_system, tmp_path, capsys):
    """By the name of the first, with or without locks, and nothing stays behind."""
    first = take(tmp_path)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {socket.gethostname()} since .*; wait"):
        take(tmp_path)
    first.close()
    take(tmp_path).close()
    assert not list(tmp_path.iterdir())
    assert ("has no locks" in capsys.readouterr().out) == (file_system is not None)


def start_rank(folder: Path, *, dies: bool = False) -> int:
    """A forked process that joins the lock and waits to be killed, or dies at once; returns its number once it has it."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        joined = take(folder, joins=True)  # noqa: F841
        os.write(write, b"1")
        if dies:
            os._exit(0)
        os.read(os.pipe()[0], 1)
    os.read(ready, 1)
    if dies:
        os.waitpid(child, 0)
    return child


def test_a_rank_that_outlives_the_launcher_keeps_the_folder(file_system, tmp_path):
    """Every rank holds the lock: rank 0 is gone, another one still writes; it is released by its death."""
    first = take(tmp_path)
    other = start_rank(tmp_path)
    first.close()
    with pytest.raises(UserError, match="in use by process"):
        take(tmp_path)
    os.kill(other, 9)
    os.waitpid(other, 0)
    take(tmp_path).close()


def test_reading_processes_do_not_hold_the_lock(tmp_path):
    """A child that was forked while the lock was held leaves it to its parent."""
    lock = take(tmp_path)
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"1")
        os.read(os.pipe()[0], 1)
    os.read(ready, 1)
    try:
        with pytest.raises(UserError):
            take(tmp_path)
        lock._stream.close()  # as the kernel does when the parent dies
        take(tmp_path).close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_without_locks_the_files_of_others(tmp_path, monkeypatch, capsys):
    """A dead process of this host is taken over; that of another host is named with the file to remove."""

    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    start_rank(tmp_path, dies=True)
    left = tmp_path / f"run.lock.{socket.gethostname()}.{os.getpid()}.1"  # of a process whose number is used again
    left.write_text("process 1")
    take(tmp_path).close()
    assert not list(tmp_path.iterdir()), "those of the dead are removed"
    other = tmp_path / "run.lock.node7.example.12.345"
    other.write_text("process 12 on node7.example since 2026-01-01 00:00:00")
    with pytest.raises(UserError) as refused:
        take(tmp_path)
    holder = "process 12 on node7.example since 2026-01-01 00:00:00"
    assert str(refused.value) == f"{tmp_path} is in use by {holder} (if it has ended, remove {other}); wait"
    assert list(tmp_path.iterdir()) == [other]


def test_training_goes_on_without_locks(tools, tmp_path, monkeypatch, capsys):
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    train.main(train_flags(tools["data"], tmp_path, steps=1))
    assert "has no locks; the file run.lock." in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("run.lock*"))


def test_generation_locks_every_rank(monkeypatch, tmp_path):
    """The ranks that write parts join the lock that rank 0 has."""
    from sampling.parts import Parts

    first, second = Parts(tmp_path), Parts(tmp_path)
    first.claim()
    second.claim(joins=True)
    first.close()
    with pytest.raises(UserError, match="in use"):
        Parts(tmp_path).claim()
    second.close()
    Parts(tmp_path).claim()


def test_evaluation_locks_its_results(measurement, tmp_path):
    """A second measurement into one results file is refused before it costs anything."""
    from evaluations.measure import measure

    lock = FolderLock(tmp_path, ".results.json.lock", "")
    with pytest.raises(UserError, match=r"in use by process .*; wait for it, or give another --out"):
        measure(measurement())
    lock.close()
    assert not (tmp_path / "results.json").exists()


def test_a_folder_that_its_last_holder_removes(tmp_path, monkeypatch):
    """Just before the lock file is opened in it: it is made again."""
    real = locks.make_folder

    def make(folder: Path) -> list[Path]:
        monkeypatch.setattr(locks, "make_folder", real)
        made = real(folder)
        folder.rmdir()
        return made

    monkeypatch.setattr(locks, "make_folder", make)
    lock = take(tmp_path / "new")
    assert (tmp_path / "new" / "run.lock").is_file()
    lock.close()
    assert not list(tmp_path.iterdir())


def test_every_program_with_an_out_locks_it(tmp_path, monkeypatch):
    """convert, export, CKNNA and a first generation are refused before they load anything, and leave no folder."""
    import sys

    import convert
    import generate
    from evaluations import cknna
    from sharing import export

    def load(*_: object) -> None:
        raise AssertionError("loaded before the lock was asked for")

    for place in ("sharing.folder.obtain", "sampling.run.obtain", "models.obtain.obtain", "models.obtain.locate"):
        monkeypatch.setattr(place, load)
    out = tmp_path / "new" / "out"
    common = ["--checkpoint", "x", "--out", str(out)]
    programs = {
        "convert": lambda: convert.main(["--source", "x", "--out", str(out)]),
        "back": lambda: convert.main(["--source", "x", "--out", str(out), "--to", "published"]),
        "export": lambda: export.main(common),
        "cknna": cknna.main,
        "generate": lambda: generate.main(common),
    }
    monkeypatch.setattr(sys, "argv", ["cknna.py", *common, "--dataset", "x"])
    for name, program in programs.items():
        held = FolderLock(out / "parts", "lock", "") if name == "generate" else locks.claim_file(out)
        with pytest.raises(UserError, match=r"in use by process .*; wait for i.*, or give another --out"):
            program()
        held.close()
        with pytest.raises(AssertionError, match="loaded before"):  # the lock is asked for, and goes
            program()
        assert not list(tmp_path.iterdir()), name


def test_parts_that_overlap(tmp_path):
    """Two jobs of different batch sizes wrote into one folder: each sample is read once."""
    from sampling.parts import Parts

    parts = Parts(tmp_path)
    for samples in (range(4), range(2, 4), range(3, 7), range(6, 7), range(7, 9)):
        parts.write(samples, {"label": np.arange(samples.start, samples.stop)})
    assert parts.done() == [range(4), range(4, 7), range(7, 9)]
    for count in (3, 5, 8, 9):
        assert np.concatenate(list(parts.rows(count, "label"))).tolist() == list(range(count))
    assert parts.names() == ["label"]
