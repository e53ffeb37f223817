"""Run the commands of the quickstart one after the other; a finished one is not run again."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import fingerprint, write_json


@dataclass(frozen=True)
class Stage:
    """One command, as a user would type it. after: the stages whose results it reads; outputs: what it must leave."""

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A finished stage. seconds: wall clock. peak_gib: resident memory of its largest process. key: what was run."""

    name: str
    command: str
    seconds: float
    peak_gib: float
    key: str


class Runner:
    """Runs stages in a folder and remembers them in folder/stages/NAME.json."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, **environment}
        self.records: dict[str, Record] = {}

    def run(self, stage: Stage) -> Record:
        """Run a stage unless the same command, after the same stages, has left its outputs before.

        A failing command ends the quickstart with its own exit status, its output just above.
        """
        command = shlex.join(stage.command)
        before = [self.records[name].key for name in stage.after]
        key = fingerprint([command, before])[:16]
        record = self._finished(stage, key)
        if record is None:
            print(f"\n== {stage.name} ==\n$ {command}", flush=True)
            record = self._measure(stage, command, key)
        else:
            print(f"== {stage.name}: done before, {record.seconds:.0f} s ==", flush=True)
        self.records[stage.name] = record
        return record

    def _finished(self, stage: Stage, key: str) -> Record | None:
        file = self.folder / f"{stage.name}.json"
        if not file.is_file() or not all(output.exists() for output in stage.outputs):
            return None
        record = Record(**json.loads(file.read_text(encoding="utf-8")))
        return record if record.key == key else None

    def _measure(self, stage: Stage, command: str, key: str) -> Record:
        (self.folder / f"{stage.name}.json").unlink(missing_ok=True)
        start = time.monotonic()
        arguments = [sys.executable, *stage.command[1:]] if stage.command[0] == "python" else _tool(stage.command)
        process = subprocess.Popen(arguments, env=self.environment)
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # or it would go on alone
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        code = os.waitstatus_to_exitcode(status)
        if code:
            print(f"error: stage {stage.name} failed with exit status {code}: {command}", file=sys.stderr)
            raise SystemExit(code if code > 0 else 1)
        missing = [str(output) for output in stage.outputs if not output.exists()]
        if missing:
            print(f"error: stage {stage.name} did not write {missing[0]}", file=sys.stderr)
            raise SystemExit(1)
        record = Record(stage.name, command, time.monotonic() - start, usage.ru_maxrss / 2**20, key)
        write_json(self.folder / f"{stage.name}.json", asdict(record))
        return record


def _tool(command: tuple[str, ...]) -> list[str]:
    """`accelerate`, `torchrun`: the ones installed beside this python."""
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]
