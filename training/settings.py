"""Settings of train.py. Nothing here imports torch, so that --help answers at once."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.presets import GUIDANCE_SCALE
from config import RUN, MissingFile, UserError, setting
from models.choices import PATHS, PRECISIONS, SCHEDULES, WEIGHTINGS

_run = partial(setting, group="run")
_model = partial(setting, group="model")
_data = partial(setting, group="data")
_loss = partial(setting, group="loss")
_optimisation = partial(setting, group="optimisation")
_speed = partial(setting, group="speed")
_watching = partial(setting, group="watching", role=RUN)
_checkpoints = partial(setting, group="checkpoints", role=RUN)


@dataclass(frozen=True)
class TrainConfig:
    data_dir: Path | None = _run(
        None, "packed dataset (preprocessing/pack.py); required without --assume", also=("data", "data_path"), role=RUN
    )
    exp_name: str | None = _run(
        None,
        "name of the run: its folder is OUTPUT_DIR/EXP_NAME; required without --assume",
        also=("name", "run"),
        role=RUN,
    )
    output_dir: Path = _run(Path("runs"), "where run folders are", also=("out", "output", "results_dir"), role=RUN)
    seed: int = _run(0, "of weights, data order and all noise", also=("global_seed",), at_least=-(2**63), below=2**64)
    dry_run: bool = _run(False, "print the plan and stop: network, memory, time, disk", role=RUN)
    assume: str | None = _run(
        None,
        "with --dry-run: plan for a dataset that is not packed yet",
        choices=("imagenet256", "imagenet512"),
        role=RUN,
    )
    gpu: str | None = _run(None, "with --dry-run: does the run fit this GPU, e.g. RTX4090, and its time", role=RUN)
    init_from: Path | None = _run(
        None,
        "start from the weights of a model file, run, published .pt or hub OWNER/NAME[/FILE]; classes are matched by name",
        also=("pretrained", "finetune", "finetune_from", "pretrained_model_name_or_path", "load_from"),
    )
    accept_changes: bool = _run(False, "resume although settings differ from the run's", role=RUN)

    model: str = _model("SiT-XL/2", "SiT-{S,B,L,XL}/{2,4,8}")
    depth: int | None = _model(None, "blocks; default: the model's")
    hidden_size: int | None = _model(None, "width; default: the model's")
    num_heads: int | None = _model(None, "attention heads; default: the model's")
    patch_size: int | None = _model(None, "latent pixels per patch side; default: the model's")
    qk_norm: bool = _model(False, "normalise queries and keys")
    class_token: bool = _model(True, "denoise the encoder's class token too (REG)")

    resolution: int | None = _data(None, "check that the dataset has this resolution")
    num_classes: int | None = _data(None, "check that the dataset has this number of classes")
    vae: str | None = _data(None, "decodes previews: ema, mse, hub id or folder; default: the dataset's", role=RUN)
    num_workers: int = _data(2, "threads that read batches ahead; 0: none", at_least=0, role=RUN)

    enc_type: tuple[str, ...] = _loss((), "encoders; default: the dataset's, or dinov2-vit-b on pixels")
    proj_coeff: float = _loss(0.5, "lambda, weight of the alignment; 0: no projectors", at_least=0, below=math.inf)
    class_coeff: float = _loss(
        0.03, "beta, weight of the class token's velocity (published: --cls)", at_least=0, below=math.inf
    )
    align_class_token: bool = _loss(True, "align the class token with the encoder's too, or the patch tokens alone")
    projector_dim: int = _loss(2048, "hidden width of the projectors", above=0)
    encoder_depth: int | None = _loss(None, "align after this block; default: S, B 4, L, XL 8")
    path_type: str = _loss("linear", "interpolant", choices=PATHS)
    weighting: str = _loss("uniform", "distribution of t", choices=WEIGHTINGS)
    cfg_prob: float = _loss(0.1, "label dropout", at_least=0, at_most=1)

    batch_size: int = _optimisation(
        256, "images per optimiser step, over all processes", also=("bs", "b", "global_batch_size"), above=0
    )
    max_train_steps: int = _optimisation(
        400_000,
        "optimiser steps in all; an epoch is as many as the images divided by the batch size",
        also=("epochs", "epoch", "num_epochs", "steps", "max_steps", "iterations"),
        above=0,
        role=RUN,
    )
    gradient_accumulation_steps: int = _optimisation(
        1, "micro-batches per step", also=("grad_accum", "accumulation_steps", "accum"), above=0, role=RUN
    )
    micro_batch: str | None = _optimisation(
        None,
        "images of a micro-batch of each process, or auto: as many as its GPU holds; in place of "
        "--gradient-accumulation-steps",
        also=("micro_batch_size", "per_device_batch_size"),
        role=RUN,
    )
    learning_rate: float = _optimisation(1e-4, "of AdamW, after the warm-up", also=("lr",), above=0, below=math.inf)
    lr_schedule: str = _optimisation(
        "constant",
        "learning rate after the warm-up: constant, or a cosine that would reach 0 after the last step",
        choices=SCHEDULES,
    )
    lr_warmup_steps: int = _optimisation(
        0, "steps in which the learning rate grows linearly to its value", also=("warmup", "warmup_steps"), at_least=0
    )
    adam_beta1: float = _optimisation(0.9, "decay of AdamW's mean of the gradient", at_least=0, below=1)
    adam_beta2: float = _optimisation(0.999, "decay of AdamW's mean of the squared gradient", at_least=0, below=1)
    adam_weight_decay: float = _optimisation(0.0, "of AdamW", also=("wd", "weight_decay"), at_least=0, below=math.inf)
    adam_epsilon: float = _optimisation(1e-8, "added to AdamW's denominator", at_least=0, below=math.inf)
    max_grad_norm: float = _optimisation(
        1.0, "clip the gradient to this norm", also=("clip", "grad_clip", "clip_grad"), above=0
    )
    ema_decay: float = _optimisation(0.9999, "of the averaged weights", also=("ema", "decay"), at_least=0, below=1)
    ema_warmup: bool = _optimisation(
        False, "for short runs: at step t the decay is at most (1 + t) / (10 + t)", also=("use_ema_warmup",)
    )

    mixed_precision: str = _speed(
        "auto",
        "over float32 weights; auto: what accelerate launch asks for, or bf16 where the GPU has it, else fp16, "
        "fp32 on the CPU (published: fp16)",
        choices=("auto", *PRECISIONS),
    )
    allow_tf32: bool = _speed(True, "TF32 matrix products", role=RUN)
    compile: bool | None = _speed(None, "torch.compile network and encoders, block by block; auto: on a GPU", role=RUN)
    cuda_graph: bool = _speed(
        False,
        "after three steps, replay the whole optimiser step as one CUDA graph: on one GPU, in bf16 or fp32",
        role=RUN,
    )
    norm_kernel: bool = _speed(False, "Triton kernels for the norms of compiled blocks, on a GPU", role=RUN)
    gradient_checkpointing: bool = _speed(False, "recompute blocks in the backward pass: less memory", role=RUN)

    report_to: str = _watching(
        "none",
        "tracker beside metrics.jsonl (WANDB_MODE=offline for wandb without network)",
        choices=("none", "wandb", "tensorboard"),
    )
    wandb_project: str = _watching("REG", "wandb project")
    log_every: int = _watching(100, "steps per log line", above=0)
    sampling_steps: int = _watching(10_000, "steps between preview grids; 0: none", at_least=0)
    preview_steps: int = _watching(50, "SDE steps of a preview", above=0)
    preview_scale: float = _watching(GUIDANCE_SCALE, "guidance scale of a preview", above=-math.inf, below=math.inf)
    eval_every: int = _watching(0, "steps between measurements of the Frechet distance; 0: none", at_least=0)
    eval_samples: int = _watching(2048, "samples of such a measurement, unguided", above=0)
    eval_reference: Path | None = _watching(None, "npz, image folder or packed dataset to compare with")
    eval_training: Path | None = _watching(
        None, "the images trained on: warn where samples are nearer to them than those of --eval-reference are"
    )
    eval_features: str = _watching("inception", "feature space, as for evaluate.py --features")

    checkpointing_steps: int = _checkpoints(10_000, "steps between checkpoints", above=0)
    keep_last: int = _checkpoints(3, "newest checkpoints to keep; 0: all", at_least=0)
    keep_every: int = _checkpoints(50_000, "keep those at multiples of this too; 0: none", at_least=0)
    on_save_error: str = _checkpoints("continue", "when the disk fails during a save", choices=("continue", "stop"))
    on_nonfinite: str = _checkpoints(
        "stop", "when a loss or gradient is not finite; the weights never take part", choices=("stop", "skip")
    )
    max_hours: float | None = _checkpoints(None, "save and stop after this time, exit status 143", above=0)
    requeue_command: str | None = _checkpoints(
        None, "run after a stop by SIGUSR1, e.g. 'scontrol requeue $SLURM_JOB_ID'"
    )


def check_values(settings: TrainConfig) -> None:
    """Check the settings against each other.

    Raises:
        UserError: a flag needs another one, or excludes it; the message names both.
    """
    if settings.eval_every and settings.eval_reference is None:
        raise UserError("--eval-every needs --eval-reference: the images to compare with")
    if settings.eval_training is not None and not settings.eval_every:
        raise UserError("--eval-training is compared with at each --eval-every steps: give that too")
    if settings.eval_every and settings.assume is None and not Path(settings.eval_reference or "").exists():
        raise MissingFile(f"--eval-reference {settings.eval_reference} does not exist")
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
    name = settings.exp_name
    if name is not None and ("/" in name or name in ("", ".", "..") or len(name.encode()) > 255):
        raise UserError(f"--exp-name {settings.exp_name!r} must be the name of a folder inside --output-dir")
