"""What a run keeps, deletes and leaves alone in its folder, and what a disk that fails or lacks a service means."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common import files
from common.files import make_folder, write_text
from config import UserError
from dataset import PackedDataset
from tests.tiny import log_lines, train_flags
from training import checkpoints


@pytest.fixture
def run(tools, tmp_path):
    """A function that trains up to a number of steps, saving each, and the folder of its checkpoints."""

    def to(steps: int, *more: str) -> list[str]:
        train.main(train_flags(tools["data"], tmp_path, "--checkpointing-steps", "1", *more, steps=steps))
        return names(tmp_path / "run/checkpoints")

    return to, tmp_path / "run/checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"{step:07d}/optimizer.pt").write_text("x")


def test_as_many_damaged_newer_checkpoints_as_are_kept(run, capsys):
    """The one just saved and the last intact one stay, the damaged ones go first and are named."""
    to, folder = run
    to(6, "--keep-last", "0")
    damage(folder, 5, 6)
    for old in ("0000001", "0000002", "0000003"):
        files.shutil.rmtree(folder / old)
    with pytest.raises(SystemExit, match="143"):
        to(20, "--keep-last", "2", "--keep-every", "0", "--checkpointing-steps", "1000", "--max-hours", "1e-9")
    assert names(folder) == ["0000004", "0000005"]
    assert f"damaged checkpoint {folder}/0000006 is deleted" in capsys.readouterr().out
    assert to(6, "--keep-last", "2", "--keep-every", "0") == ["0000005", "0000006"]
    assert "resuming from" in capsys.readouterr().out


def test_checkpoints_are_ordered_by_number(tmp_path):
    """10,000,000 comes after 9,999,999, whatever their names; the one just saved stays, also where there are later ones."""
    for step in (9_999_998, 9_999_999, 10_000_000):
        (tmp_path / f"{step:07d}").mkdir()
    assert list(checkpoints.by_step(tmp_path)) == [9_999_998, 9_999_999, 10_000_000]
    checkpoints.rotate(tmp_path, 1, 0, saved=9_999_999, before=10_000_000)
    assert names(tmp_path) == ["10000000", "9999999"]


def test_a_link_in_place_of_a_checkpoint(run, tmp_path, capsys):
    """Its target is left alone, it is named at the start, and the run goes on; over it nothing is saved."""
    to, folder = run
    to(2)
    (folder / "0000001").rename(tmp_path / "elsewhere")
    (folder / "0000001").symlink_to(tmp_path / "elsewhere")
    damage(folder, 2)
    (folder / "0000002").rename(tmp_path / "damaged")
    (folder / "0000002").symlink_to(tmp_path / "damaged")
    assert to(5, "--keep-last", "2", "--keep-every", "0") == ["0000001", "0000002", "0000004", "0000005"]
    said = capsys.readouterr().out
    assert f"checkpoint {folder}/0000001 is a link: it is never deleted" in said
    assert f"step 2 could not be saved, training goes on: {folder}/0000002 is a link: move it away" in said
    assert len(names(tmp_path / "elsewhere")) == len(names(tmp_path / "damaged")) == 4


def test_a_checkpoint_with_a_file_of_somebody(run, capsys):
    to, folder = run
    to(1)
    (folder / "0000001/notes.txt").write_text("mine")
    to(4, "--keep-last", "1", "--keep-every", "0")
    assert names(folder) == ["0000001", "0000004"]
    assert "0000001 holds notes.txt, which is not of a checkpoint: it is never deleted" in capsys.readouterr().out


def test_a_folder_that_cannot_be_renamed(run, monkeypatch):
    """On an overlay a folder of a lower layer cannot be renamed: it is deleted where it is."""
    to, _ = run
    to(2)
    original = Path.rename

    def rename(self, target):
        if self.name == "0000001":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert to(3, "--keep-last", "2", "--keep-every", "0") == ["0000002", "0000003"]


def test_a_full_disk_is_named(run, monkeypatch, capsys):
    """torch.save answers a full disk with "unexpected pos": the message has the free space of the disk."""
    to, _ = run

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=r"step 1 could not be saved: .*0000001 cannot .* unexpected pos 64 .*iB free on"
    ):
        to(1)
    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(
        UserError, match=r"step 1 could not be saved: the disk is full at .* GB free\): free some space"
    ):
        to(1)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, capsys, number):
    """One warning; files are written all the same. A disk that fails is an error as ever."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_WARNED", set())
    for name in ("a", "b"):
        write_text(tmp_path / name, name)
    assert capsys.readouterr().out.count("cannot flush it to the disk: a power cut may lose") == 1
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["a", "b"]
    number = errno.EIO
    with pytest.raises(UserError, match="Input/output error"):
        write_text(tmp_path / "c", "c")


def test_power_cut(run, monkeypatch, tmp_path):
    """On the disk are: folders with their parents, the log before the checkpoint, the checkpoint before its name."""
    to, folder = run
    events = []
    original_sync, original_rename = files.sync, Path.rename

    def sync(path: Path) -> None:
        events.append(path)
        original_sync(path)

    def rename(self, target):
        events.append("rename")
        return original_rename(self, target)

    for place in ("common.files.sync", "training.checkpoints.sync", "training.tracking.sync"):
        monkeypatch.setattr(place, sync)
    monkeypatch.setattr(Path, "rename", rename)
    make_folder(tmp_path / "a/b")
    assert events == [tmp_path / "a", tmp_path]
    to(1)
    run_folder = folder.parent
    assert tmp_path in events[2:] and run_folder in events, "entries of the run's folder and of its checkpoints"
    written = [folder / ".writing-0000001" / name for name in checkpoints.FILES[:3]]
    last = events.index("rename")
    assert run_folder / "metrics.jsonl" in events[:last] and set(written) <= set(events[:last])
    assert folder / ".writing-0000001" in events[:last] and events[last + 1] == folder


@pytest.mark.parametrize(
    "line", [b'{"step": 3, "x": "\xc3', b'{"step":' + b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"7\n"]
)
def test_a_damaged_line_of_the_log(run, tmp_path, line):
    """Not UTF-8, 100,000 deep, no object: it is left out, and the run resumes."""
    to, folder = run
    to(2)
    with (folder.parent / "metrics.jsonl").open("ab") as log:
        log.write(line)
    to(3)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3]


def test_a_file_system_without_private_mappings(tools, monkeypatch):
    """Records are read by shared ones; where there are none either, one sentence names the file."""

    def refused(*arguments, **more):
        raise RuntimeError("unable to mmap 1024 bytes from file: Cannot allocate memory (12)")

    def no_device(*arguments, **more):
        raise OSError(errno.ENODEV, "No such device")

    expected = PackedDataset(tools["data"])[[3, 19]]
    monkeypatch.setattr(torch, "from_file", refused)
    assert torch.equal(PackedDataset(tools["data"])[[3, 19]].moments, expected.moments)
    monkeypatch.setattr(np, "memmap", no_device)
    with pytest.raises(
        UserError, match=r"moments.*npy cannot be mapped into memory \(No such device\): copy the dataset"
    ):
        PackedDataset(tools["data"])[[3]]
