"""What is read of a packed dataset is what was written: sizes and labels at the start, each record when it is first read."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from common.files import crc32
from common.reporting import say
from config import MissingFile, UserError
from packed.format import CRC, REPAIR, Field, Manifest


def check_sizes(directory: Path, manifest: Manifest, fields: Sequence[str]) -> None:
    """Find missing and truncated files, without opening thousands of them. Raises UserError for the first one."""
    specs = {name: Field.of(manifest.fields[name]) for name in fields} | {CRC: crc_field(manifest)}
    for shard in manifest.shards:
        for name in (*fields, *([CRC] if CRC in shard["files"] else ())):
            path = directory / shard["files"][name]["file"]
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                raise MissingFile(f"shard file {path} is missing; {REPAIR}") from None
            expected = specs[name].file_bytes(shard["count"])
            if size != expected:
                raise UserError(f"shard file {path} is truncated or damaged: {size} bytes, not {expected}; {REPAIR}")


def crc_field(manifest: Manifest) -> Field:
    """A record of the CRC file: the CRC-32 of each field, in alphabetical order."""
    return Field(np.dtype(np.uint32), (len(manifest.fields),))


def read_labels(directory: Path, manifest: Manifest) -> np.ndarray:
    """The labels of all records, (count,) int64.

    Raises:
        UserError: a label is not a class, or a file is not what was written; names the file, and the record.
    """
    field, parts, first = Field.of(manifest.fields["label"]), [], 0
    for shard in manifest.shards:
        path = directory / shard["files"]["label"]["file"]
        content, header = path.read_bytes(), field.header(shard["count"])
        if not content.startswith(header) or len(content) != field.file_bytes(shard["count"]):
            raise UserError(f"shard file {path} does not hold {shard['count']} records of int64 (); {REPAIR}")
        labels = np.frombuffer(content, np.int64, offset=len(header))
        wrong = np.flatnonzero((labels < 0) | (labels >= len(manifest.classes)))
        if len(wrong):
            raise UserError(
                f"shard file {path}: record {first + wrong[0]} (row {wrong[0]}) has label {labels[wrong[0]]}, but the "
                f"classes are 0 to {len(manifest.classes) - 1}; {REPAIR}"
            )
        if hashlib.sha256(content).hexdigest() != shard["files"]["label"]["sha256"]:
            raise UserError(f"shard file {path} does not match its checksum; {REPAIR}")
        parts.append(labels)
        first += len(labels)
    return np.concatenate(parts)


class RecordChecks:
    """Compares each record with its CRC-32 the first time that this process reads it."""

    def __init__(self, directory: Path, manifest: Manifest, fields: Sequence[str]) -> None:
        """Where shards have no CRC-32 of their records, a message says so: they can only be verified as a whole.

        Args:
            directory: of the dataset.
            manifest: of it.
            fields: those that are read.
        """
        self._directory, self._manifest = directory, manifest
        self._columns = {name: sorted(manifest.fields).index(name) for name in fields}
        self._unread = np.concatenate([np.full(shard["count"], CRC in shard["files"]) for shard in manifest.shards])
        if not self._unread.all():
            say(
                f"{directory} has no checksums of single records, so they are not compared as they are read: "
                f"`python -m preprocessing.pack --out {directory} --verify` compares whole files"
            )

    def check(
        self,
        indices: np.ndarray,
        places: Sequence[tuple[int, int]],
        read: Mapping[str, Tensor],
        checksums: Callable[[int], np.ndarray],
    ) -> None:
        """Compare records that were read; those of earlier calls are not compared again.

        Args:
            indices: (N,) record numbers.
            places: shard, and row of it, of each.
            read: field => (N, ...) tensor of these records.
            checksums: shard => the (records, fields) CRC-32 of it.

        Raises:
            UserError: a record is not what was written; names it, its field and its file.
        """
        fresh = np.flatnonzero(self._unread[indices]).tolist()
        if not fresh:
            return
        wanted = {number: checksums(number) for number in {places[i][0] for i in fresh}}
        for name, column in self._columns.items():
            rows = read[name].numpy().view(np.uint8).reshape(len(places), -1)
            for i in fresh:
                number, row = places[i]
                if crc32(rows[i]) != wanted[number][row, column]:
                    path = self._directory / self._manifest.shards[number]["files"][name]["file"]
                    raise UserError(
                        f"record {indices[i]} is damaged: its {name} (row {row} of {path}) does not match its checksum; "
                        f"{REPAIR}"
                    )
        self._unread[indices] = False
