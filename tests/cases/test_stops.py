"""Being stopped, and losing the console or the launcher: the run saves, or goes on."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from common import reporting
from tests.tiny import log_lines, train_flags
from training import interrupt, previews
from training.interrupt import Interrupt

ROOT = Path(__file__).parents[2]
ENDLESS = ("--checkpointing-steps", "1000000")


class Gone(io.StringIO):
    """A console that answers every write with an error."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.file = number, os.memfd_create("console")

    def write(self, text: str = "") -> int:
        raise OSError(self.number, os.strerror(self.number))

    flush = write

    def fileno(self) -> int:
        return self.file


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, None])
def test_the_console_is_gone(number, monkeypatch):
    """A pipe without reader, a closed terminal, a full disk, quota or pipe (may recover), no streams at all."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if number is None else Gone(number))
    done = []

    def main() -> None:
        with reporting.progress(3, unit="step") as bar:
            bar.update(3)
            reporting.say("a message")
        done.append(True)

    reporting.run(main)
    assert done
    if number is not None:
        silenced = os.readlink(f"/proc/self/fd/{sys.stdout.fileno()}") == os.devnull
        assert silenced == (number in (errno.EPIPE, errno.EIO))


def test_an_error_without_a_console_has_its_status(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone(errno.EPIPE))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    from config import UserError

    def main() -> None:
        raise UserError("nobody reads this")

    with pytest.raises(SystemExit, match="2"):
        reporting.run(main)


@pytest.mark.parametrize("launcher", [None, os.getppid()])
def test_a_hang_up_under_nohup(launcher, monkeypatch):
    """Stays ignored, but for a rank: its launcher passes a hang-up on, ignored or not, and ends."""
    monkeypatch.setattr(interrupt, "_LAUNCHER", launcher)
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(1) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested() == (None if launcher is None else "SIGHUP")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_an_orphan_stops(monkeypatch):
    """A rank whose launcher has died notices it, and saves as after SIGTERM; who has no launcher may lose its parent."""
    with Interrupt(1) as stop:
        monkeypatch.setattr(interrupt, "_LAUNCHER", os.getppid())
        assert stop.requested() is None
        monkeypatch.setattr(interrupt, "_LAUNCHER", os.getppid() + 1)
        assert stop.requested() == "the end of its launcher"
    assert interrupt.EXIT_STATUS["the end of its launcher"] == 143
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert interrupt.launcher() == os.getppid()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert interrupt.launcher() is None


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("/venv/bin/python3.12 /venv/bin/accelerate launch train.py", True),
        ("python -u -m accelerate.commands.launch train.py", True),
        ("/usr/bin/python3 -m torch.distributed.run train.py", True),
        ("accelerate-launch train.py", True),
        ("python /home/accelerate/sweep.py", False),
        ("python sweep.py --exp-name accelerate", False),
        ("bash accelerate.sh", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_program(command, known):
    """Not by a folder or a value that has its name."""
    assert interrupt.launches(b"".join(word.encode() + b"\0" for word in command.split())) == known


@pytest.mark.slow
def test_a_launcher_of_one_process_is_terminated(tools, tmp_path):
    """accelerate launch ends by SIGTERM and leaves the training alone, which saves, stops and can be resumed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "train.py"]
    command += train_flags(tools["data"], tmp_path, *ENDLESS, steps=10**6)
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    while not (tmp_path / "run/metrics.jsonl").is_file() or len(log_lines(tmp_path)) < 2:
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    launcher.terminate()
    launcher.wait()
    deadline = time.monotonic() + 60
    while "stopped by the end of its launcher" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    train.main(train_flags(tools["data"], tmp_path, *ENDLESS, steps=log_lines(tmp_path)[-1]["step"] + 1))


WATCHED = ("--sampling-steps", "2", "--preview-steps", "2", "--checkpointing-steps", "2", "--eval-every", "2")


@pytest.fixture
def watched(tools, tmp_path):
    """Flags of a run with previews and measurements of two batches."""
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    more = ("--eval-samples", "40", "--eval-reference", str(reference), "--eval-features", f"timm:{tools['encoder']}")
    return train_flags(tools["data"], tmp_path, *WATCHED, *more, steps=4)


@pytest.mark.parametrize("call", [1, 2], ids=["preview", "measurement"])
def test_a_stop_during_a_preview_or_a_measurement(watched, tmp_path, monkeypatch, capsys, call):
    """The step is on the disk before either begins; both are given up, and made when the run is resumed."""
    original, calls = previews.sample, []
    watched += ("--eval-every", "2" if call == 2 else "0")

    def sample(*args, **rest):
        calls.append((tmp_path / "run/checkpoints/0000002/state.json").is_file())
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **rest)

    monkeypatch.setattr(previews, "sample", sample)
    with pytest.raises(SystemExit, match="143"):
        train.main(watched)
    assert calls == [True] * call and "step 2 of 4: stopped by SIGTERM" in capsys.readouterr().out
    assert [("fd" in line) for line in log_lines(tmp_path)] == [False, False]
    train.main(watched)
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == [
        "step_0000002.png",
        "step_0000004.png",
    ]
    assert [line.get("fd", 0) > 0 for line in log_lines(tmp_path)] == [False, call == 2] * 2


def test_a_kill_between_save_and_preview(watched, tmp_path, monkeypatch):
    """The preview and the distance that were due are made at the resume: the end is that of a run that was left alone."""

    class Killed(BaseException):
        pass

    def kill(*args, **rest):
        raise Killed

    train.main(watched)
    (tmp_path / "run").rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(previews, "draw", kill)
        with pytest.raises(Killed):
            train.main(watched)
    train.main(watched)
    names = ("step", "loss", "fd", "fd_samples")
    one, other = ([{k: line.get(k) for k in names} for line in log_lines(tmp_path, n)] for n in ("whole", "run"))
    assert one == other
    for picture in (tmp_path / "whole/previews").iterdir():
        assert picture.read_bytes() == (tmp_path / "run/previews" / picture.name).read_bytes()
