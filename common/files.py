"""Files that are whole or absent: one way to write, to read what others wrote, to digest, to look at free space."""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from common.reporting import say
from config import MissingFile, UserError

try:
    from isal import isal_zlib as zlib  # the same CRC-32, more than ten times as fast
except ImportError:
    import zlib  # type: ignore[no-redef]

_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)  # EACCES: a folder that may not be listed
_WARNED: set[int] = set()  # devices
JSON_LIMIT = 2**28  # bytes of a JSON file; the manifest of 14 million images has 5 MB


class WriteError(UserError, OSError):
    """The disk is full, read-only or broken; the message names the file. Programs that can go on catch it as OSError."""


class ReadError(UserError):
    """A file that is there cannot be read: no permission, a broken disk; the message names the file and the cause."""

    def __init__(self, path: Path, error: OSError) -> None:
        """Say what the operating system answered."""
        super().__init__(f"{path} cannot be read ({error.strerror or error})")


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Write a file so that `path` is the old one or the new one, whole, also after a power cut; or a folder that is new.

    Yields a temporary path beside it; a folder of that name, which a kill has left, is deleted first. When the block ends
    well that file is flushed to the disk and takes the name `path`; otherwise it is deleted.

    Args:
        path: the file.
        shared: other processes may write the same file at the same time, as in a cache; the last one to finish wins.

    Raises:
        WriteError: the file system refuses; the message says how much is free where the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        make_folder(path.parent)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        yield temporary
        for place in (*temporary.rglob("*"), temporary):  # a folder's own entry does not bring its files to the disk
            sync(place)
        temporary.replace(path)
        sync(path.parent)
    except UserError:  # a missing input, which is an OSError too, is not about `path`
        raise
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # on a broken disk the first error is the one to report
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> WriteError:
    """One sentence for an error of the operating system while `path` was written."""
    if isinstance(error, WriteError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(f"the disk is full at {path} ({free_space(path) / 1e9:.2g} GB free): free some space")
    return WriteError(f"{path} cannot be written: {error.strerror or error}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `replacing` does. Lone surrogates, as in a file's name that is not UTF-8, are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_text(path: Path) -> str:
    """Text that a person wrote, in UTF-8 or UTF-16, with or without a byte order mark, or else in Latin-1.

    Raises:
        ReadError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReadError(path, error) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    if content[1:2] == b"\0":
        return content.decode("utf-16-le", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `replacing` does."""
    write_text(path, json.dumps(content, indent=1))


def read_bounded(stream: IO[bytes], limit: int, name: str) -> bytes:
    """The rest of a stream, such as a member of an archive, which may unpack to more than fits the memory.

    Args:
        stream: open for reading.
        limit: the most bytes that are read.
        name: of the file or member, for the message.

    Raises:
        UserError: there are more.
    """
    content = stream.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{name} is larger than the {limit:,} bytes that are read of such a file")
    return content


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The content of a JSON file of at most `limit` bytes.

    Raises:
        UserError: it is not JSON or too large; MissingFile where there is no file, ReadError where it cannot be read.
    """
    if not path.is_file():
        raise MissingFile(f"{path} is missing")
    try:
        with path.open("rb") as stream:
            return parse_json(read_bounded(stream, limit, str(path)), str(path))
    except OSError as error:
        raise ReadError(path, error) from error


def parse_json(content: bytes | str, name: str) -> Any:
    """JSON in UTF-8 (or UTF-16, UTF-32) => its content. Raises UserError, naming `name`, also for endless nesting."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error})") from error


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its content, as `replacing` does."""
    write_json(path, {**content, "checksum": fingerprint(content)})


def read_sealed(path: Path, advice: str, *, optional: bool = False) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Args:
        path: the file.
        advice: what to do about a damaged one, half a sentence.
        optional: a file without a checksum is accepted too.

    Raises:
        UserError: it is not what was written; MissingFile where there is no file, ReadError where it cannot be read.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError("not an object of names and values")
        if (not optional or "checksum" in content) and content.pop("checksum") != fingerprint(content):
            raise UserError("edited, or a bit of it has changed: its checksum does not match")
    except MissingFile as error:
        raise MissingFile(f"{error}; {advice}") from error
    except ReadError:  # it may be whole
        raise
    except KeyError as error:
        raise UserError(f"{path} is damaged (it has no checksum); {advice}") from error
    except (UserError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error).removeprefix(f'{path} is ')}); {advice}") from error
    return content


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What `check_digests` compares with: {name: {"bytes", "sha256"}} of files of a folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def check_digests(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare files of a folder, byte for byte, with what `digests` recorded of them.

    Raises:
        UserError: names the first one that is missing or differs, or the name or record that cannot be one.
    """
    for name, expected in recorded.items():
        path = folder / plain_name(name, folder)
        if not isinstance(expected, Mapping) or not {"bytes", "sha256"} <= expected.keys():
            raise UserError(f"{path}: its size and SHA-256 are not recorded")
        if not path.is_file():
            raise MissingFile(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise UserError(f"{path} has changed since it was written (SHA-256 differs)")


def plain_name(name: str, where: Path) -> str:
    """`name`, if it is that of a file in the same folder. Raises UserError for a path, such as "../x"; `where` holds it."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise UserError(f"{where} names the file {name!r}, which is not a plain file name")
    return name


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (fsync); a warning where the file system has no such service."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        device = path.stat().st_dev
        if device not in _WARNED:
            say(
                f"warning: the file system of {path} cannot flush it to the disk: a power cut may lose the newest files"
            )
        _WARNED.add(device)


def delete_folder(folder: Path) -> None:
    """Delete a folder, if it is there: a kill leaves all of it or none; and clear what an earlier kill has left of it."""
    hidden = folder.with_name(f".deleting-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    with suppress(OSError):  # of another layer of an overlay: deleted where it is
        folder.rename(hidden)
    for place in (hidden, folder):
        shutil.rmtree(place, ignore_errors=True)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, on the disk, if they are missing; returns those that were, the deepest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)
    return missing


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def crc32(content: Any) -> int:
    """CRC-32 of bytes or of a contiguous array, as zip files have it."""
    return zlib.crc32(content)


def fingerprint(content: Any) -> str:
    """Hex SHA-256 of JSON content; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def existing(path: Path) -> Path:
    """`path`, or the deepest folder above it that there is."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_space(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    return shutil.disk_usage(existing(folder)).free


def check_space(flag: str, folder: Path, needed: int, hint: str = "name a folder on another disk") -> int:
    """Free bytes where `folder` is or will be.

    Raises:
        UserError: they are fewer than `needed`; the message starts with the flag that names the folder.
    """
    free = free_space(folder)
    if free < needed:
        raise UserError(f"{flag} {folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; {hint}")
    return free
