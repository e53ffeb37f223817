"""Writing a shard of a packed dataset so that it is whole or absent."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.files import crc32, replacing, sha256, write_sealed
from packed.format import CRC, Field, entry_file, shard_file


class ShardWriter:
    """Writes one shard batch by batch, in bounded memory: `append` any number of times, then `finish`.

    Files appear under their names when they are whole and on the disk, the entry `shard-00000.json` last: a killed process
    leaves `.tmp` files, which the next one overwrites.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number
        self.count = 0
        self._files = ExitStack()
        self._streams: dict[str, BinaryIO] = {}
        self._specs: dict[str, Field] = {}
        self._crc: list[np.ndarray] = []

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add n records; field => (n, ...) array, the same fields, types and shapes in every call."""
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise ValueError(f"the fields of a shard must have equally many records, got {counts}")
        specs = {name: Field(array.dtype, array.shape[1:]) for name, array in arrays.items()}
        if not self._streams:
            self._specs = specs
            for name in arrays:
                self._open(name).write(specs[name].header(0))
        elif specs != self._specs:
            raise ValueError(f"the records of a shard must be alike, got {specs} after {self._specs}")
        crc = np.empty((counts.pop(), len(arrays)), np.uint32)
        for column, name in enumerate(sorted(arrays)):
            array = np.ascontiguousarray(arrays[name])
            for row in range(len(array)):
                crc[row, column] = crc32(array[row].data if array.ndim > 1 else array[row].tobytes())
            self._streams[name].write(array.data)
        self._crc.append(crc)
        self.count += len(crc)

    def finish(self, notes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make the shard appear; returns its manifest entry, {"count", "files", **notes}. Raises WriteError (OSError)."""
        for name, stream in self._streams.items():
            stream.seek(0)
            stream.write(self._specs[name].header(self.count))
        if self.count:
            np.save(self._open(CRC), np.concatenate(self._crc), allow_pickle=False)
        self._files.close()
        digests = {name: {"file": shard_file(name, self.number), "sha256": ""} for name in self._streams}
        for file in digests.values():
            file["sha256"] = sha256(self.directory / file["file"])
        entry: dict[str, Any] = {"count": self.count, "files": digests, **(notes or {})}
        write_sealed(entry_file(self.directory, self.number), entry)
        return entry

    def abandon(self) -> None:
        """Close and delete what was begun."""
        self._files.__exit__(RuntimeError, RuntimeError("the shard was abandoned"), None)

    def _open(self, name: str) -> BinaryIO:
        temporary = self._files.enter_context(replacing(self.directory / shard_file(name, self.number)))
        self._streams[name] = self._files.enter_context(temporary.open("wb"))
        return self._streams[name]


def write_shard(directory: Path, number: int, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write shard `number` in one go; field => (n, ...) array. Returns its manifest entry."""
    writer = ShardWriter(directory, number)
    writer.append(arrays)
    return writer.finish()
