"""Shards are written by a thread of their own, so that neither GPU nor decoding waits for the disk."""

import errno
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from packed.writer import ShardWriter

_DEPTH = 4  # batches that may wait for the disk


class BackgroundWriter:
    """`put` batches in order, then `close`; what goes wrong in the thread is raised by the next call of either.

    Use as a context manager: left by an error, it drops the unfinished shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._queue: queue.Queue = queue.Queue(_DEPTH)
        self._error: OSError | ValueError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, shard: int, arrays: dict[str, np.ndarray], notes: dict[str, Any] | None) -> None:
        """Append records to a shard; notes, given with the last of them, finish it. Raises UserError on a full disk."""
        self._raise()
        self._queue.put((shard, arrays, notes))

    def _run(self) -> None:
        writer: ShardWriter | None = None
        while (work := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep emptying the queue, so that `put` never hangs
            shard, arrays, notes = work
            try:
                writer = writer or ShardWriter(self.directory, shard)
                if arrays:
                    writer.append(arrays)
                if notes is not None:
                    writer.finish(notes)
                    writer = None
            except (OSError, ValueError) as error:
                self._error = error
        if writer is not None:
            writer.abandon()

    def _raise(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, OSError):
            full = self._error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise UserError(
                f"{self.directory}: {'the disk is full' if full else self._error}; finished files are kept: make room and "
                "run the same command again"
            ) from self._error
        raise self._error
