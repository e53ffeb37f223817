"""One program at a time in a folder that a person names: a lock that every rank holds and that ends with them."""

import errno
import fcntl
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from common.files import make_folder, write_error
from common.processes import on_first, share
from common.reporting import say
from config import UserError

_NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
)  # of Lustre without -o flock, and of some network file systems
_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


class InUse(UserError):
    """Another program has the lock."""


def claim(folder: Path, name: str, advice: str) -> "FolderLock":
    """Lock a folder for all ranks of this program; all of them call it. See FolderLock."""
    return on_first(lambda: FolderLock(folder, name, advice)) or FolderLock(folder, name, advice, joins=True)


def claim_if_free(folder: Path, name: str, advice: str) -> "FolderLock | None":
    """As `claim`, but None on all ranks, with a message, while another program has the lock."""

    def attempt() -> FolderLock | None:
        try:
            return FolderLock(folder, name, advice)
        except InUse as error:
            say(str(error))
            return None

    lock = on_first(attempt)
    if not share(lock is not None):
        return None
    return lock or FolderLock(folder, name, advice, joins=True)


def wait_for(folder: Path, name: str) -> "FolderLock":
    """Lock a folder for this process alone, as soon as no other program has it; who has it is said once."""
    said = False
    while True:
        try:
            return FolderLock(folder, name, "waiting for it")
        except InUse as error:
            if not said:
                say(str(error))
            said = True
            time.sleep(0.2)


def claim_file(out: Path) -> "FolderLock":
    """Lock the file or folder that --out names, by a file beside it, for all ranks of this program."""
    return claim(out.parent, f".{out.name}.lock", "wait for it, or give another --out")


class FolderLock:
    """A shared flock on a file of the folder: only who could have it alone may begin, and the other ranks join.

    The kernel releases it when the last of these processes has ended, however it ended. Where the file system has no locks,
    a file for each process, named after its host, number and start time, takes its place.
    """

    def __init__(self, folder: Path, name: str, advice: str, *, joins: bool = False) -> None:
        """Take the lock.

        Args:
            folder: made if it is missing; removed at the end if it is still empty then.
            name: of the lock file.
            advice: what to do when another process holds it, half a sentence.
            joins: another rank of this program has taken the lock, share it.

        Raises:
            InUse: names the holder.
            UserError: names the file that cannot be written.
        """
        self._path = folder / name
        self._stream: TextIO | None = None
        self._marker: Path | None = None
        self._made: list[Path] = []
        try:
            self._made = make_folder(folder)
            try:
                self._stream = _locked(self._path, joins, self._made)
            except BlockingIOError as error:
                raise InUse(f"{folder} is in use by {_text(self._path)}; {advice}") from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                with suppress(FileNotFoundError):
                    if not self._path.stat().st_size:
                        self._path.unlink()
                self._marker = _marked(self._path, joins, advice)
        except OSError as error:
            raise write_error(self._path, error) from error
        _HELD.add(self)

    def close(self) -> None:
        """Release this process's share; the last one removes the file, and the folders that were made for nothing else."""
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)
        if self._stream is not None:
            with suppress(OSError):  # another rank still has it, or the folder is gone
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path.unlink()
            self._stream.close()
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()
        self._stream = self._marker = None
        self._made = []

    def forget(self) -> None:
        """In a forked child, which may outlive the rank: leave the lock to the parent."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._marker = None


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


def _locked(path: Path, joins: bool, made: list[Path]) -> TextIO:
    """The open lock file, locked; folders that it makes are added. Raises BlockingIOError if another program has it."""
    while True:
        try:
            stream = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            if path.parent.is_dir():
                raise
            made += make_folder(path.parent)  # its last holder has removed it since it was made
            continue
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if joins else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # its last holder may have removed it since it was opened
                if os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                    if not joins:
                        stream.truncate(0)
                        stream.write(_this_process())
                        stream.flush()
                        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return stream
        except OSError:
            stream.close()
            raise
        stream.close()


def _marked(path: Path, joins: bool, advice: str) -> Path:
    """A file that says that this process is in the folder; those of dead processes of this host are removed.

    It is written before others are looked for: of two programs that start at once both may be refused, but one always is.
    """
    host, own = socket.gethostname(), os.getpid()
    marker = path.with_name(f"{path.name}.{host}.{own}.{_started(own)}")
    try:
        marker.touch(exist_ok=False)
    except FileExistsError as error:
        raise InUse(f"{path.parent} is in use by {_text(marker)}; {advice}") from error
    marker.write_text(_this_process(), encoding="utf-8")
    if joins:
        return marker
    for other in set(path.parent.glob(f"{path.name}.*.*.*")) - {marker}:
        there, number, start = other.name.removeprefix(f"{path.name}.").rsplit(".", 2)
        if there == host and _started(number) != start:
            other.unlink(missing_ok=True)
            continue
        holder, elsewhere = _text(other), f" (if it has ended, remove {other})" * (there != host)
        marker.unlink()
        raise InUse(f"{path.parent} is in use by {holder}{elsewhere}; {advice}")
    say(
        f"warning: the file system of {path.parent} has no locks; the file {marker.name} says that the folder is in use"
    )
    return marker


def _started(process: int | str) -> str:
    """When a process of this host started, in clock ticks since the start of the machine; "dead" if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "dead"
    return "dead" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _text(path: Path) -> str:
    """Who holds the lock, as its file says."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"
