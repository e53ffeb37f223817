"""A sampling job: settings with everything loaded, and all that its samples depend on."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from common.provenance import weights_sha256
from config import UserError, identity
from models import acceleration
from models.autoencoder import Autoencoder
from models.class_token import between, nearest_class
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.model_file import Model
from models.solvers import Progress
from sampling.labels import Labels, read_labels
from sampling.loading import decided_dtype, load_decoder, load_guided, prepare
from sampling.sampler import Drawn, Sampler, guidance_of, solver_of
from sampling.settings import SampleConfig, resolved
from sampling.tokens import read_tokens

# Images x steps of a job: XL/2 saves .4 ms each on an H200, where the first compiled step of training takes 34 s.
COMPILED_FROM = 50_000


@dataclass
class Job:
    """What `load` makes of the settings.

    settings: all decided. guide: for autoguidance. tokens: (K, D) of --like. left_unguided: the settings left guidance to
    the model, which has no null class.
    """

    settings: SampleConfig
    process: Processes
    model: Model
    guide: Model | None
    sampler: Sampler
    autoencoder: Autoencoder
    labels: Labels
    tokens: Tensor | None
    left_unguided: bool

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the samples depend on, as JSON: two jobs with the same identity make the same samples."""
        settings = self.settings
        plain = identity(settings)
        plain["steps"] = plain.pop("num_steps")
        tokens_given = label_values = None
        if self.tokens is not None:
            digest = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
            tokens_given = {"sources": list(settings.like), "sha256": digest}
        if self.labels.kind in ("list", "spread") or settings.classes:
            label_values = hashlib.sha256(self.labels.values.tobytes()).hexdigest()
        return {
            "checkpoint_sha256": self.model.sha256,
            "guide_sha256": self.guide.sha256 if self.guide else None,
            "step": self.model.info.step,
            **plain,
            "labels": self.labels.kind,
            "classes": list(settings.classes),
            "label_values_sha256": label_values,
            "like": tokens_given,
            "vae_sha256": weights_sha256(self.autoencoder.vae),
            "uint8_rule": "truncate",
            # An adaptive solver's steps depend on who shares the batch.
            "batches": [settings.per_proc_batch_size, settings.num_fid_samples]
            if settings.solver == "dopri5"
            else None,
        }

    def noise_index(self, index: Tensor) -> Tensor:
        """Which noise sample i starts from: its own, or that of its row of an interpolation."""
        return index // self.settings.interpolate if self.settings.interpolate else index

    def token(self, index: Tensor) -> Tensor | None:
        """The given class token of each sample (N, D), if tokens were given."""
        if self.tokens is None:
            return None
        steps = self.settings.interpolate
        if steps:
            return between(self.tokens[0], self.tokens[1], (index % steps) / (steps - 1))
        return self.tokens[index % len(self.tokens)]

    def label(self, index: Tensor) -> Tensor:
        """(N,) int64 on the CPU. A given token names its label, unless labels were asked for."""
        if self.labels.kind == "token":
            return nearest_class(self.token(index), self.model.class_means)
        return self.labels.at(self.settings.seed, index)

    def sample(self, samples: range, progress: Progress | None = None) -> tuple[Tensor, Drawn]:
        """Labels on the CPU and the States of the samples. progress: takes the finished fraction after each step."""
        index = torch.arange(samples.start, samples.stop)
        label, token, device = self.label(index), self.token(index), self.process.device
        drawn = self.sampler(
            self.noise_index(index).to(device), label.to(device), None if token is None else token.to(device), progress
        )
        return label, drawn

    def arrays(self, label: Tensor, drawn: Drawn) -> dict[str, np.ndarray]:
        """What is kept of a batch: pixels, labels, tokens, the classes they name, and the cost of each sample."""
        pixels = self.autoencoder.decode(drawn.state.latent, self.settings.vae_batch_size or None)
        cost = {"evaluations": drawn.evaluations, "forwards": drawn.forwards}
        arrays = {"pixels": pixels.permute(0, 2, 3, 1).cpu().numpy(), "label": label.numpy()}
        arrays |= {name: np.full(len(label), value, dtype=np.int64) for name, value in cost.items()}
        token = drawn.state.class_token
        if token is not None:
            arrays["class_token"] = token.float().cpu().numpy()
            if self.model.class_means is not None:
                arrays["nearest"] = nearest_class(token, self.model.class_means).cpu().numpy()
        return arrays


def load(settings: SampleConfig, process: Processes) -> Job:
    """Load everything that a job needs. Raises UserError where the settings and the model contradict each other."""
    device = process.device
    acceleration.allow_tf32(settings.tf32)
    model, guide = load_guided(settings.checkpoint, settings.guide_checkpoint, device)
    info = model.info
    optional = settings.cfg_scale is None
    settings = resolved(settings, null_class=info.cfg_prob > 0 or guide is not None)
    lengthy = settings.num_fid_samples * settings.num_steps >= COMPILED_FROM
    compiled = acceleration.decide_compile(settings.compile, device, lengthy=lengthy)
    settings = replace(settings, dtype=decided_dtype(settings.dtype, device), compile=compiled)
    solver, guidance = solver_of(settings), guidance_of(settings)
    labels = read_labels(
        settings.labels, settings.classes, info.network.num_classes, info.classes, settings.num_fid_samples
    )
    if settings.like and settings.labels in ((), ("spread",)) and not settings.classes:
        labels = Labels("token", labels.values)
    _check(settings, model, guide, guidance, labels)
    tokens = read_tokens(settings.like, model) if settings.like else None
    if tokens is not None and settings.interpolate and len(tokens) != 2:
        raise UserError(f"--interpolate goes between two tokens, --like gives {len(tokens)}")
    autoencoder = load_decoder(model, settings.vae, device, settings.vae_dtype, tiling=settings.vae_tiling)
    sampler = Sampler(
        prepare(model.network, settings.dtype, compiled=compiled),
        Interpolant(info.path),
        solver,
        guidance,
        prepare(guide.network, settings.dtype, compiled=compiled) if guide else None,
        acceleration.DTYPES[settings.dtype],
        settings.seed,
        settings.best_of,
        model.class_means,
    )
    left_unguided = optional and guidance.off
    return Job(settings, process, model, guide, sampler, autoencoder, labels, tokens, left_unguided)


def _check(settings: SampleConfig, model: Model, guide: Model | None, guidance: Guidance, labels: Labels) -> None:
    """Raise UserError for what this model cannot do."""
    if (labels.kind == "null" or not (guidance.off or guide)) and model.info.cfg_prob == 0:
        raise UserError(
            f"{model.path} was trained without label dropout (cfg-prob 0) and has no null class: sample with --cfg-scale 1 "
            "and labels, or give a --guide-checkpoint"
        )
    if guide and guidance.off:
        raise UserError("--guide-checkpoint does nothing at --cfg-scale 1")
    for flag, wanted in (
        ("--class-tokens", settings.class_tokens),
        ("--best-of", settings.best_of > 1),
        ("--like", bool(settings.like)),
    ):
        if wanted and not model.info.network.class_token_dim:
            raise UserError(f"{flag} needs a model with a class token; {model.path} has none")
    if (settings.best_of > 1 or labels.kind == "token") and model.class_means is None:
        raise UserError(
            f"{model.path} holds no mean class tokens (they come from a dataset packed with tokens): "
            + ("--best-of cannot choose" if settings.best_of > 1 else "say with --classes which label goes with --like")
        )
    if settings.best_of > 1 and labels.kind == "null":
        raise UserError("--best-of compares tokens with labels; it cannot choose among samples of the null class")
