"""The run folder: who may write in it, and which settings it was started with."""

import fcntl
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from config import UserError, differences

CONFIG, LOCK = "config.json", "run.lock"
# Settings that do not change what is learned; every other one is part of the run's identity.
FREE = frozenset(
    {
        "data_dir",
        "output_dir",
        "exp_name",
        "vae",
        "max_train_steps",
        "gradient_accumulation_steps",
        "num_workers",
        "compile",
        "gradient_checkpointing",
        "allow_tf32",
        "report_to",
        "wandb_project",
        "log_every",
        "sampling_steps",
        "preview_steps",
        "preview_scale",
        "checkpointing_steps",
        "keep_last",
        "keep_every",
        "on_save_error",
        "on_nonfinite",
        "max_hours",
        "requeue_command",
        "eval_every",
        "eval_samples",
        "eval_reference",
        "eval_features",
        "dry_run",
        "accept_changes",
        "assume",
        "gpu",
    }
)


class RunLock:
    """An flock on run.lock: the kernel frees it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError naming the holder if another run has the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] = (folder / LOCK).open("a+")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.seek(0)
            holder = self._stream.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait for it, or choose another --exp-name") from error
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def record_settings(
    folder: Path, settings: dict[str, Any], facts: dict[str, Any], *, accept_changes: bool
) -> list[str]:
    """Write config.json, after comparing with what the run was started with.

    settings: TrainConfig as a dict. facts: what was derived: the network's config and the dataset's identity. Returns what
    was changed, in words. Raises UserError that lists the differences, unless `accept_changes`; another network is never
    accepted.
    """
    path = folder / CONFIG
    changes: list[str] = []
    if path.is_file():
        try:
            former = json.loads(path.read_text())
            former_settings, former_facts = former["settings"], former["facts"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it or choose another --exp-name") from error
        changes = [
            f"--{key.replace('_', '-')}: {was} before, {value} now"
            for key, was, value in differences(former_settings, settings)
            if key not in FREE
        ]
        network = former_facts["network"] != json.loads(json.dumps(facts["network"]))
        changes += [
            f"{key}: {former_facts.get(key)} before, {value} now"
            for key, value in facts.items()
            if former_facts.get(key) != json.loads(json.dumps(value)) and key != "network"
        ]
        if network and not changes:
            changes = ["the network"]
        if changes and (network or not accept_changes):
            mend = (
                "choose another --exp-name"
                if network
                else "repeat the former values, choose another --exp-name, or "
                "continue with the new ones by --accept-changes"
            )
            raise UserError(f"{folder} was started with other settings ({'; '.join(changes)}): {mend}")
    replace_text(path, json.dumps({"settings": settings, "facts": facts}, indent=1))
    return changes


def identity(content: Any) -> str:
    """A short name for JSON content: the first hex digits of its SHA-256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whole, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
