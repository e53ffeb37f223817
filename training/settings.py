"""Settings of train.py. Nothing here imports torch, so that --help answers at once."""

import math
from dataclasses import dataclass
from pathlib import Path

from common.presets import GUIDANCE_SCALE
from config import RUN, UserError, setting
from models.choices import PATHS, WEIGHTINGS


@dataclass(frozen=True)
class TrainConfig:
    data_dir: Path | None = setting(
        None,
        "packed dataset (preprocessing/pack.py); required without --assume",
        group="run",
        also=("data", "data_path"),
        role=RUN,
    )
    exp_name: str | None = setting(
        None,
        "name of the run: its folder is OUTPUT_DIR/EXP_NAME; required without --assume",
        group="run",
        also=("name", "run"),
        role=RUN,
    )
    output_dir: Path = setting(
        Path("runs"), "where run folders are", group="run", also=("out", "output", "results_dir"), role=RUN
    )
    seed: int = setting(
        0, "of weights, data order and all noise", group="run", also=("global_seed",), at_least=-(2**63), below=2**64
    )
    dry_run: bool = setting(False, "print the plan and stop: network, memory, time, disk", group="run", role=RUN)
    assume: str | None = setting(
        None,
        "with --dry-run: plan for a dataset that is not packed yet",
        group="run",
        choices=("imagenet256", "imagenet512"),
        role=RUN,
    )
    gpu: str | None = setting(
        None, "with --dry-run: does the run fit this GPU, e.g. RTX4090, and its time", group="run", role=RUN
    )
    accept_changes: bool = setting(False, "resume although settings differ from the run's", group="run", role=RUN)

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
        None, "decodes previews: ema, mse, hub id or folder; default: the dataset's", group="data", role=RUN
    )
    num_workers: int = setting(2, "threads that read batches ahead; 0: none", group="data", at_least=0, role=RUN)

    enc_type: tuple[str, ...] = setting((), "encoders; default: the dataset's, or dinov2-vit-b on pixels", group="loss")
    proj_coeff: float = setting(
        0.5, "lambda, weight of the alignment; 0: no projectors", group="loss", at_least=0, below=math.inf
    )
    class_coeff: float = setting(
        0.03, "beta, weight of the class token's velocity (published: --cls)", group="loss", at_least=0, below=math.inf
    )
    projector_dim: int = setting(2048, "hidden width of the projectors", group="loss", above=0)
    encoder_depth: int | None = setting(None, "align after this block; default: S, B 4, L, XL 8", group="loss")
    path_type: str = setting("linear", "interpolant", group="loss", choices=PATHS)
    weighting: str = setting("uniform", "distribution of t", group="loss", choices=WEIGHTINGS)
    cfg_prob: float = setting(0.1, "label dropout", group="loss", at_least=0, at_most=1)

    batch_size: int = setting(
        256,
        "images per optimiser step, over all processes",
        group="optimisation",
        also=("bs", "b", "global_batch_size"),
        above=0,
    )
    max_train_steps: int = setting(
        400_000,
        "optimiser steps in all; an epoch is as many as the images divided by the batch size",
        group="optimisation",
        also=("epochs", "epoch", "num_epochs", "steps", "max_steps", "iterations"),
        above=0,
        role=RUN,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "micro-batches per step",
        group="optimisation",
        also=("grad_accum", "accumulation_steps", "accum"),
        above=0,
        role=RUN,
    )
    learning_rate: float = setting(
        1e-4, "of AdamW, constant", group="optimisation", also=("lr",), above=0, below=math.inf
    )
    adam_beta1: float = setting(0.9, "", group="optimisation", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "", group="optimisation", at_least=0, below=1)
    adam_weight_decay: float = setting(
        0.0, "of AdamW", group="optimisation", also=("wd", "weight_decay"), at_least=0, below=math.inf
    )
    adam_epsilon: float = setting(1e-8, "", group="optimisation", at_least=0, below=math.inf)
    max_grad_norm: float = setting(
        1.0, "clip the gradient to this norm", group="optimisation", also=("clip", "grad_clip", "clip_grad"), above=0
    )
    ema_decay: float = setting(
        0.9999, "of the averaged weights", group="optimisation", also=("ema", "decay"), at_least=0, below=1
    )

    mixed_precision: str = setting(
        "auto",
        "over float32 weights; auto: what accelerate launch asks for, or bf16 where the GPU has it, else fp16, "
        "fp32 on the CPU (published: fp16)",
        group="speed",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    allow_tf32: bool = setting(True, "TF32 matrix products", group="speed", role=RUN)
    compile: bool = setting(False, "torch.compile network and encoders, block by block", group="speed", role=RUN)
    gradient_checkpointing: bool = setting(
        False, "recompute blocks in the backward pass: less memory", group="speed", role=RUN
    )

    report_to: str = setting(
        "none",
        "tracker beside metrics.jsonl (WANDB_MODE=offline for wandb without network)",
        group="watching",
        choices=("none", "wandb", "tensorboard"),
        role=RUN,
    )
    wandb_project: str = setting("REG", "wandb project", group="watching", role=RUN)
    log_every: int = setting(100, "steps per log line", group="watching", above=0, role=RUN)
    sampling_steps: int = setting(
        10_000, "steps between preview grids; 0: none", group="watching", at_least=0, role=RUN
    )
    preview_steps: int = setting(50, "SDE steps of a preview", group="watching", above=0, role=RUN)
    preview_scale: float = setting(
        GUIDANCE_SCALE, "guidance scale of a preview", group="watching", above=-math.inf, below=math.inf, role=RUN
    )
    eval_every: int = setting(
        0, "steps between measurements of the Frechet distance; 0: none", group="watching", at_least=0, role=RUN
    )
    eval_samples: int = setting(2048, "samples of such a measurement, unguided", group="watching", above=0, role=RUN)
    eval_reference: Path | None = setting(
        None, "npz, image folder or packed dataset to compare with", group="watching", role=RUN
    )
    eval_features: str = setting(
        "inception", "feature space, as for evaluate.py --features", group="watching", role=RUN
    )

    checkpointing_steps: int = setting(10_000, "steps between checkpoints", group="checkpoints", above=0, role=RUN)
    keep_last: int = setting(3, "newest checkpoints to keep; 0: all", group="checkpoints", at_least=0, role=RUN)
    keep_every: int = setting(
        50_000, "keep those at multiples of this too; 0: none", group="checkpoints", at_least=0, role=RUN
    )
    on_save_error: str = setting(
        "continue", "when the disk fails during a save", group="checkpoints", choices=("continue", "stop"), role=RUN
    )
    on_nonfinite: str = setting(
        "stop",
        "when a loss or gradient is not finite; the weights never take part",
        group="checkpoints",
        choices=("stop", "skip"),
        role=RUN,
    )
    max_hours: float | None = setting(
        None, "save and stop after this time, exit status 143", group="checkpoints", above=0, role=RUN
    )
    requeue_command: str | None = setting(
        None, "run after a stop by SIGUSR1, e.g. 'scontrol requeue $SLURM_JOB_ID'", group="checkpoints", role=RUN
    )


def check_values(settings: TrainConfig) -> None:
    """Check the settings against each other.

    Raises:
        UserError: a flag needs another one, or excludes it; the message names both.
    """
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
