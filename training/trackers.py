"""Weights & Biases and TensorBoard: trackers beside metrics.jsonl, imported when they are asked for.

Their methods log, picture and close may raise errors of any type.
"""

import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

from common.files import write_text
from config import UserError, as_dict
from models.hub import first_line
from training.settings import TrainConfig

WANDB_ID = "wandb-id.txt"
_WITHOUT = "or choose --report-to none (metrics.jsonl has the same numbers)"
_SECONDS = 5.0  # to wait for an answer of the server


def check(report_to: str) -> None:
    """Find out in seconds whether a tracker will work: package, and for wandb network and API key.

    Raises:
        UserError: it will not; the message says what to do.
    """
    if report_to == "wandb":
        _check_wandb()
    elif report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise UserError(f"--report-to tensorboard: {_missing('tensorboard')}") from error


def open_tracker(folder: Path, settings: TrainConfig, start_step: int) -> "Wandb | TensorBoard | None":
    """Open the tracker that --report-to asks for; None for "none".

    Args:
        folder: of the run.
        settings: shown as the run's config.
        start_step: step at which the run starts or resumes.

    Raises:
        UserError: it refuses to start, for whatever reason.
    """
    name, offline = settings.report_to, "set WANDB_MODE=offline, " * (settings.report_to == "wandb")
    try:
        if name == "wandb":
            return Wandb(folder, settings)
        return TensorBoard(folder, start_step) if name == "tensorboard" else None
    except Exception as error:
        raise UserError(f"--report-to {name}: {_cause(error)}: {offline}{_WITHOUT}") from error


class Wandb:
    """A wandb run that keeps its id over resumes.

    `step` is the x axis of all curves: wandb's own step only grows, and lines of a run that resumed from a checkpoint older
    than its last line would be lost.
    """

    def __init__(self, folder: Path, settings: TrainConfig) -> None:
        import wandb

        file = folder / WANDB_ID
        if not file.is_file() or not file.read_text(encoding="utf-8").strip():  # empty after a full disk
            write_text(file, secrets.token_hex(4))
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.exp_name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=folder,
            config=as_dict(settings),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def picture(self, step: int, file: Path) -> None:
        import wandb

        self._run.log({"preview": wandb.Image(str(file)), "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run folder. What was written after start_step is purged."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        self._board.add_image("preview", np.asarray(Image.open(file)), step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


def _check_wandb() -> None:
    try:
        import wandb

        settings = wandb.setup().settings  # WANDB_MODE, `wandb offline`, settings files
    except (ImportError, AttributeError) as error:  # a folder "wandb" of earlier runs is importable, too, but empty
        raise UserError(f"--report-to wandb: {_missing('wandb')}") from error
    if settings.mode != "online":
        return
    server = urlparse(settings.base_url)
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            socket.create_connection((server.hostname, server.port or 443), timeout=_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"--report-to wandb: {server.hostname} cannot be reached: set WANDB_MODE=offline and upload later with "
                f"`wandb sync`, {_WITHOUT}"
            ) from error
    # before wandb asks for a key at the terminal, where other ranks would wait
    if not _has_credentials(settings.api_key, settings.base_url):
        raise UserError(
            "--report-to wandb: no API key: run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline, "
            f"{_WITHOUT}"
        )
    try:
        wandb.login(verify=True)
    except Exception as error:  # of wandb, of the network
        raise UserError(
            f"--report-to wandb: {_cause(error)}: run `wandb login --relogin`, set WANDB_MODE=offline, {_WITHOUT}"
        ) from error


def _has_credentials(api_key: str | None, base_url: str) -> bool:
    from requests.utils import get_netrc_auth

    known = api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(known or get_netrc_auth(base_url))


def _missing(package: str) -> str:
    return f"the package {package} is not installed: pip install {package}, {_WITHOUT}"


def _cause(error: Exception) -> str:
    return first_line(error).rstrip(".")
