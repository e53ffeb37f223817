"""Training metrics: on-device sums between log lines, metrics.jsonl, and the tracker beside it."""

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.files import sync, write_bytes, write_error
from common.reporting import say
from loss import Objective
from models.hub import first_line
from training.settings import TrainConfig
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
    """Sums over the steps since the last log line, kept on the device without device-to-host synchronisation.

    Attributes:
        values: (WINDOW,) float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(WINDOW, dtype=torch.float64, device=device)

    def add(self, step: int, result: StepResult, positions: Tensor) -> None:
        """Add one optimiser step.

        Args:
            step: its number, from 0.
            result: what the step returned.
            positions: (N,) of the samples in result.terms, in the global batch.
        """
        terms = torch.stack([getattr(result.terms, name) for name in TERMS], dim=1).double()  # (N, 3)
        quartile = (result.terms.t * QUARTILES).long().clamp(0, QUARTILES - 1)
        one_hot = (quartile[:, None] == torch.arange(QUARTILES, device=quartile.device)).double()  # (N, 4)
        finite = terms.isfinite()
        rows = torch.cat([torch.ones_like(terms[:, :1]), terms.where(finite, 0.0)], dim=1)  # (N, 1 + 3)
        sums = (one_hot.T @ rows).flatten()
        norm_finite = result.grad_norm.isfinite()
        bad = ~finite.all(dim=1)
        # the first sample and term at fault, 0 if none; argmax gives the first maximum; a tensor without dimensions would
        # be read back to serve as an index, a vector of one number is not
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
    """Windows of all ranks (world, WINDOW) => one with the sums of all: loss terms are added, what every rank counts alike
    is taken once."""
    merged = rows[0].clone()
    merged[:_SUMS] = rows[:, :_SUMS].sum(0)
    return merged


class Fault(NamedTuple):
    """The first thing that was not finite.

    Attributes:
        step: number of the step, from 0.
        rank: process that saw it.
        position: of the sample in the global batch; None if the losses were finite.
        term: index in TERMS; None if the losses were finite.
        parameter: number; None if all gradients were finite.
    """

    step: int
    rank: int
    position: int | None
    term: int | None
    parameter: int | None


def first_fault(rows: Tensor) -> Fault | None:
    """Windows of all ranks (world, WINDOW) => the earliest fault, of the first rank that saw a bad sample, or None."""
    faults = enumerate(rows[:, _SUMS + 3 :].long().tolist())  # each number is one too large, 0 where there is none
    found = [Fault(step - 1, rank, *(n - 1 if n else None for n in more)) for rank, (step, *more) in faults if step]
    return min(found, key=lambda f: (f.step, f.position is None, f.rank), default=None)


def averages(rows: Tensor, objective: Objective) -> dict[str, float | None]:
    """Windows of all ranks (world, WINDOW) => the values of a log line: unweighted terms, their weighted total, and each
    term by quartile of t (None for a quartile without samples)."""
    sums = rows[:, :_SUMS].sum(0).view(QUARTILES, 1 + len(TERMS)).cpu()
    count = sums[:, 0].sum()
    means = sums[:, 1:].sum(0) / count
    velocity, class_velocity, alignment = means.tolist()  # TERMS
    steps, norm, skipped = rows[0, _SUMS : _SUMS + 3].tolist()  # of the gradient: every rank counts the same
    values: dict[str, float | None] = {
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


class Stopwatch:
    """Time spent on training steps since the last log line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin the next log line."""
        self._begin, self._paused, self._waited, self._steps = time.monotonic(), 0.0, 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside does not count: saving, previews, evaluation."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a step, and what is done inside as waiting for its data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin
        self._steps += 1

    def rates(self) -> tuple[float, float]:
        """Steps per second, and the share of the time that was spent waiting for data."""
        seconds = time.monotonic() - self._begin - self._paused
        return self._steps / seconds, self._waited / seconds


class Tracker:
    """Writes metrics.jsonl and, if asked to, wandb or TensorBoard; on rank 0 only.

    A line is {"step": 100, ...}. On resuming, lines after the checkpoint's step are cut off, so steps never go backwards.
    What fails while training (a full disk, a tracker's server) is reported once and does not end the run.
    """

    def __init__(self, folder: Path, settings: TrainConfig, start_step: int) -> None:
        self.path = folder / METRICS
        self._cut(start_step)
        try:
            self._stream = self.path.open("ab")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._reported: set[str] = set()
        self._name = settings.report_to
        self._external = open_tracker(folder, settings, start_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line."""
        try:
            self._write(_line({"step": step, **values}) + b"\n")
        except OSError as error:
            self._report(str(self.path), error)
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._try(lambda tracker: tracker.log(step, numbers))

    def lacks(self, step: int, name: str) -> bool:
        """Whether the last line is that of this step and has no such value."""
        last = self._last()
        return last.get("step") == step and name not in last

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the last line, which is that of this step."""
        try:
            last = self._last()
            if last.get("step") == step:
                self._write_all([*self._lines()[:-1], _line({**last, **values})])
                former, self._stream = self._stream, self.path.open("ab")
                former.close()
        except OSError as error:
            self._report(str(self.path), error)
        self._try(lambda tracker: tracker.log(step, values))

    def sync(self) -> None:
        """Flush the lines to the disk (fsync): a checkpoint must not outlive the log of its steps."""
        try:
            sync(self.path)
        except OSError as error:
            self._report(str(self.path), error)

    def picture(self, step: int, file: Path) -> None:
        """Show a PNG in the tracker."""
        self._try(lambda tracker: tracker.picture(step, file))

    def close(self) -> None:
        try:
            self._stream.close()  # writes what a full disk did not take before
        except OSError as error:
            self._report(str(self.path), error)
        self._try(lambda tracker: tracker.close())

    def _write(self, line: bytes) -> None:
        self._stream.write(line)
        self._stream.flush()

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._external is None:
            return
        try:
            action(self._external)
        except Exception as error:  # trackers raise errors of any type, and none of them is a reason to stop
            self._report(self._name, error)

    def _report(self, what: str, error: Exception) -> None:
        """Warn once for each of metrics.jsonl and the tracker."""
        if what not in self._reported:
            say(f"warning: {what} could not be written, training goes on: {first_line(error)}")
        self._reported.add(what)

    def _cut(self, start_step: int) -> None:
        """Drop lines after start_step, and what is no line: one torn by a kill, or damaged."""
        if not self.path.is_file():
            return
        kept = []
        for line in self._lines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= start_step:
                    kept.append(line)
        self._write_all(kept)

    def _write_all(self, lines: list[bytes]) -> None:
        write_bytes(self.path, b"".join(line + b"\n" for line in lines))

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines()

    def _last(self) -> dict[str, Any]:
        with suppress(IndexError, ValueError):  # no line yet, or a full disk took a part of it
            return json.loads(self._lines()[-1])
        return {}


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode()


def peak_memory(device: torch.device) -> float:
    """GiB: of the device if it is a GPU, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
