"""One process at a time in a folder that a person names."""

import fcntl
import os
import socket
import time
from pathlib import Path

from common.files import write_error
from config import UserError


class FolderLock:
    """An flock on a file of the folder: the kernel releases it when the process ends, however it ends."""

    def __init__(self, folder: Path, name: str, advice: str) -> None:
        """Take the lock.

        Args:
            folder: made if it is missing.
            name: of the lock file.
            advice: what to do when another process holds it, half a sentence.

        Raises:
            UserError: names the holder, or the file that cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = (folder / name).open("a+", encoding="utf-8")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.seek(0)
            holder = self._stream.read().strip() or "another process"
            self._stream.close()
            raise UserError(f"{folder} is in use by {holder}; {advice}") from error
        except OSError as error:
            raise write_error(folder / name, error) from error
        self._stream.truncate(0)
        self._stream.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        self._stream.flush()

    def close(self) -> None:
        """Release the lock; the file stays."""
        self._stream.close()
