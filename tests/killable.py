"""Processes that the tests of kills, faults and signals start, fork-quick, through a fork server."""

import errno
import multiprocessing
import os
import signal
import sys
from typing import Any

import diffusers.models.autoencoders  # noqa: F401 (this and the others so marked: loaded once, in the fork server)
import timm  # noqa: F401
import torch
import torch._dynamo

import train
from preprocessing import pack, packing  # noqa: F401
from training import checkpoints, run  # noqa: F401

# Not a plain fork of the tests' own process: a child killed inside a lock that it shares with its parent (tqdm's, for one)
# would leave the parent waiting for ever.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.killable"])

# Every part of a save, in order: (module or class, name of the function, how many calls of it to let pass).
STAGES = {
    "before the weights": (checkpoints, "save", 0),
    "model file": (checkpoints, "save_model", 0),
    "optimiser": (torch, "save", 0),
    "first fsync": (checkpoints, "sync", 0),
    "second fsync": (checkpoints, "sync", 1),
    "before the manifest": (checkpoints, "write_sealed", 0),
    "read back": (checkpoints, "verify", 0),
    "before the rename": (checkpoints, "_publish", 0),
    "after the rename": (checkpoints, "sync", 3),
    "rotation": (checkpoints, "rotate", 0),
    "deletion": (checkpoints, "_delete", 0),
    "half deleted": (checkpoints, "_remove_own_files", 0),
}


def at_stage(stage: str, act: Any) -> None:
    """Call `act` instead of the chosen function, at the chosen call during the save of the fourth step from now."""
    place, name, skip = STAGES[stage]
    original_save, original, calls = checkpoints.save, getattr(place, name), {"saves": 0, "here": 0}

    def counted_save(*args: Any, **kwargs: Any) -> Any:
        calls["saves"] += 1
        if calls["saves"] == 4 and (place, name) == (checkpoints, "save"):
            act()
        return original_save(*args, **kwargs)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if calls["saves"] == 4:
            calls["here"] += 1
            if calls["here"] == skip + 1:
                act()
        return original(*args, **kwargs)

    if (place, name) != (checkpoints, "save"):
        setattr(place, name, replaced)
    checkpoints.save = counted_save


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def start(function: Any, *arguments: Any) -> Any:
    """A process that runs one of the two functions below."""
    process = _FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def run_training(flags: list[str], log: str, stage: str | None = None) -> None:
    """Train with these flags; output goes to the file `log`; kill -9 at `stage`."""
    _redirect(log)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup ignore it, and so would the run
    if stage is not None:
        at_stage(stage, kill)
    train.run(lambda: train.main(flags))


def run_packing(flags: list[str], log: str, write: int | None = None) -> None:
    """Pack with these flags in one thread; output goes to the file `log`; kill -9 before the `write`-th fsync or rename."""
    os.setsid()  # its reading processes can be killed with it
    _redirect(log)
    torch.set_num_threads(1)
    if write is not None:
        left = [write]

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if left[0] == 0:
                    kill()
                left[0] -= 1
                return function(*arguments, **keywords)

            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    pack.main(flags)


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
