"""Finished samples on disk while a job runs: one file per batch, whole or absent, from which any job continues.

Part files are named by the samples they hold, so that the number of processes and the batch size may change between two
runs of the same command. `settings.json` beside them records what all of them were made with.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.arrays import members
from common.files import ReadError, WriteError, delete_folder, read_json, replacing, write_json
from common.lock import FolderLock
from config import UserError, differences

SETTINGS = "settings.json"
_NAME = re.compile(r"part-(\d{9})-(\d{9})\.npz")


class Parts:
    """The folder of finished parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FolderLock | None = None

    def claim(self, *, joins: bool = False) -> None:
        """Lock the folder until `close`, first by rank 0; the others join. Raises UserError where another job has it."""
        if self._lock is None:
            self._lock = FolderLock(self.folder, "lock", "wait for its end, or give another --out", joins=joins)

    def close(self) -> None:
        """Release the lock, if it is held."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, identity: dict[str, Any]) -> None:
        """Start or continue with these settings; called by rank 0 alone.

        Raises:
            UserError: another job writes into the folder, or it holds parts made with other settings; names what differs.
        """
        self.claim()
        file = self.folder / SETTINGS
        if file.is_file():
            refuse_mixing(self.folder, read_json(file), identity)
        write_json(file, identity)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for path in self.folder.glob("part-*.npz"):
            if not zipfile.is_zipfile(path):  # cut short by a crash of the machine
                path.unlink()

    def done(self) -> list[range]:
        """The samples that are finished, in order: of each part the ones that no part before it holds."""
        return [samples for samples, _ in self._disjoint()]

    def _disjoint(self) -> list[tuple[range, range]]:
        """(its samples that no part before it holds, all its samples) of each part, in order.

        Parts overlap where two jobs of different batch sizes wrote into the folder. A sample is the same in all of them.
        """
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        edge, parts = 0, []
        for part in sorted((range(int(m[1]), int(m[2])) for m in found if m), key=lambda r: (r.start, -r.stop)):
            if part.stop > edge:
                parts.append((range(max(edge, part.start), part.stop), part))
                edge = part.stop
        return parts

    def names(self) -> list[str]:
        """The arrays that the parts hold."""
        return list(members(self._path(self._disjoint()[0][1])))

    def write(self, samples: range, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of these samples, row for row. Raises WriteError when the disk is full."""
        try:
            with replacing(self._path(samples)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy takes the names for those of its options
        except WriteError as error:
            raise WriteError(f"{error}; finished samples are kept, the same command continues") from error

    def rows(self, count: int, name: str) -> Iterator[np.ndarray]:
        """One array of the first `count` samples, part after part.

        Raises:
            UserError: a part is missing or damaged; a damaged one is removed, so that the same command makes it again.
        """
        edge = 0
        for samples, part in self._disjoint():
            if samples.start >= count or samples.start != edge:
                break
            path = self._path(part)
            try:
                rows = members(path)[name].all()
            except ReadError:  # it may be whole
                raise
            except (UserError, KeyError) as error:
                path.unlink()
                raise UserError(f"{path} was damaged and has been removed; run the same command again") from error
            yield rows[edge - part.start : count - part.start]
            edge = samples.stop
        if edge < count:
            raise UserError(f"{self.folder} has no sample {edge}; run the same command again")

    def remove(self) -> None:
        """Delete the folder, which ends the lock."""
        delete_folder(self.folder)
        self.close()

    def _path(self, samples: range) -> Path:
        return self.folder / f"part-{samples.start:09d}-{samples.stop:09d}.npz"


class OtherSettings(UserError):
    """The folder holds samples of other settings."""


def refuse_mixing(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise OtherSettings unless the two identities are the same, naming the first difference."""
    for name, was, value in differences(before, now):
        raise OtherSettings(
            f"{folder} holds samples made with {name} = {was}, this command says {value}; give another --out, or delete "
            "that folder"
        )


def write_samples(path: Path, parts: Parts, count: int, shape: tuple[int, ...]) -> None:
    """Write the npz of ADM's labelled form, one part in memory at a time: `arr_0` (count, *shape) uint8, `arr_1` labels.

    Members are stored without compression and their bytes depend on the samples alone.
    """
    members = (("arr_0", "pixels", np.uint8, (count, *shape)), ("arr_1", "label", np.int64, (count,)))
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array, dtype, full_shape in members:
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                _write_array(stream, full_shape, dtype, parts.rows(count, array))


def write_rows(path: Path, shape: tuple[int, ...], dtype: type, rows: Iterator[np.ndarray]) -> None:
    """Write a .npy file, one block of rows in memory at a time."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        _write_array(stream, shape, dtype, rows)


def _write_array(stream: IO[bytes], shape: tuple[int, ...], dtype: type, rows: Iterator[np.ndarray]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for block in rows:
        stream.write(np.ascontiguousarray(block, dtype).tobytes())
