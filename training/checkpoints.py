"""Checkpoints: written whole or not at all, read back before they get their name, rotated only then.

checkpoints/0000100/
    model.safetensors  the weights            optimizer.pt  AdamW, gradient scaler, open log window (weights_only)
    ema.safetensors    the model file         state.json    step, settings, and size and SHA-256 of the others; written last
"""

import errno
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import WriteError, check_digests, digests, free_space, make_folder, sync, write_error, write_sealed
from common.reporting import say
from common.units import size_text
from config import UserError
from models.model_file import (
    MODEL_FILE,
    STATE,
    STATE_SCHEMA,
    DamagedCheckpoint,
    ModelInfo,
    State,
    read_state,
    save_model,
)
from training.settings import TrainConfig

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"
FILES = (WEIGHTS, MODEL_FILE, OPTIMIZER, STATE)
_TEMPORARY, _DELETED = ".writing-", ".deleting-"


@dataclass
class TrainingState:
    """Everything a run needs to continue.

    Attributes:
        model, ema: state dicts.
        optimizer: AdamW's state dict.
        scaler: GradScaler's state dict, or {}.
        window: (world, K) float64, the open log window of each rank.
        settings: of the run, for people.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    window: Tensor
    settings: dict[str, Any]


def save_and_rotate(
    folder: Path, state: TrainingState, info: ModelInfo, class_means: Tensor | None, settings: TrainConfig, before: int
) -> bool:
    """Save, then delete the checkpoints that need not be kept; returns whether the checkpoint is on the disk.

    Args:
        folder: of all checkpoints of the run.
        state: what resuming needs.
        info: header of the model file.
        class_means: (classes, E), stored in the model file.
        settings: which checkpoints are kept, and what a failing disk means.
        before: step of the newest intact checkpoint until now.

    Raises:
        UserError: the disk fails, and --on-save-error stop was given or it was the last save of the run.
    """
    try:
        save(folder, state, info, class_means)
        rotate(folder, settings.keep_last, settings.keep_every, state.step, before)
    except (OSError, DamagedCheckpoint) as error:
        if settings.on_save_error == "stop" or state.step >= settings.max_train_steps:
            raise UserError(f"step {state.step} could not be saved: {error}") from error
        say(f"step {state.step} could not be saved, training goes on: {error}")
        return False
    return True


def save(folder: Path, state: TrainingState, info: ModelInfo, class_means: Tensor | None = None) -> Path:
    """Write folder/0000100 for step 100: into a hidden folder, fsync, re-read, rename.

    Args:
        folder: of all checkpoints of the run.
        state: what resuming needs.
        info: header of the model file.
        class_means: (classes, E), stored in the model file.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk fails.
        DamagedCheckpoint: what was written does not read back. Either way earlier checkpoints are untouched and nothing
            half-written has a valid name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"{state.step:07d}"
    temporary = folder / (_TEMPORARY + final.name)
    make_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file({key: t.detach().contiguous().cpu() for key, t in state.model.items()}, temporary / WEIGHTS)
        save_model(temporary / MODEL_FILE, state.ema, info, class_means)
        rest = {"optimizer": state.optimizer, "scaler": state.scaler, "window": state.window.cpu()}
        torch.save(rest, temporary / OPTIMIZER)
        for file in (WEIGHTS, MODEL_FILE, OPTIMIZER):
            sync(temporary / file)
        files = digests(temporary, (WEIGHTS, MODEL_FILE, OPTIMIZER))
        content = {"schema": STATE_SCHEMA, "step": state.step, "files": files, "settings": state.settings}
        write_sealed(temporary / STATE, content)
        verify(temporary)
        _publish(temporary, final)
    except OSError as error:
        raise write_error(final, error) from error
    except (RuntimeError, SafetensorError) as error:  # the writers wrap the operating system's error, or hide it
        free = size_text(free_space(folder))
        raise OSError(f"{final} cannot be written: {str(error).splitlines()[0]} ({free} free on its disk)") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name."""
    if final.is_symlink() or final.exists():  # a damaged one of the same step: resume fell back to the one before
        if foreign := _foreign(final):
            raise WriteError(f"{final} {foreign}: move it away")
        _delete(final)
    temporary.rename(final)
    sync(final.parent)


def verify(checkpoint: Path) -> State:
    """Read every byte and compare with state.json; returns its content.

    Raises:
        DamagedCheckpoint: the message names the first file at fault.
        UserError: the checkpoint is of a later version of this code.
    """
    state = read_state(checkpoint)
    try:
        if checkpoint.name.isdigit() and state.step != int(checkpoint.name):
            raise UserError(f"{checkpoint / STATE} says step {state.step}")
        for file in {WEIGHTS, MODEL_FILE, OPTIMIZER} - state.files.keys():
            raise UserError(f"{checkpoint / STATE} says nothing of {file}")
        check_digests(checkpoint, {name: asdict(record) for name, record in state.files.items()})
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{checkpoint} cannot be read ({error.strerror or error})") from error
    return state


def load(checkpoint: Path, *, mapped: bool = True) -> TrainingState:
    """Verify a checkpoint and map its files: what is read of a tensor stays in the page cache, which all ranks share.

    Args:
        checkpoint: its folder.
        mapped: otherwise the optimiser's state is read into memory.

    Raises as `verify` does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = verify(checkpoint)
    try:
        rest = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True, mmap=mapped)
        ema = load_file(checkpoint / MODEL_FILE)
        ema.pop("class_means", None)
        return TrainingState(
            state.step,
            load_file(checkpoint / WEIGHTS),
            ema,
            rest["optimizer"],
            rest["scaler"],
            rest["window"],
            state.settings,
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, KeyError, EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint} cannot be read: {str(error).splitlines()[0]}") from error


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint of a run, None if it has none at all. Clears what a killed save left behind.

    A damaged one is skipped with a warning; one that rotation will leave where it is, is named.

    Raises:
        UserError: every checkpoint is damaged; starting anew then has to be the user's decision.
    """
    for leftover in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_DELETED}*")]:
        _remove_own_files(leftover)
    candidates = by_step(folder).values()
    for checkpoint in candidates:
        if foreign := _foreign(checkpoint):
            warn(f"checkpoint {checkpoint} {foreign}: it is never deleted, and not counted by --keep-last")
    for checkpoint in reversed(candidates):
        try:
            verify(checkpoint)
            return checkpoint
        except DamagedCheckpoint as error:
            warn(f"checkpoint {checkpoint} is damaged and skipped: {error}")
    if candidates:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({len(candidates)} of them); move the folder away to start from step 0"
        )
    return None


def by_step(folder: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by their names, oldest first, intact or not."""
    found = (path for path in folder.glob("[0-9]" * 7 + "*") if path.name.isdecimal() and path.is_dir())
    return {int(path.name): path for path in sorted(found, key=lambda path: int(path.name))}


