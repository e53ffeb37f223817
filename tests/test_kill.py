"""A run survives kill -9 at any instant, a failing disk, and signals to stop."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from common.files import digests, read_sealed, write_sealed
from config import UserError
from tests import killable
from tests.killable import STAGES
from tests.tiny import FLAGS, write_dataset
from training import checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "packed")


def flags(data, out, name, *extra, steps=8):
    return [
        *FLAGS,
        "--data-dir",
        str(data),
        "--output-dir",
        str(out),
        "--exp-name",
        name,
        "--max-train-steps",
        str(steps),
        "--checkpointing-steps",
        "1",
        "--keep-last",
        "2",
        "--keep-every",
        "4",
        *extra,
    ]


def start(arguments, log, stage=None):
    return killable.start(killable.run_training, arguments, str(log), stage)


def logged(run: Path) -> int:
    """The last step whose line in metrics.jsonl is whole: the run was about to save it or later ones."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return max(steps, default=0)


def newest(run: Path) -> int:
    """The step of the checkpoint that a resume takes; it loads, and so does its model file."""
    warnings: list[str] = []
    found = checkpoints.newest(run / "checkpoints", warnings.append)
    assert not warnings, warnings  # a kill leaves no damaged checkpoint behind, only hidden folders
    if found is None:
        return 0
    loaded = checkpoints.load(found)
    assert all(t.isfinite().all() for t in loaded.model.values()) and loaded.step == int(found.name)
    return loaded.step


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    train.main(flags(data, out, "run"))
    return out / "run/checkpoints/0000008"


def same_end(run: Path, unbroken: Path) -> None:
    for file in ("model.safetensors", "ema.safetensors"):
        assert (run / "checkpoints/0000008" / file).read_bytes() == (unbroken / file).read_bytes()


