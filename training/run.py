"""A training run as the loop in train.py sees it: one method for each thing that happens between steps."""

import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import on_first, share
from common.reporting import say
from config import as_dict
from dataset import Batch, PackedDataset
from models.autoencoder import Autoencoder
from models.cost import cost
from models.hub import first_line
from training import checkpoints, previews
from training.health import check_weights, check_window
from training.interrupt import EXIT_STATUS, Interrupt, Stopped
from training.launch import Processes, gather_row
from training.plan import Plan
from training.probe import FrechetProbe
from training.schedule import learning_rate
from training.settings import TrainConfig
from training.step import TrainStep
from training.tracking import Stopwatch, Tracker, Window, averages, peak_memory

SUMMARY = (
    "loss",
    "velocity",
    "class_velocity",
    "alignment",
    "fd",
    "nearer_to_training",
    "images_per_second",
    "peak_memory_gib",
)


@dataclass
class Run:
    """The parts of a run, made by training/setup.py.

    Attributes:
        batches: micro-batches of this rank, in order, on the device.
        positions: (n,) int64 on the device for each micro-batch of a step: where its records are in the global batch.
        step: optimiser steps taken.
        saved_step: how many of them are in the newest checkpoint.
        tracker: on rank 0 alone.
        autoencoder: for previews and the probe, on the ranks that need it.
        probe: where --eval-every asks for it.
        class_means: (classes, E) of the dataset, for the model file and the captions of previews.
    """

    settings: TrainConfig
    folder: Path
    processes: Processes
    plan: Plan
    dataset: PackedDataset
    train_step: TrainStep
    window: Window
    batches: Iterator[Batch]
    positions: list[Tensor]
    step: int
    saved_step: int
    tracker: Tracker | None
    bar: tqdm
    interrupt: Interrupt
    autoencoder: Autoencoder | None
    probe: FrechetProbe | None
    class_means: Tensor | None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    started: float = field(default_factory=time.monotonic)
    last: dict[str, float | None] = field(default_factory=dict)  # values of the newest log line

    def advance(self) -> None:
        """Take one optimiser step."""
        with self.stopwatch.step():
            batches = [(next(self.batches), p) for p in self.positions]
        result = self.train_step(self.step, batches)
        self.window.add(self.step, result, torch.cat(self.positions))
        self.step += 1
        self.bar.update()

    def due(self, every: int) -> bool:
        """True after the last step and at multiples of `every`; never where `every` is 0."""
        return every > 0 and (self.step == self.settings.max_train_steps or self.step % every == 0)

    def log(self) -> None:
        """Write a line of averages since the last one. Only this and a save wait for the device."""
        rows = self._checked_window()
        steps_per_second, data_wait = self.stopwatch.rates()
        rate, device = steps_per_second * self.settings.batch_size, self.processes.device
        used = rate * cost(self.plan.network).train_flops if device.type == "cuda" else 0
        values = averages(rows, self.plan.objective) | {
            "lr": learning_rate(self.settings, self.step - 1),
            "ema_distance": float(self.train_step.ema.distance(self.train_step.network)),
            "images_per_second": rate,
            "data_wait": data_wait,
            "mfu": self.processes.utilization(used),
            "peak_memory_gib": peak_memory(device),
            "hours_left": (self.settings.max_train_steps - self.step) / steps_per_second / 3600,
        }
        if self.train_step.scaler is not None:
            values["loss_scale"] = self.train_step.scaler.get_scale()
        if self.tracker:
            self.tracker.log(self.step, values)
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", images=f"{rate:.0f}/s", refresh=False)
        self.last = values
        self.window.clear()
        self.stopwatch.restart()

    def save(self) -> None:
        """Write a checkpoint and rotate the older ones, unless this step is on disk already."""
        if self.saved_step == self.step:
            return
        with self.stopwatch.pause():
            rows, parts = self._checked_window(), self.train_step
            if self.tracker:
                self.tracker.sync()
            check_weights(parts.network, parts.ema, self.step)
            state = checkpoints.TrainingState(
                self.step,
                parts.network.state_dict(),
                parts.ema.average.state_dict(),
                parts.optimizer.state_dict(),
                {} if parts.scaler is None else parts.scaler.state_dict(),
                rows,
                as_dict(self.settings),
            )
            info = self.plan.model_info(self.step, self.settings.seed)
            write = checkpoints.save_and_rotate
            folder, means = self.folder / "checkpoints", self.class_means
            if share(on_first(lambda: write(folder, state, info, means, self.settings, self.saved_step))):
                self.saved_step = self.step

    def watch(self, *, resumed: bool = False) -> str | None:
        """Draw the preview and measure the Frechet distance where they are due; both give up when a stop is requested.

        Args:
            resumed: the run continues from this step: make what a former start did not come to.

        Returns:
            The reason to stop, or None.
        """
        if resumed and self.step == 0:
            return None
        try:
            with self.stopwatch.pause():
                if self.due(self.settings.sampling_steps):
                    self._preview(resumed)
                    if reason := self.interrupt.requested() or self.interrupt.requested():  # what all ranks know by now
                        return reason
                if self.due(self.settings.eval_every):
                    self._evaluate(resumed)
        except Stopped as stopped:
            return str(stopped)
        return None

    def _preview(self, resumed: bool) -> None:
        """Write previews/step_0000100.png from the EMA, on rank 0."""
        file = self.folder / "previews" / f"step_{self.step:07d}.png"
        if self.tracker is None or self.autoencoder is None or (resumed and file.is_file()):
            return
        try:
            previews.draw(
                file,
                self.train_step.ema.average,
                self.plan,
                self.autoencoder,
                self.class_means,
                self.settings,
                self.processes.precision,
                self.interrupt.noted,
            )
            self.tracker.picture(self.step, file)
        except Stopped:  # the other ranks do not know yet
            pass
        except Exception as error:  # the run does not depend on it
            if not isinstance(error, OSError | torch.OutOfMemoryError):
                traceback.print_exc()  # a bug
            say(f"warning: preview {file} is left out: {first_line(error)}")

    def _evaluate(self, resumed: bool) -> None:
        """Add the Frechet distance of samples of the EMA to the newest line of the log."""
        assert self.probe is not None
        if resumed and not share(self.tracker is not None and self.tracker.lacks(self.step, "fd")):
            return
        found = self.probe.measure(
            self.train_step.ema.average,
            self.plan.objective.interpolant,
            seed=self.settings.seed,
            steps=self.settings.preview_steps,
            precision=self.processes.precision,
            requested=self.interrupt.requested,
        )
        more: dict[str, float] = {"fd": found.distance, "fd_samples": self.settings.eval_samples}
        if found.copying is not None:
            more["nearer_to_training"] = found.copying.share
            if self.tracker and (said := found.copying.warning()):
                say(f"warning: step {self.step}: {said}")
        if self.tracker:
            self.tracker.amend(self.step, more)
        self.last |= more

    def conclude(self, reason: str | None) -> int:
        """Print how the run ended and requeue it if asked to, after it is closed; returns the exit status.

        Args:
            reason: what asked to stop; None after the last step.
        """
        ended = f"stopped by {reason}, the same command resumes" if reason else "done"
        hours = (time.monotonic() - self.started) / 3600
        say(f"step {self.step} of {self.settings.max_train_steps}: {ended}; {hours:.2f} hours, {self.folder}")
        if self.last:
            say("  " + ", ".join(f"{name} {self.last[name]:.4g}" for name in SUMMARY if name in self.last))
        if reason == "SIGUSR1" and self.settings.requeue_command and self.processes.first:
            subprocess.run(self.settings.requeue_command, shell=True, check=False)
        return EXIT_STATUS[reason] if reason and self.step < self.settings.max_train_steps else 0

    def _checked_window(self) -> Tensor:
        """(world, WINDOW): the log windows of all ranks, after a check of what was not finite in them."""
        rows = gather_row(self.window.values)
        check_window(rows, self.train_step, self.dataset, self.settings)
        return rows
