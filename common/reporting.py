"""Messages, errors and progress bars of the programs: from rank 0, and readable in log files as on terminals."""

import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

from config import UserError

SECONDS_BETWEEN_LINES = 30.0  # of a bar in a log file
# The reader, the terminal or the file has ended. A full disk or quota and a pipe that is full may recover.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ECONNRESET, errno.ENOTCONN)


def say(text: str) -> None:
    """Print one message on stdout, above a progress bar if there is one; ranks other than 0 stay silent."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class _Console:
    """A standard stream that never ends a program: what cannot be written is dropped.

    The reader of a pipe may go (`| head`), a terminal be closed, the disk of a log file be full.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if isinstance(self._stream, TextIOWrapper):  # names of files may hold what the terminal's encoding lacks
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(partial(self._stream.write, text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno in _GONE:  # for good, so that nothing meets the error again, at the exit of Python for one
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], None], less_memory: str = "take smaller batches") -> None:
    """Call a program's `main`; a UserError or a missing package ends it with one line on stderr and exit status 2.

    The same error of several ranks is reported by the first of them, an error of one rank alone with its number. Any other
    exception is a bug and keeps its traceback. What then breaks on the other ranks, whose peer has left, is not reported.
    A console that is gone never ends the program. Where the locale's names of files are not in UTF-8, as records hold them,
    Python is started again in its UTF-8 mode.

    Args:
        main: the program.
        less_memory: what to do where the GPU's memory does not suffice; the end of the sentence.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.stdout, sys.stderr = cast(TextIO, _Console(sys.stdout)), cast(TextIO, _Console(sys.stderr))
    try:
        _within_memory(main, less_memory)
    except UserError as error:
        if not _reported(str(error)):
            rank = int(os.environ.get("RANK", "0"))
            sys.stderr.write(f"error{f' (rank {rank})' if rank else ''}: {error}\n")
        raise SystemExit(2) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        root = Path(__file__).parents[1]
        if not package or (root / package).exists() or (root / f"{package}.py").exists():
            raise
        sys.stderr.write(
            f"error: the package {package} is not installed for {sys.executable}: `source .venv/bin/activate` after "
            "`bash setup.sh`, or `pip install -r requirements.txt -c constraints.txt`\n"
        )
        raise SystemExit(2) from error
    except Exception as error:
        if _reported():
            raise SystemExit(2) from error
        _reported(repr(error))
        raise
    if "torch" in sys.modules:
        from common.processes import leave

        leave()


def _within_memory(main: Callable[[], None], less: str) -> None:
    try:
        main()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        what = ". ".join(str(error).split(". ")[:2])
        raise UserError(f"the GPU's memory does not suffice ({what}): {less}") from error


def _reported(error: str | None = None) -> bool:
    """Whether another rank has reported this error before, or any; this one counts as reported from now on."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from common.processes import already_reported  # imports torch

    return already_reported(error)


def progress(total: int, *, unit: str, description: str | None = None, initial: int = 0, shown: bool = True) -> tqdm:
    """A progress bar on stderr; where stderr is not a terminal, a line at most every 30 seconds and one at the end.

    Args:
        total: units of work in all.
        unit: what is counted, in the singular.
        description: words before the bar.
        initial: units that were done before.
        shown: False for a bar that prints nothing (ranks other than 0).

    Returns:
        The bar, to be used as a context manager and moved with `update(units)`.
    """
    bar: dict[str, Any] = {
        "total": total,
        "unit": unit,
        "desc": description,
        "initial": initial,
        "disable": not shown,
        "smoothing": 0.05,
    }
    if sys.stderr.isatty():
        return tqdm(**bar)
    return _Lines(**bar, mininterval=SECONDS_BETWEEN_LINES, miniters=0, leave=False)


class _Lines(tqdm):
    """A bar for log files: each state is a line of its own, the first one when there is progress."""

    monitor_interval = 0  # no thread that would print more often
    _printed: float = 0  # units in the newest line

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state; tqdm calls this with an empty message when the bar closes."""
        if self.n > max(self.initial, self._printed):
            self._printed = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Called with nolock after a message was printed above the bar: nothing to draw again."""
        if not nolock:
            super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Nothing to wipe: a line once written stays."""
