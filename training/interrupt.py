"""Stopping by signals, the end of the launcher and --max-hours, agreed on by all ranks without touching the device."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from common.processes import PATIENCE

_ORPHANED = "the end of its launcher"
EXIT_STATUS = {"SIGINT": 130, "SIGHUP": 129, _ORPHANED: 143, "SIGTERM": 143, "SIGUSR1": 143, "max-hours": 143}
_REASONS = tuple(EXIT_STATUS)  # the last one wins where there are several
_LAUNCHERS = (
    *("accelerate", "accelerate-launch", "torchrun"),
    *("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run"),
)
_SIGNALS = ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1")


class Stopped(Exception):
    """A measurement or preview that was given up because a stop was requested."""


def launcher() -> int | None:
    """The process number of the launcher (torchrun, accelerate) that started this process, None if it is another parent."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        command = b""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ or launches(command) else None


def launches(command: bytes) -> bool:
    """Whether a command line, as /proc has it, is that of a launcher: its program, or the script or module of its Python."""
    first, *rest = (Path(os.fsdecode(word)).name for word in command.split(b"\0"))
    script = next((word for word in rest if not word.startswith("-")), "")
    return (script if first.startswith("python") else first) in _LAUNCHERS


_LAUNCHER = launcher()  # looked up before weights are loaded, in which time it may end


class Interrupt:
    """Use as a context manager around the training loop; the handlers that were there before come back at its end.

    Each rank notes its own signals. `requested()` is called by all of them after every step and gives all the same answer:
    the notes of step s are reduced in the background over a CPU group while step s + 1 runs, and count after it.
    A second signal of the same kind acts as it would without this handler.
    """

    def __init__(self, world: int, max_hours: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = None if max_hours is None else clock() + 3600 * max_hours
        self._noted = -1
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        self._pending: tuple[torch.distributed.Work, torch.Tensor] | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for reason in _SIGNALS:
            number = getattr(signal, reason)
            # nohup's ignore counts; but torchrun passes a hang-up on, under nohup too, and kills 30 seconds later
            if reason != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN or _LAUNCHER is not None:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pending is not None and kind is None:  # after an error the other ranks may not answer any more
            self._pending[0].wait()
        self._pending = None
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def noted(self) -> str | None:
        """The reason to stop that this rank knows of; the others may not have heard of it yet."""
        if self._deadline is not None and self._clock() >= self._deadline:
            self._noted = max(self._noted, _REASONS.index("max-hours"))
        if _LAUNCHER is not None and os.getppid() != _LAUNCHER:
            self._noted = max(self._noted, _REASONS.index(_ORPHANED))
        return _REASONS[self._noted] if self._noted >= 0 else None

    def requested(self) -> str | None:
        """The reason to stop now (a key of EXIT_STATUS), the same on every rank, or None."""
        reason = self.noted()
        if self._group is None:
            return reason
        before = self._pending
        note = torch.tensor([self._noted])
        work = torch.distributed.all_reduce(note, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, note)
        if before is None:
            return None
        before[0].wait()
        return _REASONS[int(before[1])] if int(before[1]) >= 0 else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, _REASONS.index(signal.Signals(number).name))
        signal.signal(number, self._former[number])
