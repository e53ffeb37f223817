"""Everything that a training run consists of, built once, and what the loop in train.py asks of it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.presets import GUIDANCE_HIGH
from common.reporting import progress, say
from config import UserError, as_dict
from dataset import PackedDataset, StepSampler, read_ahead
from models.acceleration import allow_tf32, compile_encoder, compile_network
from models.autoencoder import Autoencoder, load_autoencoder
from models.class_token import nearest_class
from models.cost import cost
from models.ema import EMA
from models.guidance import Guidance
from models.model_file import ModelInfo, blank_network
from models.sit import SiT
from packed.format import read_manifest
from training import previews, state, trackers
from training.evaluation import FrechetProbe
from training.folder import RunLock, identity, record_settings
from training.health import check_weights, describe
from training.interrupt import EXIT_STATUS, Interrupt
from training.launch import Processes, check_launcher
from training.plan import make_plan
from training.report import start_text
from training.step import TrainStep, to_device
from training.tracking import Tracker, Window, averages, first_fault, merge_windows, peak_memory

PREVIEWS = 16


class Runner:
    """Everything of one run. Use as a context manager: it takes the folder's lock and gives it back."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir) / settings.exp_name
        check_launcher(settings.gradient_accumulation_steps)
        self.processes = Processes(settings.mixed_precision)
        self.processes.on_main(lambda: trackers.check(settings.report_to))
        self.device = self.processes.device
        self.plan = make_plan(settings, read_manifest(settings.data_dir))
        self.dataset = PackedDataset(settings.data_dir, self.plan.fields)
        self.sampler = StepSampler(
            len(self.dataset),
            settings.batch_size,
            seed=settings.seed,
            rank=self.processes.rank,
            world=self.processes.world,
            micro=settings.gradient_accumulation_steps,
        )
        self.autoencoder: Autoencoder | None = None
        self._load_autoencoder()
        self._open = ExitStack()  # what is to be closed at the end, however it comes
        try:
            self._build()
        except BaseException:
            self._open.__exit__(*sys.exc_info())
            raise

    def _build(self) -> None:
        settings, plan, processes = self.settings, self.plan, self.processes
        processes.on_main(self._claim)
        if processes.is_main:
            say(start_text(settings, plan, processes, self.folder))
        allow_tf32(settings.allow_tf32)
        torch.manual_seed(settings.seed)
        self.network = SiT(plan.network)
        self.network.gradient_checkpointing = settings.gradient_checkpointing
        self.ema = EMA(self.network, blank_network(plan.network), settings.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type) if processes.precision == "fp16" else None
        self.window = Window(self.device)
        self.step = self.saved_step = self._resume()  # optimiser steps taken, and how many of them are on disk
        if settings.compile:
            compile_network(self.network)
            for encoder in plan.online:
                compile_encoder(encoder)
        self.train_step = TrainStep(
            self.network,
            plan.objective,
            self.optimizer,
            self.ema,
            plan.normalization,
            seed=settings.seed,
            wrapped=processes.wrap(self.network),
            no_sync=processes.no_sync,
            encoders=[encoder.to(self.device) for encoder in plan.online],
            precision=processes.precision,
            scaler=self.scaler,
            max_grad_norm=settings.max_grad_norm,
        )
        self.positions = [
            torch.from_numpy(self.sampler.positions(m)).to(self.device)
            for m in range(settings.gradient_accumulation_steps)
        ]
        self.sampler.start_step = self.step
        self.batches = self._open.enter_context(
            closing(
                read_ahead(
                    self.dataset, self.sampler, threads=settings.num_workers, pin_memory=self.device.type == "cuda"
                )
            )
        )
        self.tracker = processes.on_main(self._track)
        self.bar = self._open.enter_context(
            progress(
                settings.max_train_steps,
                unit="step",
                description="training",
                initial=self.step,
                shown=processes.is_main,
            )
        )
        self.interrupt = self._open.enter_context(Interrupt(processes.world, settings.max_hours))
        self._flops = cost(plan.network).train_flops if self.device.type == "cuda" else None
        self._last: dict[str, Any] = {}  # of the newest log line
        self._start = time.monotonic()
        self._restart_clock()

    # ------------------------------------------------------------------------------------------------------ the loop

    def advance(self) -> None:
        """Take one optimiser step."""
        begin = time.monotonic()
        batches = [(to_device(next(self.batches), self.device), p) for p in self.positions]
        self._waited += time.monotonic() - begin
        result = self.train_step(self.step, batches)
        self.window.add(self.step, result, torch.cat(self.positions))
        self.step += 1
        self._timed_steps += 1
        self.bar.update()

    def log(self, **more: float) -> None:
        """One line of averages since the last one, and `more`. Only this and a save wait for the device."""
        rows = self.processes.gather(self.window.values).cpu()  # (world, WINDOW)
        self._judge(rows)
        seconds = time.monotonic() - self._clock - self._paused
        rate = self._timed_steps * self.settings.batch_size / seconds
        values = averages(rows, self.plan.objective)
        values |= {
            **more,
            "lr": self.settings.learning_rate,
            "ema_distance": float(self.ema.distance(self.network)),
            "images_per_second": rate,
            "data_wait": self._waited / seconds,
            "mfu": self.processes.utilization(rate * self._flops) if self._flops else None,
            "peak_memory_gib": peak_memory(self.device),
            "hours_left": (self.settings.max_train_steps - self.step) * self.settings.batch_size / rate / 3600,
        }
        if self.scaler is not None:
            values["loss_scale"] = self.scaler.get_scale()
        if self.tracker:
            self.tracker.log(self.step, values)
            self._last = values
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", images=f"{rate:.0f}/s", refresh=False)
        self.window.clear()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._paused, self._waited, self._timed_steps = time.monotonic(), 0.0, 0.0, 0

    def save(self) -> None:
        """Write a checkpoint and rotate the older ones, unless this step is on disk already."""
        if self.saved_step == self.step:
            return
        with self._pause():
            rows = self.processes.gather(self.window.values).cpu()
            self._judge(rows)
            check_weights(self.processes, self.network, self.ema, self.step)
            content = self._content(rows)
            if self.processes.share(self.processes.on_main(lambda: self._write(content))):
                self.saved_step = self.step

    def _content(self, rows: Tensor) -> state.TrainingState:
        """What is to be written."""
        return state.TrainingState(
            self.step,
            self.network.state_dict(),
            self.ema.average.state_dict(),
            self.optimizer.state_dict(),
            {} if self.scaler is None else self.scaler.state_dict(),
            rows,
            as_dict(self.settings),
        )

    def _write(self, content: state.TrainingState) -> bool:
        """True if the checkpoint is on the disk. Raises UserError where a failing disk is to stop the run."""
        try:
            state.save(self.folder / "checkpoints", content, self._model_info(), self._class_means())
            state.rotate(self.folder / "checkpoints", self.settings.keep_last, self.settings.keep_every)
        except (OSError, state.DamagedCheckpoint) as error:
            if self.settings.on_save_error == "stop" or self.step >= self.settings.max_train_steps:
                raise UserError(f"step {self.step} could not be saved: {error}") from error
            say(f"step {self.step} could not be saved, training goes on: {error}")
            return False
        return True

    def preview(self) -> None:
        """Write previews/step_0000100.png from the EMA, in the main process."""
        with self._pause():
            if self.processes.is_main:
                self._draw(self.ema.average, self.folder / "previews" / f"step_{self.step:07d}.png")

    def evaluate(self) -> dict[str, float]:
        """The Frechet distance of samples of the EMA."""
        with self._pause():
            distance = self.probe.measure(
                self.ema.average,
                self.plan.objective.interpolant,
                seed=self.settings.seed,
                steps=self.settings.preview_steps,
            )
        return {"fd": distance, "fd_samples": self.settings.eval_samples}

    def _draw(self, network: SiT, file: Path) -> None:
        labels = previews.preview_labels(self.plan.network.num_classes, PREVIEWS).to(self.device)
        guidance = Guidance(self.settings.preview_scale, high=GUIDANCE_HIGH)
        steps = self.settings.preview_steps
        with progress(steps, unit="step", description=f"preview of step {self.step}") as bar:
            sampled = previews.sample(
                network,
                self.plan.objective.interpolant,
                labels,
                torch.arange(PREVIEWS, device=self.device),
                seed=self.settings.seed,
                steps=steps,
                guidance=guidance,
                progress=lambda done: bar.update(),
            )
        means, nearest = self._class_means(), None
        if means is not None and sampled.class_token is not None:
            nearest = nearest_class(sampled.class_token, means)
        try:
            pixels = previews.decode(self.autoencoder, sampled.latent)
            previews.save_grid(file, pixels, labels, self.plan.manifest.classes, nearest)
            self.tracker.picture(self.step, file)
        except OSError as error:
            say(f"preview {file} could not be written: {error}")

    # ------------------------------------------------------------------------------------------------- beginning and end

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def conclude(self, reason: str | None) -> int:
        """After the run is closed: say how it ended, requeue if asked to; returns the exit status."""
        if self.processes.is_main:
            hours = (time.monotonic() - self._start) / 3600
            ended = f"stopped by {reason}, the same command resumes" if reason else "done"
            say(f"step {self.step} of {self.settings.max_train_steps}: {ended}; {hours:.2f} hours, {self.folder}")
            shown = ("loss", "velocity", "class_velocity", "alignment", "fd", "images_per_second", "peak_memory_gib")
            if self._last:
                say("  " + ", ".join(f"{name} {self._last[name]:.4g}" for name in shown if name in self._last))
            if reason == "SIGUSR1" and self.settings.requeue_command:
                subprocess.run(self.settings.requeue_command, shell=True, check=False)
        return EXIT_STATUS[reason] if reason and self.step < self.settings.max_train_steps else 0

    def _claim(self) -> None:
        """Lock the folder and compare the settings with those it was started with."""
        self._open.enter_context(closing(RunLock(self.folder)))
        manifest = self.plan.manifest
        facts = {
            "network": asdict(self.plan.network),
            "encoders": list(self.plan.encoders),
            "images": manifest.count,
            "classes": manifest.classes,
            "packed_vae": manifest.vae["name"],
            "data": identity(manifest.shards),
        }
        for change in record_settings(
            self.folder, as_dict(self.settings), facts, accept_changes=self.settings.accept_changes
        ):
            say(f"continuing with another setting: {change}")

    def _track(self) -> Tracker:
        settings = self.settings
        tracker = Tracker(self.folder, settings.report_to, settings.wandb_project, as_dict(settings), self.step)
        return self._open.enter_context(closing(tracker))

    def _adam(self) -> dict[str, Any]:
        s = self.settings
        return {
            "lr": s.learning_rate,
            "betas": (s.adam_beta1, s.adam_beta2),
            "weight_decay": s.adam_weight_decay,
            "eps": s.adam_epsilon,
        }

    def _resume(self) -> int:
        """Place the networks, make the optimiser, and load the newest intact checkpoint; returns its step, 0 without one."""
        folder = self.folder / "checkpoints"
        found = self.processes.share(self.processes.on_main(lambda: state.newest(folder, say)))
        loaded = None if found is None else state.load(found)
        if loaded is not None:
            self.network.load_state_dict(loaded.model)
            self.ema.average.load_state_dict(loaded.ema)
        for network in (self.network, self.ema.average):
            network.to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **self._adam(), fused=True)
        if loaded is None:
            return 0
        self.optimizer.load_state_dict(loaded.optimizer)
        for group in self.optimizer.param_groups:
            group.update(self._adam())  # changed ones count from here on (--accept-changes)
        if self.scaler is not None and loaded.scaler:
            self.scaler.load_state_dict(loaded.scaler)
        if len(loaded.window) == self.processes.world:
            self.window.values.copy_(loaded.window[self.processes.rank])
        elif self.processes.is_main:  # another number of processes: the main one carries on all their sums
            self.window.values.copy_(merge_windows(loaded.window))
        if self.processes.is_main:
            say(f"resuming from {found} at step {loaded.step} of {self.settings.max_train_steps}")
        return loaded.step

    def _load_autoencoder(self) -> None:
        """The VAE for previews and evaluation, at the start of the run: a missing one is told now and not after hours."""
        settings = self.settings
        load = lambda: load_autoencoder(self.plan.vae).to(self.device)  # noqa: E731
        if settings.eval_every:
            self.autoencoder = load()
            self.probe = FrechetProbe(
                self.processes,
                self.autoencoder,
                reference=settings.eval_reference,
                space=settings.eval_features,
                count=settings.eval_samples,
                resolution=self.plan.manifest.resolution,
            )
        elif settings.sampling_steps:
            self.autoencoder = self.processes.on_main(load)

    def _model_info(self) -> ModelInfo:
        plan = self.plan
        return ModelInfo(
            network=plan.network,
            path=plan.objective.interpolant.path,
            resolution=plan.manifest.resolution,
            vae=plan.vae,
            normalization=asdict(plan.normalization),
            encoders=plan.encoders,
            cfg_prob=plan.objective.cfg_prob,
            step=self.step,
            classes=tuple(plan.manifest.classes),
            notes={"seed": self.settings.seed},
        )

    def _class_means(self) -> Tensor | None:
        """(classes, E) mean class tokens of the dataset, for a network that makes class tokens of the same encoder."""
        file = self.plan.manifest.class_means
        if file is None or not self.plan.network.class_token_dim or self.plan.cached[:1] != (0,):
            return None
        return torch.from_numpy(np.load(self.dataset.directory / file, allow_pickle=False)).float()

    def _judge(self, rows: Tensor) -> None:
        """Stop at losses and gradients that were not finite, or tell of them, as --on-nonfinite says."""
        fault = first_fault(rows)
        if fault is None or (fault.position is None and self.scaler is not None and self.scaler.get_scale() >= 1):
            return  # fp16 skips steps while its loss scale is too high; that is how it finds the right one
        names = [name for name, p in self.network.named_parameters() if p.requires_grad]
        text = describe(fault, self.dataset, self.settings.batch_size, self.settings.seed, names)
        if self.settings.on_nonfinite == "stop":
            raise UserError(f"{text}; the weights took no part (--on-nonfinite skip leaves such steps out)")
        if self.processes.is_main:
            say(f"left out: {text}")

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """What is done inside does not count in the speed."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin
