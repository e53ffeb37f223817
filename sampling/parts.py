"""Finished samples on disk while a job runs: one file for each batch, whole or absent, from which any job continues.

Part files are named by the samples they hold, so that the number of processes and the batch size may change between two
runs of the same command. `settings.json` beside them says what all of them were made with.
"""

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError, differences

_NAME = re.compile(r"part-(\d{9})-(\d{9})\.npz")


class Parts:
    """The folder of finished parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, identity: dict[str, Any]) -> None:
        """Start or continue with these settings; called by one process alone.

        Raises ValueError, naming what differs, when the folder holds parts made with other settings.
        """
        file = self.folder / "settings.json"
        if file.is_file():
            refuse_mixing(self.folder, json.loads(file.read_text()), identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, identity)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for path in self.folder.glob("part-*.npz"):
            if not zipfile.is_zipfile(path):  # cut short by a crash of the machine
                path.unlink()

    def done(self) -> list[range]:
        """The samples that are finished, a range for each part, in order."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((range(int(m[1]), int(m[2])) for m in found if m), key=lambda r: r.start)

    def names(self) -> list[str]:
        """The arrays that the parts hold."""
        with np.load(self._path(self.done()[0]), allow_pickle=False) as stream:
            return list(stream.files)

    def write(self, samples: range, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of these samples, row for row. Raises ValueError when the disk is full."""
        path = self._path(samples)
        temporary = path.with_suffix(".npz.tmp")
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, **arrays)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(path)
        except OSError as error:
            raise _disk_error(path, error) from error

    def rows(self, count: int, name: str) -> Iterator[np.ndarray]:
        """One array of the first `count` samples, part after part. Raises ValueError where a part is missing or damaged;
        a damaged one is removed, so that the same command makes it again."""
        edge = 0
        for samples in self.done():
            if samples.start >= count:
                break
            if samples.start != edge:
                break
            path = self._path(samples)
            try:
                with np.load(path, allow_pickle=False) as stream:
                    rows = stream[name]
            except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
                path.unlink()
                raise UserError(f"{path} was damaged and has been removed; run the same command again") from error
            yield rows[: count - edge]
            edge = samples.stop
        if edge < count:
            raise UserError(f"{self.folder} has no sample {edge}; run the same command again")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, samples: range) -> Path:
        return self.folder / f"part-{samples.start:09d}-{samples.stop:09d}.npz"


def refuse_mixing(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError unless the two identities are the same, naming the first difference."""
    for name, was, value in differences(before, now):
        raise UserError(
            f"{folder} holds samples made with {name} = {was}, this command says {value}; give another --out, or delete "
            "that folder"
        )


def write_samples(path: Path, parts: Parts, count: int, shape: tuple[int, ...]) -> None:
    """Write the npz of ADM's labelled form, one part in memory at a time: `arr_0` (count, *shape) uint8, `arr_1` labels.

    Members are stored without compression and their bytes depend on the samples alone. The file appears by rename.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                _write_member(archive, "arr_0", (count, *shape), np.dtype(np.uint8), parts.rows(count, "pixels"))
                _write_member(archive, "arr_1", (count,), np.dtype(np.int64), parts.rows(count, "label"))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except OSError as error:
        raise _disk_error(path, error) from error


def write_rows(path: Path, shape: tuple[int, ...], dtype: type, rows: Iterator[np.ndarray]) -> None:
    """Write a .npy file row block by row block; it appears by rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, _header(shape, np.dtype(dtype)))
            for block in rows:
                stream.write(np.ascontiguousarray(block, dtype).tobytes())
        temporary.rename(path)
    except OSError as error:
        raise _disk_error(path, error) from error


def _write_member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, rows: Iterator[np.ndarray]
) -> None:
    member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(member, "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, _header(shape, dtype))
        for block in rows:
            stream.write(np.ascontiguousarray(block, dtype).tobytes())


def _header(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)


def check_space(folder: Path, needed: int) -> int:
    """Free bytes where `folder` is or will be. Raises ValueError when they are fewer than `needed`."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; give an --out elsewhere"
        )
    return free


def _disk_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full at {path}; finished samples are kept: free space, then run the same command"
        )
    return UserError(f"{path} cannot be written: {error.strerror or error}")
