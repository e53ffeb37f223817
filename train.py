"""Train SiT + REG (and, by flags, plain SiT, REPA, class token only) on a packed dataset.

    accelerate launch --num_processes 8 train.py --config recipes/reg-b2.yaml --data-dir data/imagenet256 --exp-name reg-b2

The same command again resumes from the newest checkpoint. See docs/training.md.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.presets import GUIDANCE_SCALE
from common.reporting import run, say
from config import UserError, parse, setting

EXAMPLES = (
    "python train.py --config recipes/reg-xl2.yaml --dry-run --assume imagenet256 --gpu RTX4090",
    "accelerate launch --num_processes 8 train.py --config recipes/reg-b2.yaml --data-dir data/in256 --exp-name reg-b2",
)


@dataclass(frozen=True)
class TrainConfig:
    data_dir: Path | None = setting(
        None,
        "packed dataset (preprocessing/pack.py); required without --assume",
        group="run",
        also=("data", "data_path"),
    )
    exp_name: str | None = setting(
        None,
        "name of the run: its folder is OUTPUT_DIR/EXP_NAME; required without --assume",
        group="run",
        also=("name", "run"),
    )
    output_dir: Path = setting(
        Path("runs"), "where run folders are", group="run", also=("out", "output", "results_dir")
    )
    seed: int = setting(0, "of weights, data order and all noise", group="run", also=("global_seed",))
    dry_run: bool = setting(False, "print the plan and stop: network, memory, time, disk", group="run")
    assume: str | None = setting(
        None,
        "with --dry-run: plan for a dataset that is not packed yet",
        group="run",
        choices=("imagenet256", "imagenet512"),
    )
    gpu: str | None = setting(
        None, "with --dry-run: does the run fit this GPU, e.g. RTX4090, and its time", group="run"
    )
    accept_changes: bool = setting(False, "resume although settings differ from the run's", group="run")

    model: str = setting("SiT-XL/2", "SiT-{S,B,L,XL}/{2,4,8}", group="model")
    depth: int | None = setting(None, "blocks; default: the model's", group="model")
    hidden_size: int | None = setting(None, "width; default: the model's", group="model")
    num_heads: int | None = setting(None, "attention heads; default: the model's", group="model")
    patch_size: int | None = setting(None, "latent pixels per patch side; default: the model's", group="model")
    qk_norm: bool = setting(False, "normalise queries and keys", group="model")
    class_token: bool = setting(True, "denoise the encoder's class token too (REG)", group="model")

    resolution: int | None = setting(None, "check that the dataset has this resolution", group="data")
    num_classes: int | None = setting(None, "check that the dataset has this number of classes", group="data")
    vae: str | None = setting(
        None, "decodes previews: ema, mse, hub id or folder; default: the dataset's", group="data"
    )
    num_workers: int = setting(2, "threads that read batches ahead; 0: none", group="data")

    enc_type: tuple[str, ...] = setting((), "encoders; default: the dataset's, or dinov2-vit-b on pixels", group="loss")
    proj_coeff: float = setting(0.5, "lambda, weight of the alignment; 0: no projectors", group="loss")
    class_coeff: float = setting(0.03, "beta, weight of the class token's velocity (published: --cls)", group="loss")
    projector_dim: int = setting(2048, "hidden width of the projectors", group="loss")
    encoder_depth: int | None = setting(None, "align after this block; default: S, B 4, L, XL 8", group="loss")
    path_type: str = setting("linear", "interpolant", group="loss", choices=("linear", "cosine"))
    weighting: str = setting("uniform", "distribution of t", group="loss", choices=("uniform", "lognormal"))
    cfg_prob: float = setting(0.1, "label dropout", group="loss")

    batch_size: int = setting(
        256,
        "images per optimiser step, over all processes",
        group="optimisation",
        also=("bs", "b", "global_batch_size"),
    )
    max_train_steps: int = setting(
        400_000,
        "optimiser steps in all; an epoch is as many as the images divided by the batch size",
        group="optimisation",
        also=("epochs", "epoch", "num_epochs", "steps", "max_steps", "iterations"),
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-batches per step", group="optimisation", also=("grad_accum", "accumulation_steps", "accum")
    )
    learning_rate: float = setting(1e-4, "of AdamW, constant", group="optimisation", also=("lr",))
    adam_beta1: float = setting(0.9, "", group="optimisation")
    adam_beta2: float = setting(0.999, "", group="optimisation")
    adam_weight_decay: float = setting(0.0, "of AdamW", group="optimisation", also=("wd", "weight_decay"))
    adam_epsilon: float = setting(1e-8, "", group="optimisation")
    max_grad_norm: float = setting(
        1.0, "clip the gradient to this norm", group="optimisation", also=("clip", "grad_clip", "clip_grad")
    )
    ema_decay: float = setting(0.9999, "of the averaged weights", group="optimisation", also=("ema", "decay"))

    mixed_precision: str = setting(
        "auto",
        "over float32 weights; auto: what accelerate launch asks for, or bf16 where the GPU has it, else fp16, "
        "fp32 on the CPU (published: fp16)",
        group="speed",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    allow_tf32: bool = setting(True, "TF32 matrix products", group="speed")
    compile: bool = setting(False, "torch.compile network and encoders, block by block", group="speed")
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory", group="speed")

    report_to: str = setting(
        "none",
        "tracker beside metrics.jsonl (WANDB_MODE=offline for wandb without network)",
        group="watching",
        choices=("none", "wandb", "tensorboard"),
    )
    wandb_project: str = setting("REG", "wandb project", group="watching")
    log_every: int = setting(100, "steps per log line", group="watching")
    sampling_steps: int = setting(10_000, "steps between preview grids; 0: none", group="watching")
    preview_steps: int = setting(50, "SDE steps of a preview", group="watching")
    preview_scale: float = setting(GUIDANCE_SCALE, "guidance scale of a preview", group="watching")
    eval_every: int = setting(0, "steps between measurements of the Frechet distance; 0: none", group="watching")
    eval_samples: int = setting(2048, "samples of such a measurement, unguided", group="watching")
    eval_reference: Path | None = setting(None, "npz, image folder or packed dataset to compare with", group="watching")
    eval_features: str = setting("inception", "feature space, as for evaluate.py --features", group="watching")

    checkpointing_steps: int = setting(10_000, "steps between checkpoints", group="checkpoints")
    keep_last: int = setting(3, "newest checkpoints to keep; 0: all", group="checkpoints")
    keep_every: int = setting(50_000, "keep those at multiples of this too; 0: none", group="checkpoints")
    on_save_error: str = setting(
        "continue", "when the disk fails during a save", group="checkpoints", choices=("continue", "stop")
    )
    on_nonfinite: str = setting(
        "stop",
        "when a loss or gradient is not finite; the weights never take part",
        group="checkpoints",
        choices=("stop", "skip"),
    )
    max_hours: float | None = setting(None, "save and stop after this time, exit status 143", group="checkpoints")
    requeue_command: str | None = setting(
        None, "run after a stop by SIGUSR1, e.g. 'scontrol requeue $SLURM_JOB_ID'", group="checkpoints"
    )


def train(settings: TrainConfig) -> int:
    """Run until max_train_steps, or until told to stop; returns the exit status."""
    from training.runner import Runner

    with Runner(settings) as run:
        reason = None
        while run.step < settings.max_train_steps and reason is None:
            run.advance()
            reason = run.interrupt.requested()
            last = run.step == settings.max_train_steps
            distance = run.evaluate() if _due(settings.eval_every, run.step, last) else {}
            if distance or _due(settings.log_every, run.step, last):
                run.log(**distance)
            if reason or _due(settings.checkpointing_steps, run.step, last):
                run.save()
            if _due(settings.sampling_steps, run.step, last):
                run.preview()
    return run.conclude(reason)


def _due(every: int, step: int, last: bool) -> bool:
    """Every so many steps and after the last one; 0 means never."""
    return every > 0 and (last or step % every == 0)


def check_values(settings: TrainConfig) -> None:
    """Refuse numbers that cannot be meant, and flags that exclude each other. Raises UserError naming the flag."""
    above_0 = (
        "batch_size",
        "max_train_steps",
        "gradient_accumulation_steps",
        "learning_rate",
        "max_grad_norm",
        "log_every",
        "checkpointing_steps",
        "preview_steps",
        "eval_samples",
        "projector_dim",
        "max_hours",
    )
    at_least_0 = (
        "num_workers",
        "sampling_steps",
        "eval_every",
        "keep_last",
        "keep_every",
        "proj_coeff",
        "class_coeff",
        "adam_weight_decay",
        "adam_epsilon",
    )
    ranges = {
        **dict.fromkeys(above_0, ("must be positive", lambda x: x > 0)),
        **dict.fromkeys(at_least_0, ("must not be negative", lambda x: x >= 0)),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), ("must be at least 0 and less than 1", lambda x: 0 <= x < 1)),
        "ema_decay": ("must be at least 0 and less than 1 (at 1 the average never moves)", lambda x: 0 <= x < 1),
        "cfg_prob": ("must be in [0, 1]", lambda x: 0 <= x <= 1),
        "preview_scale": ("must be a finite number", math.isfinite),
        "seed": ("must fit 64 bits", lambda x: -(2**63) <= x < 2**64),
    }
    for name, (words, allowed) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not allowed(value):
            raise UserError(f"--{name.replace('_', '-')} {words}, got {value}")
        if value == math.inf and name not in ("max_grad_norm", "max_hours"):  # where it means: no limit
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
    if settings.eval_every and settings.eval_reference is None:
        raise UserError("--eval-every needs --eval-reference: the images to compare with")
    if not settings.dry_run:
        for flag, value in (("--assume", settings.assume), ("--gpu", settings.gpu)):
            if value is not None:
                raise UserError(f"{flag} {value} plans a run: give --dry-run with it, or leave it out to train")
    if settings.assume is not None and settings.data_dir is not None:
        raise UserError("--assume takes the place of --data-dir: leave one of them out")
    if settings.assume is None and settings.data_dir is None:
        raise UserError(
            "--data-dir is required: packed dataset (preprocessing/pack.py); "
            "--dry-run --assume imagenet256 plans without one"
        )
    if settings.assume is None and settings.exp_name is None:
        raise UserError("--exp-name is required: name of the run, whose folder is OUTPUT_DIR/EXP_NAME")
    if settings.exp_name is not None and ("/" in settings.exp_name or settings.exp_name in ("", ".", "..")):
        raise UserError(f"--exp-name {settings.exp_name!r} must be the name of a folder inside --output-dir")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(
        TrainConfig, "Train a diffusion transformer with representation entanglement (REG).", argv, examples=EXAMPLES
    )
    if settings.dry_run:
        check_values(settings)
        if int(os.environ.get("RANK", 0)) == 0:
            from training.report import dry_run

            say(dry_run(settings))
        return
    from training.launch import leave, once

    with once():
        check_values(settings)
        status = train(settings)
    leave()
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    run(main)
