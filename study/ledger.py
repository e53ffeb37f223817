"""Raw results: one line of JSON for each finished judgement, found again by the digest of what was run."""

import json
import os
from pathlib import Path
from typing import Any

from common.files import sync, write_error
from common.reporting import say


class Ledger:
    """A file of JSON lines that several processes may append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; one that was cut off by a crash is left out with a message."""
        if not self.path.is_file():
            return []
        found = []
        for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(json.loads(text))
            except ValueError:
                if text.strip():
                    say(f"{self.path}, line {number}: cut off, not counted")
        return found

    def keys(self) -> set[str]:
        """The digests of what is finished."""
        return {line["key"] for line in self.lines()}

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns; lines that other processes add at the same time stay whole.

        Raises:
            WriteError: the file system refuses.
        """
        text = json.dumps(line, sort_keys=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    text = "\n" + text  # a crash has cut the last line off
                os.write(handle, text.encode())
            finally:
                os.close(handle)
            sync(self.path)
        except OSError as error:
            raise write_error(self.path, error) from error
