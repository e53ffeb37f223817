"""Arrays of npy and npz files: nothing is unpickled, sizes are checked first, members of an npz by their CRC-32.

They are read in pieces: stored ones in place, compressed ones as a stream.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Literal

import numpy as np

from common.files import ReadError
from config import MissingFile, UserError

_PIECE = 2**22  # bytes, read at once to check a member
# What a damaged file drives zipfile and numpy into; OSError also for a seek to nowhere.
_DAMAGE = (zipfile.BadZipFile, EOFError, struct.error, zlib.error, ValueError, RuntimeError, OSError, OverflowError)
# What numpy's parser of headers raises; the last two for deep nesting.
_BAD_HEADER = (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)


class Array:
    """One .npy member of an npz: no objects."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo):
        self.path, self.member = path, member.filename
        with archive.open(member) as stream:
            name = f"{path}: {member.filename}"
            self.shape, self.dtype, self.order, self.header = _read_header(stream, member.file_size, name)
        self.offset = None  # of the data in the file, where it lies there uncompressed
        if member.compress_type == zipfile.ZIP_STORED:
            if member.compress_size != member.file_size:
                raise UserError(f"{path}: {member.filename} has two sizes; it is damaged")
            with path.open("rb") as stream:
                stream.seek(member.header_offset)
                local = stream.read(30)  # local file header: the lengths of name and extra field are its last words
            self.offset = member.header_offset + 30 + sum(struct.unpack("<HH", local[26:30])) + self.header
        self._stream: IO[bytes] | None = None
        self._checked = False

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The entries `start` to before `stop` of the first axis.

        Raises:
            UserError: the file is truncated, or the member does not match its CRC-32; all of it is compared before the first
                entry is returned.
        """
        assert self.order == "C", "rows of other arrays do not lie together"
        return self._read(start * self._row, (stop - start) * self._row).reshape(stop - start, *self.shape[1:])

    def all(self) -> np.ndarray:
        """The whole array, writable; small ones only. Raises as `rows` does."""
        return np.array(self._read(0, self._row * (self.shape[0] if self.shape else 1))).reshape(
            self.shape, order=self.order
        )

    @property
    def _row(self) -> int:
        """Bytes of an entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _read(self, start: int, count: int) -> np.ndarray:
        """`count` bytes of the data from byte `start`, as numbers."""
        try:
            if not self._checked:
                self._check()
            if self._stream is None:  # kept open: seeking forward in a compressed member unpacks only what is skipped
                self._stream = self.path.open("rb") if self.offset is not None else self._unpack()
            self._stream.seek((self.header if self.offset is None else self.offset) + start)
            data = self._stream.read(count)
        except _DAMAGE as error:
            raise UserError(f"{self.path} is damaged in {self.member}: {error}") from error
        if len(data) != count:
            raise UserError(f"{self.path} is truncated: {self.member} ends before byte {start + count} of its data")
        return np.frombuffer(data, self.dtype)

    def _unpack(self) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open(self.member)

    def _check(self) -> None:
        """Read the member to its end, where zipfile compares the CRC-32."""
        with self._unpack() as stream:
            while stream.read(_PIECE):
                pass
        self._checked = True


def members(path: Path) -> dict[str, Array]:
    """Arrays of an npz by name, none of them read.

    Raises:
        UserError: a member is not a plain .npy array, or the file is damaged; ReadError without permission to read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            refuse_joined(path, archive.infolist())
            for member in archive.infolist():
                if b"PK\1\2" in member.extra + member.comment:
                    raise UserError(f"{path}: the entry of {member.filename} covers another one; it is damaged")
                if member.filename.endswith(".npy"):
                    found[member.filename.removesuffix(".npy")] = Array(path, archive, member)
                else:
                    archive.open(
                        member
                    ).close()  # compares the name with the one beside the data: a lost suffix is damage
            return found
    except UserError:
        raise
    except PermissionError as error:
        raise ReadError(path, error) from error
    except FileNotFoundError as error:
        raise MissingFile(f"{path} does not exist") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is not an npz file, or truncated ({error}); write it again") from error


def refuse_joined(source: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise UserError for a zip that another one was appended to: zipfile sees the members of the last one alone."""
    first = min((member.header_offset for member in members), default=0)
    with source.open("rb") as stream:
        if first > 0 and stream.read(4) == b"PK\3\4":
            raise UserError(f"{source}: two zips joined into one file, of which the first is lost; join their contents")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a small npz, by name. Raises as `members` and `Array.rows` do."""
    return {name: array.all() for name, array in members(path).items()}


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file of plain numbers.

    Raises:
        UserError: it is something else, or its size is not the one that its header promises; MissingFile without it.
    """
    if not path.is_file():
        raise MissingFile(f"{path} does not exist")
    try:
        with path.open("rb") as stream:
            shape, dtype, order, _ = _read_header(stream, path.stat().st_size, str(path))
            return np.fromfile(stream, dtype).reshape(shape, order=order)
    except OSError as error:
        raise ReadError(path, error) from error


def _read_header(stream: IO[bytes], size: int, name: str) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"], int]:
    """Shape, type, order and length of the header of a .npy file of `size` bytes; the stream is then at the data."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except _BAD_HEADER as error:
        raise UserError(f"{name} is not an array of a known version ({error})") from error
    header = stream.tell()
    if dtype.hasobject:
        raise UserError(f"{name} holds pickled objects, which are not read; save plain arrays")
    expected = header + math.prod(shape) * dtype.itemsize
    if size != expected or min(shape, default=0) < 0 or not dtype.itemsize:
        raise UserError(f"{name} has {size} bytes, its header says {expected}; it is damaged")
    return shape, dtype, "F" if fortran and len(shape) > 1 else "C", header
