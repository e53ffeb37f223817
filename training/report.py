"""`--dry-run`: what a run will be, in numbers, before it costs anything."""

import os
from typing import Any

from dataset import StepSampler
from models.cost import GPUS, cost, step_cost, training_memory, vit_macs
from packed.format import read_manifest
from training.plan import Plan, make_plan


def dry_run(settings: Any) -> str:
    """The plan in words. Raises what a real start would raise for settings and dataset."""
    manifest = read_manifest(settings.data_dir)
    plan = make_plan(settings, manifest)
    world = int(os.environ.get("WORLD_SIZE", 1))
    sampler = StepSampler(manifest.count, settings.batch_size, seed=settings.seed, world=world,
                          micro=settings.gradient_accumulation_steps)  # fmt: skip
    return "\n".join(f"{name:<12} {text}" for name, text in _rows(settings, plan, world, sampler.local))


def _rows(settings: Any, plan: Plan, world: int, local: int) -> list[tuple[str, str]]:
    config, manifest = plan.network, plan.manifest
    counted = cost(config)
    average = settings.ema_device == "same"
    memory = training_memory(
        config, half=settings.mixed_precision != "no", recompute=settings.gradient_checkpointing, average=average
    )
    images = settings.max_train_steps * settings.batch_size
    slot = f"class token of width {config.class_token_dim}" if config.class_token_dim else "no class token"
    aligned = f"aligned after block {config.align_depth}" if config.align_dims else "no alignment"
    where = "run in the step" if plan.online else "cached in the dataset" if plan.cached else "none needed"
    gib, fixed = 2**30, memory.state + memory.copies
    per_image = f"{memory.activations / 2**20:.1f} MiB an image" + (", and the encoders" if plan.online else "")
    return [
        ("dataset", f"{settings.data_dir}: {manifest.count:,} images of {manifest.resolution} px, {len(manifest.classes)} "
                    f"classes, latents {config.in_channels} x {config.input_size} x {config.input_size} of {plan.vae}"),
        ("network", f"{config.depth} blocks of width {config.hidden_size}, {config.num_heads} heads, "
                    f"{config.num_tokens} tokens ({config.num_patches} patches); {slot}; {aligned}"),
        ("encoders", ", ".join(plan.encoders) + (": " if plan.encoders else "") + where),
        ("parameters", f"{counted.parameters / 1e6:.1f} M, and {counted.projector_parameters / 1e6:.1f} M in projectors"),
        ("compute", f"{counted.flops / 1e9:.2f} G multiply-adds an image forward, {counted.train_flops / 1e12:.3f} TFLOP an "
                    f"image of training, {counted.train_flops * images / 1e18:.3g} EFLOP in all"),
        ("steps", f"{settings.max_train_steps:,} of {settings.batch_size} images: {images:,} images, "
                  f"{images / manifest.count:.1f} epochs"),
        ("processes", f"{world}, with micro-batches of {local} images, {settings.gradient_accumulation_steps} a step, "
                      f"precision {settings.mixed_precision}"),
        ("memory", f"about {memory.total(local) / gib:.2f} GiB a process: {fixed / gib:.2f} GiB of weights, gradients, "
                   f"{'AdamW and EMA' if average else 'and AdamW'}, {per_image}"),
        ("time", f"{_hours(settings, plan, world)} on as many GPUs, by the roofline, without data and gradient exchange"),
        ("disk", f"{16 * (counted.parameters + counted.projector_parameters) / gib:.2f} GiB a checkpoint"),
    ]  # fmt: skip


def _hours(settings: Any, plan: Plan, world: int) -> str:
    """Expected hours of the whole run for a few GPUs, in words."""
    macs = sum(vit_macs(encoder.vit, encoder.input_size) for encoder in plan.online)
    hours = {
        name: settings.max_train_steps / 3600 * step_cost(
            plan.network, settings.batch_size // world, GPUS[name], encoder_macs=macs,
            recompute=settings.gradient_checkpointing,
        ).expected
        for name in ("A100", "H100", "H200")
    }  # fmt: skip
    return ", ".join(f"{name} {value:.3g} h" for name, value in hours.items())
