"""What a run says about itself: a window of sums on the device, metrics.jsonl, wandb or TensorBoard."""

import json
import resource
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from training.folder import replace_text
from training.step import StepResult

METRICS, WANDB_ID = "metrics.jsonl", "wandb-id.txt"
QUARTILES = 4
TERMS = ("velocity", "class_velocity", "alignment")
# window layout: for each quartile of t: count and sum of each term; then steps, sum of gradient norms, skipped steps, and
# of the first step that was not finite: step number + 1, position in the global batch + 1, term + 1, parameter + 1
_SUMS = QUARTILES * (1 + len(TERMS))
WINDOW = _SUMS + 3 + 4


class Window:
    """Sums over the steps since the last log line, kept on the device; nothing waits for the device but `totals`."""

    def __init__(self, device: torch.device, values: Tensor | None = None) -> None:
        self.values = torch.zeros(WINDOW, dtype=torch.float64, device=device)
        if values is not None:
            self.values.copy_(values)

    def add(self, step: int, result: StepResult, positions: Tensor) -> None:
        """Add step number `step`. positions: (N,) of the samples in result.terms."""
        terms = torch.stack([result.terms.velocity, result.terms.class_velocity, result.terms.alignment], dim=1).double()
        quartile = (result.terms.t * QUARTILES).long().clamp(0, QUARTILES - 1)
        one_hot = (quartile[:, None] == torch.arange(QUARTILES, device=quartile.device)).double()  # (N, 4)
        finite = terms.isfinite()
        rows = torch.cat([torch.ones_like(terms[:, :1]), terms.where(finite, 0.0)], dim=1)  # (N, 1 + 3)
        sums = (one_hot.T @ rows).flatten()
        norm_finite = result.grad_norm.isfinite()
        bad = ~finite.all(dim=1)
        # the first sample and term at fault, 0 if none; argmax gives the first maximum; a tensor of no dimension would be
        # read back to serve as an index, a vector of one number is not
        first = bad.int().argmax().view(1)
        sample = bad.any() * (positions[first].squeeze(0) + 1)
        term = bad.any() * ((~finite[first]).int().argmax() + 1)
        parameter = ~norm_finite * ((~result.gradient_norms.isfinite()).int().argmax() + 1)
        wrong = bad.any() | ~norm_finite
        fault = torch.stack([wrong * (step + 1), sample, term, parameter]).double()
        self.values[:_SUMS] += sums
        norm = result.grad_norm.double().where(norm_finite, 0.0)
        self.values[_SUMS : _SUMS + 3] += torch.stack([torch.ones_like(norm), norm, (~norm_finite).double()])
        self.values[_SUMS + 3 :] = torch.where(self.values[_SUMS + 3] > 0, self.values[_SUMS + 3 :], fault)

    def clear(self) -> None:
        self.values.zero_()


def merge_windows(rows: Tensor) -> Tensor:
    """Windows of all processes (world, WINDOW) => one that stands for all of them: sums of the loss terms are added, what
    every process counts alike is taken once."""
    merged = rows[0].clone()
    merged[:_SUMS] = rows[:, :_SUMS].sum(0)
    return merged


class Fault(NamedTuple):
    """The first thing that was not finite. step: number of the step, from 0. rank: process. position: of the sample in
    the global batch, term: which loss term; both None if the losses were finite. parameter: number, None if its gradient
    was finite."""

    step: int
    rank: int
    position: int | None
    term: str | None
    parameter: int | None


def first_fault(rows: Tensor) -> Fault | None:
    """Window sums of all processes (world, WINDOW) => the earliest fault, of the first process that saw a bad sample."""
    found = []
    for rank, row in enumerate(rows[:, _SUMS + 3 :].long().tolist()):
        step, position, term, parameter = row
        if step:
            found.append(Fault(step - 1, rank, position - 1 if position else None, TERMS[term - 1] if term else None,
                               parameter - 1 if parameter else None))  # fmt: skip
    return min(found, key=lambda f: (f.step, f.position is None, f.rank), default=None)


def averages(rows: Tensor, objective: Any) -> dict[str, float]:
    """Window sums of all processes (world, WINDOW) => the values of a log line: unweighted terms, their total, and the
    velocity by quartile of t. Every process counts the same gradient, so its sums are those of the first."""
    sums = rows[:, :_SUMS].sum(0).view(QUARTILES, 1 + len(TERMS)).cpu()
    count = sums[:, 0].sum()
    means = sums[:, 1:].sum(0) / count
    velocity, class_velocity, alignment = means.tolist()
    steps, norm, skipped = rows[0, _SUMS : _SUMS + 3].tolist()
    values = {
        "loss": velocity + objective.class_coeff * class_velocity + objective.proj_coeff * alignment,
        "velocity": velocity, "class_velocity": class_velocity, "alignment": alignment,
        "grad_norm": norm / max(steps - skipped, 1), "skipped_steps": int(skipped),
    }  # fmt: skip
    for q in range(QUARTILES):
        for k, term in enumerate(TERMS):
            values[f"{term}_t{q + 1}"] = (sums[q, 1 + k] / sums[q, 0]).item() if sums[q, 0] else None
    return values


class Tracker:
    """Writes metrics.jsonl and, if asked to, wandb or TensorBoard; of the main process only.

    A line is {"step": 100, ...}. On resuming, lines after the checkpoint's step are cut off, so steps never go backwards.
    """

    def __init__(self, folder: Path, report_to: str, project: str, settings: Mapping[str, Any], start_step: int) -> None:
        self.path = folder / METRICS
        self._cut(start_step)
        self._stream = self.path.open("a")
        self._wandb = self._board = None
        self._told = False
        if report_to == "wandb":
            import wandb

            identity = folder / WANDB_ID
            if not identity.is_file():
                identity.write_text(secrets.token_hex(4))
            self._wandb = wandb.init(
                project=project, name=settings["exp_name"], id=identity.read_text().strip(), resume="allow",
                dir=folder, config=dict(settings),
            )  # fmt: skip
        elif report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line. A full disk is told once and does not end the run."""
        try:
            self._write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            if not self._told:
                tqdm.write(f"{self.path} could not be written, training goes on: {error}")
            self._told = True
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def _write(self, line: str) -> None:
        self._stream.write(line)
        self._stream.flush()

    def picture(self, step: int, file: Path) -> None:
        """Show a PNG in the tracker."""
        if self._wandb:
            import wandb

            self._wandb.log({"preview": wandb.Image(str(file))}, step=step)
        if self._board:
            import numpy as np
            from PIL import Image

            self._board.add_image("preview", np.asarray(Image.open(file)), step, dataformats="HWC")

    def close(self) -> None:
        self._stream.close()
        if self._wandb:
            self._wandb.finish()
        if self._board:
            self._board.close()

    def _cut(self, start_step: int) -> None:
        """Drop lines after start_step and a line torn by a kill."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        replace_text(self.path, "".join(line + "\n" for line in kept))


def peak_memory(device: torch.device) -> float:
    """GiB: of the device if it is a GPU, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
