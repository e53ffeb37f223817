"""Training metrics: on-device sums between log lines, metrics.jsonl, and the tracker beside it."""

import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.reporting import say
from models.hub import first_line
from training.folder import replace_text
from training.step import StepResult
from training.trackers import open_tracker

METRICS = "metrics.jsonl"
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
        terms = torch.stack(
            [result.terms.velocity, result.terms.class_velocity, result.terms.alignment], dim=1
        ).double()
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
            found.append(
                Fault(
                    step - 1,
                    rank,
                    position - 1 if position else None,
                    TERMS[term - 1] if term else None,
                    parameter - 1 if parameter else None,
                )
            )
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
        "velocity": velocity,
        "class_velocity": class_velocity,
        "alignment": alignment,
        "grad_norm": norm / max(steps - skipped, 1),
        "skipped_steps": int(skipped),
    }
    for q in range(QUARTILES):
        for k, term in enumerate(TERMS):
            values[f"{term}_t{q + 1}"] = (sums[q, 1 + k] / sums[q, 0]).item() if sums[q, 0] else None
    return values


class Tracker:
    """Writes metrics.jsonl and, if asked to, wandb or TensorBoard; of the main process only.

    A line is {"step": 100, ...}. On resuming, lines after the checkpoint's step are cut off, so steps never go backwards.
    What fails while training (a full disk, a tracker's server) is reported once and does not end the run.
    """

    def __init__(
        self, folder: Path, report_to: str, project: str, settings: Mapping[str, Any], start_step: int
    ) -> None:
        self.path = folder / METRICS
        self._cut(start_step)
        self._stream = self.path.open("a")
        self._reported: set[str] = set()
        self._name = report_to
        self._external = open_tracker(report_to, folder, project, settings, start_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line."""
        try:
            self._write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            self._report(str(self.path), error)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._try(lambda tracker: tracker.log(step, numbers))

    def picture(self, step: int, file: Path) -> None:
        """Show a PNG in the tracker."""
        self._try(lambda tracker: tracker.picture(step, file))

    def close(self) -> None:
        try:
            self._stream.close()  # writes what a full disk did not take before
        except OSError as error:
            self._report(str(self.path), error)
        self._try(lambda tracker: tracker.close())

    def _write(self, line: str) -> None:
        self._stream.write(line)
        self._stream.flush()

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._external is None:
            return
        try:
            action(self._external)
        except Exception as error:  # whatever a tracker raises, the run is worth more
            self._report(self._name, error)

    def _report(self, what: str, error: Exception) -> None:
        """Once for each of the two."""
        if what not in self._reported:
            say(f"warning: {what} could not be written, training goes on: {first_line(error)}")
        self._reported.add(what)

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
