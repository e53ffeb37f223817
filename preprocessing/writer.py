"""Shards are written by a thread of their own, so that neither GPU nor decoding waits for the disk."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_error
from config import UserError
from packed.writer import ShardWriter

_DEPTH = 4  # batches that may wait for the disk


class BackgroundWriter:
    """`put` batches in order; what goes wrong in the thread is raised by a later call, or where the context ends.

    Use as a context manager: left by an error, it drops the unfinished shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._shard: ShardWriter | None = None
        self._broken = False  # after an error, batches that are still waiting must not be written

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._thread.shutdown()
            if self._shard is not None:
                self._shard.abandon()

    def put(self, shard: int, arrays: dict[str, np.ndarray], notes: dict[str, Any] | None) -> None:
        """Append records to a shard.

        Args:
            shard: its number.
            arrays: field => (n, ...) array; or empty.
            notes: given with the last records, they finish the shard.

        Raises:
            UserError: an earlier batch could not be written.
        """
        self._wait(_DEPTH)
        self._waiting.append(self._thread.submit(self._write, shard, arrays, notes))

    def _wait(self, depth: int) -> None:
        while len(self._waiting) > depth:
            try:
                self._waiting.popleft().result()
            except OSError as error:
                raise UserError(
                    f"{write_error(self.directory, error)}; finished shards are kept: run the same command again"
                ) from error

    def _write(self, number: int, arrays: dict[str, np.ndarray], notes: dict[str, Any] | None) -> None:
        if self._broken:
            return
        self._broken = True
        if self._shard is None:
            self._shard = ShardWriter(self.directory, number)
        if arrays:
            self._shard.append(arrays)
        if notes is not None:
            self._shard.finish(notes)
            self._shard = None
        self._broken = False
