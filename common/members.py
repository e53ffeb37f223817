"""The bytes of listed images: files of a folder, members of zips and tars by their place alone."""

import os
import zlib
from pathlib import Path

from common.contents import Item
from common.files import crc32
from common.images import MAX_BYTES, BadImage


class Members:
    """Encoded images of a listing. Archives are opened on first use in the process that uses them, and stay open."""

    def __init__(self, kind: str, root: Path, files: list[str]) -> None:
        """Keep where the images are.

        Args:
            kind: folder | zip | tar.
            root, files: as of `Contents`.
        """
        self.kind, self.root, self.files = kind, root, files
        self._descriptors: dict[int, int] = {}

    def read(self, item: Item) -> bytes | Path:
        """The encoded image, or the file that holds it. Raises BadImage if it cannot be had."""
        if self.kind not in ("zip", "tar"):
            path = self.root / self.files[item.file] / item.name
            self._check_size(path, item.size)
            return path
        if max(item.size, item.stored) > MAX_BYTES:
            raise BadImage(f"a member of {item.size} bytes is too large for an image (limit {MAX_BYTES})")
        try:
            descriptor = self._descriptor(item.file)
            if self.kind == "tar":
                return _read_range(descriptor, item.offset, item.size)
            return _read_zip_member(descriptor, item)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror or error})") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": {}}

    def _check_size(self, path: Path, listed: int) -> None:
        """Raise BadImage if a file is not the one that was listed: a packing may go on days after its start."""
        try:
            size = path.stat().st_size if listed >= 0 else listed
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error
        if size != listed:
            raise BadImage(f"has {size:,} bytes, but had {listed:,} when the images were listed")

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self.root / self.files[number], os.O_RDONLY)
        return self._descriptors[number]


def _read_range(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadImage("the archive ends within it")
    return data


def _read_zip_member(descriptor: int, item: Item) -> bytes:
    """A member of a zip by its place alone: no process but the first needs the archive's directory in memory."""
    header = _read_range(descriptor, item.offset, 30)
    if header[:4] != b"PK\3\4":
        raise BadImage("the zip is damaged: no member where its directory says")
    start = item.offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if item.stored < 0:
        data = _read_range(descriptor, start, item.size)
    else:
        try:
            data = zlib.decompressobj(-15).decompress(_read_range(descriptor, start, item.stored), item.size + 1)
        except zlib.error as error:
            raise BadImage(f"the zip is damaged ({error})") from error
    if len(data) != item.size or crc32(data) != item.crc:  # also a bomb that inflates to more than it says
        raise BadImage("the zip is damaged: the member is not what its directory says")
    return data
