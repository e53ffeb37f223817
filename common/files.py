"""Files that are whole or absent: one way to write, to digest, to look at free space."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config import UserError


class WriteError(UserError, OSError):
    """The disk is full, read-only or broken; the message names the file. Programs that can go on catch it as OSError."""


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Write a file so that `path` is the old one or the new one, whole, also after a power cut.

    Yields a temporary path beside it. When the block ends well that file is flushed to the disk and takes the name `path`;
    otherwise it is deleted.

    Args:
        path: the file.
        shared: other processes may write the same file at the same time, as in a cache; the last one to finish wins.

    Raises:
        WriteError: the file system refuses; the message says how much is free where the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # on a broken disk the first error is the one to report
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> WriteError:
    """One sentence for an error of the operating system while `path` was written."""
    if isinstance(error, WriteError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(f"the disk is full at {path} ({free_space(path) / 1e9:.2g} GB free): make room")
    return WriteError(f"{path} cannot be written: {error.strerror or error}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `replacing` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `replacing` does."""
    write_text(path, json.dumps(content, indent=1))


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Hex SHA-256 of JSON content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def free_space(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def check_space(flag: str, folder: Path, needed: int, hint: str = "name a folder on another disk") -> int:
    """Free bytes where `folder` is or will be.

    Raises:
        UserError: they are fewer than `needed`; the message starts with the flag that names the folder.
    """
    free = free_space(folder)
    if free < needed:
        raise UserError(f"{flag} {folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; {hint}")
    return free
