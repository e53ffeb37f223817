"""Arrays of an npz file, read in pieces: stored ones in place, compressed ones as a stream; nothing is unpickled."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from config import UserError


class Array:
    """One .npy member of an npz: C order, no objects. Stored members are read in place, compressed ones unpacked."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo):
        self.path, self.member = path, member.filename
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        with archive.open(member) as stream:
            try:
                self.shape, fortran, self.dtype = readers[np.lib.format.read_magic(stream)](stream)
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}: {member.filename} is not an array of a known version ({error})") from error
            self.header = stream.tell()
        if self.dtype.hasobject:
            raise UserError(f"{path}: {member.filename} holds pickled objects, which are not read; save plain arrays")
        if fortran and len(self.shape) > 1:
            raise UserError(f"{path}: {member.filename} is in Fortran order; save it with np.ascontiguousarray")
        expected = self.header + int(np.prod(self.shape)) * self.dtype.itemsize
        if member.file_size != expected:
            raise UserError(
                f"{path}: {member.filename} has {member.file_size} bytes, its header says {expected}; it is damaged"
            )
        self.offset = None  # of the data in the file, where it lies there uncompressed
        if member.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as stream:
                stream.seek(member.header_offset)
                local = stream.read(30)  # local file header: the lengths of name and extra field are its last words
            self.offset = member.header_offset + 30 + sum(struct.unpack("<HH", local[26:30])) + self.header
        self._stream: IO[bytes] | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The entries `start` to before `stop` of the first axis."""
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        count = (stop - start) * row
        try:
            if self._stream is None:  # kept open: seeking forward in a compressed member unpacks only what is skipped
                self._stream = self.path.open("rb") if self.offset is not None else self._unpack()
            self._stream.seek((self.header if self.offset is None else self.offset) + start * row)
            data = self._stream.read(count)
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self.path} is damaged in {self.member}: {error}") from error
        if len(data) != count:
            raise UserError(f"{self.path} is truncated: {self.member} ends before row {stop}")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def _unpack(self) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open(self.member)

    def all(self) -> np.ndarray:
        """The whole array; small ones only."""
        if not self.shape:
            raise UserError(f"{self.path}: {self.member} is a single number, not an array")
        return self.rows(0, self.shape[0])


def members(path: Path) -> dict[str, Array]:
    """Arrays of an npz by name, none of them read.

    Raises:
        UserError: a member is not a plain .npy array, or the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): Array(path, archive, member)
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not an npz file, or truncated ({error}); write it again") from error
