"""One sampling job: load, agree on the work, sample and keep part after part, assemble."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from models import acceleration
from models.class_token import between, nearest_class
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.model_file import Model, find_model
from models.obtain import file_sha256, obtain
from models.samplers import Solver
from models.solvers import Progress
from sampling import messages, processes
from sampling.assemble import Output, assemble, is_finished
from sampling.labels import Labels, batches, read_labels
from sampling.loading import Decoder, Precision, load_decoder, load_guided, prepare, weights_sha256
from sampling.loop import sample_parts
from sampling.parts import Parts, check_space
from sampling.processes import Process
from sampling.sampler import Drawn, Sampler
from sampling.tokens import read_tokens


@dataclass(frozen=True)
class Request:
    """What to make, of what, and where. Field by field what the flags of generate.py say."""

    checkpoint: Path
    out: Path
    preset: str | None = None  # whose values the request has, for messages
    count: int = 50_000
    seed: int = 0
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    solver: Solver = field(default_factory=Solver)
    guidance: Guidance = field(default_factory=Guidance)
    guidance_optional: bool = False  # sample unguided a model that has no null class, instead of refusing
    guide_checkpoint: Path | None = None
    class_tokens: bool = False
    best_of: int = 1
    like: tuple[str, ...] = ()
    interpolate: int = 0
    png: bool = False
    gallery: int = 200
    keep_parts: bool = False
    batch_size: int = 32
    device: str = "auto"
    precision: Precision = field(default_factory=Precision)
    vae: str | None = None


@dataclass
class Job:
    """A request with everything loaded."""

    request: Request
    process: Process
    model: Model
    sampler: Sampler
    decoder: Decoder
    labels: Labels
    tokens: Tensor | None  # (K, D) of --like
    identity: dict[str, Any]  # all that the samples depend on

    def noise_index(self, index: Tensor) -> Tensor:
        """Which noise sample i starts from: its own, or that of its row of an interpolation."""
        return index // self.request.interpolate if self.request.interpolate else index

    def token(self, index: Tensor) -> Tensor | None:
        """The given class token of each sample (N, D), if tokens were given."""
        if self.tokens is None:
            return None
        steps = self.request.interpolate
        if steps:
            return between(self.tokens[0], self.tokens[1], (index % steps) / (steps - 1))
        return self.tokens[index % len(self.tokens)]

    def label(self, index: Tensor) -> Tensor:
        """(N,) int64 on the CPU. A given token names its label, unless labels were asked for."""
        if self.labels.kind == "token":
            return nearest_class(self.token(index), self.model.class_means)
        return self.labels.at(self.request.seed, index)

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
        pixels = self.decoder(drawn.state.latent).permute(0, 2, 3, 1).cpu().numpy()
        cost = {"evaluations": drawn.evaluations, "forwards": drawn.forwards}
        arrays = {"pixels": pixels, "label": label.numpy()}
        arrays |= {name: np.full(len(label), value, dtype=np.int64) for name, value in cost.items()}
        token = drawn.state.class_token
        if token is not None:
            arrays["class_token"] = token.float().cpu().numpy()
            if self.model.class_means is not None:
                arrays["nearest"] = nearest_class(token, self.model.class_means).cpu().numpy()
        return arrays


def load(request: Request, process: Process) -> Job:
    """Load and check everything a request needs. Raises ValueError or FileNotFoundError, one sentence each."""
    acceleration.allow_tf32(request.precision.tf32)
    model, guide = load_guided(request.checkpoint, request.guide_checkpoint, process.device)
    network, info = model.info.network, model.info
    request = replace(request, precision=request.precision.on(process.device))
    labels = read_labels(request.labels, request.classes, network.num_classes, info.classes, request.count)
    if request.like and request.labels in ((), ("spread",)) and not request.classes:
        labels = Labels("token", labels.values)
    if info.cfg_prob == 0 and guide is None and request.guidance_optional and request.guidance.class_scale is None:
        request = replace(request, guidance=Guidance())
    needs_null = labels.kind == "null" or not (request.guidance.off or guide)
    if needs_null and info.cfg_prob == 0:
        raise UserError(
            f"{find_model(request.checkpoint)} was trained without label dropout (cfg-prob 0) and knows no null class: "
            "sample with --cfg-scale 1 and labels, or give a --guide-checkpoint"
        )
    if guide and request.guidance.off:
        raise UserError("--guide-checkpoint does nothing at --cfg-scale 1")
    for flag, wanted in (
        ("--class-tokens", request.class_tokens),
        ("--best-of", request.best_of > 1),
        ("--like", bool(request.like)),
    ):
        if wanted and not network.class_token_dim:
            raise UserError(f"{flag} needs a model with a class token; {find_model(request.checkpoint)} has none")
    if (request.best_of > 1 or labels.kind == "token") and model.class_means is None:
        raise UserError(
            f"{find_model(request.checkpoint)} holds no mean class tokens (they come from a dataset packed with tokens): "
            + ("--best-of cannot choose" if request.best_of > 1 else "say with --classes which label goes with --like")
        )
    if request.best_of > 1 and labels.kind == "null":
        raise UserError("--best-of compares tokens with labels; it cannot choose among samples of the null class")
    tokens = None
    if request.like:
        if any(".npy" not in source for source in request.like) and not info.encoders:
            raise UserError("--like: the model file names no encoder; give tokens as .npy")
        grid = network.input_size // network.patch_size
        encoder = info.encoders[0] if info.encoders else ""
        tokens = read_tokens(request.like, network.class_token_dim, encoder, info.resolution, grid)
        if request.interpolate and len(tokens) != 2:
            raise UserError(f"--interpolate goes between two tokens, --like gives {len(tokens)}")
    decoder = load_decoder(model, request.vae, request.precision, process.device)
    identity = describe(request, model, guide, decoder, labels, tokens)
    sampler = Sampler(
        prepare(model.network, request.precision),
        Interpolant(info.path),
        request.solver,
        request.guidance,
        prepare(guide.network, request.precision) if guide else None,
        acceleration.DTYPES[request.precision.dtype],
        request.seed,
        request.best_of,
        model.class_means,
    )
    return Job(request, process, model, sampler, decoder, labels, tokens, identity)


def describe(
    request: Request, model: Model, guide: Model | None, decoder: Decoder, labels: Labels, tokens: Tensor | None
) -> dict[str, Any]:
    """Everything the samples depend on, as JSON: two jobs with the same description make the same samples."""
    solver, guidance, precision = asdict(request.solver), asdict(request.guidance), request.precision
    diffusion = solver.pop("diffusion")
    adaptive = request.solver.name == "dopri5"
    given = None
    if tokens is not None:
        given = {"sources": list(request.like), "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
    label_values = None
    if labels.kind in ("list", "spread") or request.classes:
        label_values = hashlib.sha256(labels.values.tobytes()).hexdigest()
    return {
        "checkpoint_sha256": file_sha256(find_model(request.checkpoint)),
        "guide_sha256": file_sha256(find_model(request.guide_checkpoint)) if guide else None,
        "step": model.info.step,
        "seed": request.seed,
        "labels": labels.kind,
        "classes": list(request.classes),
        "label_values_sha256": label_values,
        "mode": solver.pop("mode"),
        "solver": solver.pop("name"),
        "steps": solver.pop("num_steps"),
        "time_grid": solver.pop("grid"),
        **solver,
        "diffusion": diffusion["name"],
        "diffusion_scale": diffusion["scale"],
        "cfg_scale": guidance["scale"],
        "cls_cfg_scale": guidance["scale"] if guidance["class_scale"] is None else guidance["class_scale"],
        "guidance_low": guidance["low"],
        "guidance_high": guidance["high"],
        "cls_guidance_low": guidance["low"] if guidance["class_low"] is None else guidance["class_low"],
        "cls_guidance_high": guidance["high"] if guidance["class_high"] is None else guidance["class_high"],
        "best_of": request.best_of,
        "like": given,
        "interpolate": request.interpolate,
        "dtype": precision.dtype,
        "tf32": precision.tf32,
        "vae_sha256": weights_sha256(decoder.autoencoder.vae),
        "vae_dtype": precision.vae_dtype,
        "vae_tiling": precision.vae_tiling,
        "uint8_rule": "truncate",
        # An adaptive solver's steps depend on who shares the batch.
        "batches": [request.batch_size, request.count] if adaptive else None,
    }


def generate(request: Request, say: Callable[[str], object] = lambda text: None) -> None:
    """Do what is missing of a request, with all processes of the job, and let the first one assemble the files.

    say: takes the first process's lines for the user.
    """
    process = processes.start(request.device)
    try:
        job, work = _agree(request, process, say)
    finally:
        processes.stop()  # from here on the processes meet only in the folder of parts
    if job is None:
        return
    parts = Parts(request.out / "parts")
    start = time.monotonic()
    sample_parts(job, parts, work, say)
    if process.first:
        seconds, made = time.monotonic() - start, sum(map(len, work))
        measured = {
            "vae": job.decoder.autoencoder.name,
            "checkpoint": str(job.request.checkpoint),
            "per_proc_batch_size": request.batch_size,
            "processes": process.world,
            "device": torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu",
            "seconds": round(seconds, 2),
            "samples_per_second": round(made / seconds, 4) if made else None,
        }
        info = job.model.info
        output = Output(
            request.out,
            request.count,
            info.resolution,
            info.classes,
            request.interpolate,
            request.gallery,
            request.class_tokens,
            request.png,
            request.keep_parts,
        )
        say(assemble(output, parts, job.identity, measured))


def _agree(request: Request, process: Process, say: Callable[[str], object]) -> tuple[Job | None, list[range]]:
    """Rank 0 loads first and says what there is to do, so that an error is told once. No job: everything is there."""
    if not process.first:
        resolved = processes.broadcast(None)
        if resolved is None:
            time.sleep(1)  # the first exit ends all processes, and rank 0 is still to tell why
            raise SystemExit(2)
        request, work = resolved
        return (load(request, process) if work else None), work
    try:
        guide = request.guide_checkpoint
        request = replace(request, checkpoint=obtain(request.checkpoint), guide_checkpoint=guide and obtain(guide))
        job = load(request, process)
        work = _begin(job, say)
    except (ValueError, FileNotFoundError):
        processes.broadcast(None)
        raise
    processes.broadcast((request, work or []))  # every rank loads the files that rank 0 has found
    return (job if work is not None else None), work or []


def _begin(job: Job, say: Callable[[str], object]) -> list[range] | None:
    """What is still to be sampled, cut into batches; None when the job was finished before. Raises ValueError when the
    folder belongs to other settings or the disk is too small."""
    request, side = job.request, job.model.info.resolution
    parts = Parts(request.out / "parts")
    wanted = [name for name, asked in (("class_tokens.npy", request.class_tokens), ("png", request.png)) if asked]
    if is_finished(request.out, request.count, job.identity, wanted, have_parts=bool(parts.done())):
        say(f"{request.out} is complete: {request.count} samples with these settings are there")
        return None
    work = batches(parts.done(), request.count, request.batch_size, aligned=job.identity["batches"] is not None)
    row = side * side * 3 + 4 * job.model.info.network.class_token_dim
    needed = row * (request.count + sum(map(len, work)))
    free = check_space(request.out, needed)
    parts.begin(job.identity)
    work = batches(parts.done(), request.count, request.batch_size, aligned=job.identity["batches"] is not None)
    missing = sum(map(len, work))
    say(messages.what_it_makes(job))
    resumed = f"{missing:,} of them are still to be made; " if missing < request.count else ""
    say(f"{resumed}disk: {messages.size(needed)} needed, {messages.size(free)} free")
    return work