def rotate(folder: Path, keep_last: int, keep_every: int, saved: int, before: int) -> None:
    """Delete the checkpoints that are superseded; call it after `save` has read the new one back.

    Damaged ones go first. Links, and folders with anything in them that this code did not write, stay.

    Args:
        folder: of all checkpoints of the run.
        keep_last, keep_every: see `superseded`.
        saved: step of the checkpoint that was just saved, which always stays.
        before: step of the newest intact one before it; what is newer was skipped when the run was resumed.
    """
    checkpoints = {step: path for step, path in by_step(folder).items() if not _foreign(path)}
    for step in [step for step in checkpoints if keep_last and step > before and step != saved]:
        try:
            verify(checkpoints[step])
        except DamagedCheckpoint as error:
            say(f"damaged checkpoint {checkpoints[step]} is deleted: {error}")
            _delete(checkpoints.pop(step))
    for step in superseded(list(checkpoints), keep_last, keep_every):
        if step != saved:
            _delete(checkpoints[step])


def _foreign(checkpoint: Path) -> str | None:
    """Why a checkpoint is not this code's to delete, None if it is."""
    if checkpoint.is_symlink():
        return "is a link"
    others = sorted({path.name for path in checkpoint.iterdir()} - set(FILES))
    return f"holds {others[0]}, which is not of a checkpoint" if others else None


def superseded(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """Which of the saved steps, oldest first, need not be kept.

    Args:
        steps: with a checkpoint.
        keep_last: how many of the newest stay; 0: all.
        keep_every: its multiples stay too; 0: none.
    """
    older = steps[:-keep_last] if keep_last else ()
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def _delete(checkpoint: Path) -> None:
    """First take the valid name away, so that no half-deleted folder carries it."""
    hidden = checkpoint.with_name(_DELETED + checkpoint.name)
    try:
        checkpoint.rename(hidden)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a folder of another layer of an overlay
            raise
        hidden = checkpoint
    _remove_own_files(hidden)


def _remove_own_files(folder: Path) -> None:
    for file in reversed(FILES):  # without its state it is no checkpoint
        (folder / file).unlink(missing_ok=True)
        (folder / f"{file}.tmp").unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