@pytest.mark.parametrize(
    "stage", [s if s in ("read back", "before the rename") else pytest.param(s, marks=pytest.mark.slow) for s in STAGES]
)
def test_killed_inside_a_save(data, unbroken, tmp_path, stage):
    """kill -9 inside each part of a save: the newest checkpoint loads, is at most one interval old, and the resumed run
    ends bit for bit like one that was never killed, with nothing left over."""
    process = start(flags(data, tmp_path, "run"), tmp_path / "log", stage)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert newest(tmp_path / "run") >= logged(tmp_path / "run") - 1 >= 3 - 1
    train.main(flags(data, tmp_path, "run"))
    same_end(tmp_path / "run", unbroken)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["0000004", "0000007", "0000008"]


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_instants(data, tmp_path, kills):
    """One run, killed again and again at random instants while it saves every step, never loses more than one interval and
    ends bit for bit like one that was left alone."""
    steps = 20 * kills  # each life takes less than that, however fast the machine
    generator = random.Random(kills)
    run = tmp_path / "run"
    done = 0
    while done < kills:
        goal = logged(run) + generator.randint(2, 8)
        process = start(flags(data, tmp_path, "run", steps=steps), tmp_path / "log")
        while process.is_alive() and logged(run) < goal:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.05))  # any instant of a step or a save
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        done += 1
        assert newest(run) >= logged(run) - 1
    train.main(flags(data, tmp_path, "run", steps=steps))
    train.main(flags(data, tmp_path, "alone", steps=steps))
    ends = [tmp_path / name / "checkpoints" / f"{steps:07d}" for name in ("run", "alone")]
    for file in ("model.safetensors", "ema.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, steps + 1))


FAULTS = {
    "ENOSPC in fsync": (checkpoints, "sync", OSError(errno.ENOSPC, "No space left on device")),
    "EIO in fsync": (checkpoints, "sync", OSError(errno.EIO, "Input/output error")),
    "ENOSPC in torch.save": (
        torch,
        "save",
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter"),
    ),
    "failed rename": (Path, "rename", OSError(errno.EIO, "Input/output error")),
    "read-only folder": (Path, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
    "damage found on reading back": (checkpoints, "verify", checkpoints.DamagedCheckpoint("optimizer.pt has changed")),
}


@pytest.mark.parametrize(
    "fault", [f if "fsync" not in f and "torch" not in f else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_failing_disk_is_reported_and_training_goes_on(data, tmp_path, capsys, monkeypatch, fault):
    """--on-save-error continue: the run says what happened, the former checkpoint is intact, and once the disk works again
    the next save succeeds."""
    place, name, error = FAULTS[fault]
    broken = {"saves": 0}
    original, original_save = getattr(place, name), checkpoints.save

    def save(*args, **kwargs):
        broken["saves"] += 1
        if broken["saves"] not in (3, 4):
            return original_save(*args, **kwargs)
        monkeypatch.setattr(place, name, failing)
        try:
            return original_save(*args, **kwargs)
        finally:
            monkeypatch.setattr(place, name, original)
            assert newest(tmp_path / "run") == 2

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints, "save", save)
    train.main(flags(data, tmp_path, "run", steps=5))
    said = capsys.readouterr().out
    assert "step 3 could not be saved, training goes on" in said and "step 4 could not be saved" in said
    assert newest(tmp_path / "run") == 5
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_failing_disk_can_stop_the_run(data, tmp_path, monkeypatch):
    """--on-save-error stop, or the last save of a run: it ends with an error that names the step; what was saved stays."""
    original = checkpoints.save

    def save(folder, content, *rest):
        if content.step == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return original(folder, content, *rest)

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(UserError, match=r"step 3 could not be saved.*No space left on device"):
        train.main(flags(data, tmp_path, "run", "--on-save-error", "stop", steps=5))
    assert newest(tmp_path / "run") == 2
    with pytest.raises(UserError, match="step 3 could not be saved"):
        train.main(flags(data, tmp_path, "run", steps=3))


def test_a_real_limit_of_the_file_system(data, tmp_path):
    """Beyond a file-size limit of the operating system (EFBIG, as from a full quota) the writers fail in their own ways:
    reported in one line, training goes on, no half-written checkpoint."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(UserError, match="step 2 could not be saved"):
            train.main(flags(data, tmp_path, "run", steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    train.main(flags(data, tmp_path, "run", steps=2))
    assert newest(tmp_path / "run") == 2


def test_rotation_keeps_what_is_not_its_own(data, tmp_path):
    """keep-last and keep-every; a folder with a foreign file, and foreign folders, stay."""
    folder = tmp_path / "run/checkpoints"
    train.main(flags(data, tmp_path, "run", "--keep-last", "0", steps=3))
    (folder / "0000002/notes.txt").write_text("mine")
    (folder / "best").mkdir()
    (folder / "0000009.bak").mkdir()
    train.main(flags(data, tmp_path, "run", steps=8))
    assert sorted(p.name for p in folder.iterdir()) == [
        "0000002",
        "0000004",
        "0000007",
        "0000008",
        "0000009.bak",
        "best",
    ]
    assert (folder / "0000002/notes.txt").read_text() == "mine" and len(list((folder / "0000002").iterdir())) == 5


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signals_finish_the_step_and_save(data, tmp_path, name, status):
    """The process saves the step it is in and exits with the status; handlers are as before; the run resumes."""
    marker = tmp_path / "requeued"
    extra = ("--requeue-command", f"touch {marker}", "--checkpointing-steps", "1000")
    process = start(flags(data, tmp_path, "run", *extra, steps=100_000), tmp_path / "log")
    while logged(tmp_path / "run") < 2 and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    process.kill()  # or it would go on for an hour
    log = (tmp_path / "log").read_text()
    assert process.exitcode == status, log
    assert f"stopped by {name}, the same command resumes" in log
    assert newest(tmp_path / "run") == logged(tmp_path / "run") >= 2
    assert marker.exists() == (name == "SIGUSR1")


def test_handlers_are_restored_and_hours_counted(data, tmp_path, capsys):
    """--max-hours stops like a signal, status 143; afterwards the handlers are those from before."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        train.main(
            flags(data, tmp_path, "run", "--max-hours", "0.0002", "--checkpointing-steps", "1000", steps=100_000)
        )
    assert stopped.value.code == 143
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert "stopped by max-hours" in capsys.readouterr().out
    assert newest(tmp_path / "run") > 0


def test_damaged_checkpoints_fall_back(data, tmp_path, capsys):
    """A truncated, altered or missing file: the one before is taken, with a warning that names the file. All damaged: an
    error, never step 0. A later schema: refused by name."""
    train.main(flags(data, tmp_path, "run", "--keep-last", "0", steps=4))
    folder = tmp_path / "run/checkpoints"
    (folder / "0000004/optimizer.pt").unlink()
    content = bytearray((folder / "0000003/model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "0000003/model.safetensors").write_bytes(content)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    train.main(flags(data, tmp_path, "run", steps=4))
    said = capsys.readouterr().out
    assert "0000004 is damaged and skipped" in said and "optimizer.pt is missing" in said
    assert "0000003 is damaged" in said and "model.safetensors has changed" in said and "resuming from" in said
    for step in ("0000001", "0000002"):
        text = (tmp_path / "again/checkpoints" / step / "state.json").read_text()
        (tmp_path / "again/checkpoints" / step / "state.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(4 of them\)"):
        train.main(flags(data, tmp_path, "again", steps=4))
    later = read_sealed(folder / "0000004/state.json", "") | {"schema": 2}
    write_sealed(folder / "0000004/state.json", later)
    with pytest.raises(UserError, match=r"0000004/state\.json has schema 2, this code reads up to 1: update the code"):
        train.main(flags(data, tmp_path, "run", steps=5))


def test_a_checkpoint_holds_no_code(data, tmp_path):
    """Every file of a checkpoint is safetensors, JSON, or loads with weights_only; a hostile optimizer.pt runs nothing."""

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    train.main(flags(data, tmp_path, "run", steps=2))
    checkpoint = tmp_path / "run/checkpoints/0000002"
    assert sorted(p.suffix for p in checkpoint.iterdir()) == [".json", ".pt", ".safetensors", ".safetensors"]
    torch.save({"optimizer": Bomb()}, checkpoint / "optimizer.pt")
    content = read_sealed(checkpoint / "state.json", "")
    content["files"] |= digests(checkpoint, ["optimizer.pt"])
    write_sealed(checkpoint / "state.json", content)
    with pytest.raises(ValueError, match="0000002 cannot be read"):
        train.main(flags(data, tmp_path, "run", steps=3))
    assert not (tmp_path / "ran").exists()
