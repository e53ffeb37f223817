"""What a run will be, in numbers, before it costs anything: printed by `--dry-run` and at the start of every run."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from config import UserError
from dataset import StepSampler
from models.cost import GPUS, USABLE, cost, named_gpu, step_cost, training_memory, vit_macs
from packed.format import read_manifest
from training.assumed import assumed_manifest, record_bytes
from training.launch import Processes, asked_precision, check_launcher
from training.plan import Plan, make_plan
from training.settings import TrainConfig

USUAL_GPUS = ("A100", "H100", "H200")  # whose time is predicted where no GPU is named
GIB = 2**30


class Machine(NamedTuple):
    """What a run has.

    Attributes:
        world: processes.
        precision: "fp32", "fp16", "bf16", or "auto" where the GPU is not known.
        gpus: keys of models.cost.GPUS to predict the time for.
        name, memory: of the GPU to compare with, in bytes; None: there is nothing to compare with.
    """

    world: int
    precision: str
    gpus: tuple[str, ...]
    name: str | None = None
    memory: float | None = None


def dry_run(settings: TrainConfig) -> str:
    """The plan in words, for --dry-run.

    Raises:
        UserError: a real start would be refused for its settings or dataset, or --gpu is not in the table.
    """
    precision = asked_precision(settings.mixed_precision)
    check_launcher(settings.gradient_accumulation_steps)
    name = None
    if settings.gpu is not None:
        name = named_gpu(settings.gpu)
        if name is None:
            raise UserError(f"--gpu {settings.gpu} is not in the table, choose from {', '.join(GPUS)}")
        if precision == "auto":
            precision = "bf16" if GPUS[name].bf16 else "fp16"
    if settings.assume is not None:
        manifest = assumed_manifest(settings)
        settings = replace(settings, data_dir=Path(settings.assume))  # names it in messages
    else:
        assert settings.data_dir is not None
        manifest = read_manifest(settings.data_dir)
    plan = make_plan(settings, manifest)
    world = int(os.environ.get("WORLD_SIZE", 1))
    StepSampler(
        manifest.count, settings.batch_size, seed=settings.seed, world=world, micro=settings.gradient_accumulation_steps
    )
    machine = Machine(
        world, precision, (name,) if name else USUAL_GPUS, name, GPUS[name].memory * GIB if name else None
    )
    return _lines(_rows(settings, plan, machine))


def start_text(settings: TrainConfig, plan: Plan, processes: Processes, folder: Path) -> str:
    """The same plan for a run that starts now, with what it runs on and where it writes."""
    cuda = processes.device.type == "cuda"
    device = torch.cuda.get_device_name(processes.device) if cuda else "CPU"
    name = named_gpu(device) if cuda else None
    memory = torch.cuda.get_device_properties(processes.device).total_memory if cuda else None
    machine = Machine(processes.world, processes.precision, (name,) if name else (), device if cuda else None, memory)
    return _lines([*_rows(settings, plan, machine), ("device", device), ("folder", str(folder))])


def duration(hours: float) -> str:
    """Hours => "3 d 4 h", "5 h 12 min", "12 min" or "less than a minute"."""
    minutes = round(hours * 60)
    for size, larger, smaller in ((24 * 60, "d", "h"), (60, "h", "min")):
        if minutes >= size:
            return f"{minutes // size} {larger} {minutes % size // (60 if smaller == 'h' else 1)} {smaller}"
    return f"{minutes} min" if minutes else "less than a minute"


def _lines(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _rows(settings: TrainConfig, plan: Plan, machine: Machine) -> list[tuple[str, str]]:
    config, manifest, counted = plan.network, plan.manifest, cost(plan.network)
    images = settings.max_train_steps * settings.batch_size
    local = settings.batch_size // (machine.world * settings.gradient_accumulation_steps)
    slot = f"class token of width {config.class_token_dim}" if config.class_token_dim else "no class token"
    aligned = f"aligned after block {config.align_depth}" if config.align_dims else "no alignment"
    where = "run in the step" if plan.online else "cached in the dataset" if plan.cached else "none needed"
    records = _size(record_bytes(manifest) * manifest.count)
    checkpoint, kept = 16 * (counted.parameters + counted.projector_parameters), _checkpoints_kept(settings)
    rows = [
        (
            "dataset",
            f"{settings.data_dir}{' (assumed)' if settings.assume else ''}: {manifest.count:,} images of "
            f"{manifest.resolution} px, {len(manifest.classes)} classes, latents {config.in_channels} x "
            f"{config.input_size} x {config.input_size} of {plan.vae}, {records} of records",
        ),
        (
            "network",
            f"{config.depth} blocks of width {config.hidden_size}, {config.num_heads} heads, "
            f"{config.num_tokens} tokens ({config.num_patches} patches); {slot}; {aligned}",
        ),
        ("encoders", ", ".join(plan.encoders) + (": " if plan.encoders else "") + where),
        ("parameters", f"{_si(counted.parameters)}, and {_si(counted.projector_parameters)} in projectors"),
        (
            "compute",
            f"{_si(counted.flops)} multiply-adds per image forward, "
            f"{_si(counted.train_flops)}FLOP per training image, {_si(counted.train_flops * images)}FLOP in all",
        ),
        (
            "steps",
            f"{settings.max_train_steps:,} of {settings.batch_size} images: {images:,} images, "
            f"{images / manifest.count:.1f} epochs",
        ),
        (
            "processes",
            f"{machine.world}, with micro-batches of {local} images, {settings.gradient_accumulation_steps} per step",
        ),
        ("precision", _precision(settings, machine)),
        ("compile", "on: compiling, the first step takes a minute or two" if settings.compile else "off"),
        ("memory", _memory_text(settings, plan, machine, local)),
    ]
    if machine.memory is not None:
        rows.append(("GPU", _comparison(settings, plan, machine, machine.memory)))
    rows.append(("time", _time_text(settings, plan, machine)))
    rows.append(("disk", f"{_size(checkpoint)} per checkpoint, {_size(checkpoint * kept)} for the {kept} kept"))
    return rows


def _precision(settings: TrainConfig, machine: Machine) -> str:
    if machine.precision == "auto":
        return "auto: bf16 where the GPU has it, else fp16; fp32 on the CPU"
    if settings.mixed_precision == "auto" and asked_precision("auto") != "auto":
        return f"{machine.precision}, as accelerate's launcher asks"
    return machine.precision


def needed_memory(settings: TrainConfig, plan: Plan, machine: Machine, *, accumulation: int, recompute: bool) -> float:
    """Bytes that one process needs on its GPU, without allocator slack and the CUDA context.

    accumulation: micro-batches per step. recompute: gradient checkpointing.
    """
    memory = training_memory(plan.network, half=machine.precision != "fp32", recompute=recompute)
    return memory.total(settings.batch_size // (machine.world * accumulation)) + _encoder_bytes(plan)


def _encoder_bytes(plan: Plan) -> int:
    """Float32 weights of the encoders that run in the step."""
    return sum(4 * p.numel() for encoder in plan.online for p in encoder.parameters())


def _memory_text(settings: TrainConfig, plan: Plan, machine: Machine, local: int) -> str:
    recompute = settings.gradient_checkpointing
    memory = training_memory(plan.network, half=machine.precision != "fp32", recompute=recompute)
    total = needed_memory(
        settings, plan, machine, accumulation=settings.gradient_accumulation_steps, recompute=recompute
    )
    images = local * memory.activations
    encoders = f", {_size(_encoder_bytes(plan))} of encoders" if plan.online else ""
    fixed = total - images - _encoder_bytes(plan)
    return (
        f"about {_size(total)} per process: {_size(fixed)} of weights, gradients, AdamW and EMA{encoders}, "
        f"{_size(memory.activations)} per image"
    )


def _comparison(settings: TrainConfig, plan: Plan, machine: Machine, memory: float) -> str:
    """Whether a step fits the GPU, and if not, the settings that make it fit."""
    usable = USABLE * memory

    def need(accumulation: int, recompute: bool) -> float:
        return needed_memory(settings, plan, machine, accumulation=accumulation, recompute=recompute)

    now, recompute = settings.gradient_accumulation_steps, settings.gradient_checkpointing
    needed = need(now, recompute)
    text = f"{machine.name}, {_size(memory)}, of which {_size(usable)} are for tensors: {_size(needed)} "
    if needed <= usable:
        return text + "fit"
    per_process = settings.batch_size // machine.world
    found = {}
    for again in dict.fromkeys((recompute, True)):
        for accumulation in range(now, per_process + 1):
            if per_process % accumulation == 0 and need(accumulation, again) <= usable:
                changed = [
                    *(["--gradient-checkpointing"] if again != recompute else []),
                    *([f"--gradient-accumulation-steps {accumulation}"] if accumulation != now else []),
                ]
                found[" ".join(changed)] = need(accumulation, again)
                break
    if not found:
        return text + "do not fit at any batch size: take a smaller --model or a larger GPU"
    return text + "do not fit: use " + ", or ".join(f"{flags} ({_size(bytes_)})" for flags, bytes_ in found.items())


def _time_text(settings: TrainConfig, plan: Plan, machine: Machine) -> str:
    predicted = {name: _hours(settings, plan, machine, name) for name in machine.gpus}
    known = [f"{duration(hours)} on {machine.world} {name}" for name, hours in predicted.items() if hours is not None]
    if not known:
        what = "this precision without TF32" if predicted else machine.name or "a CPU"
        return f"not predicted for {what}; metrics.jsonl says how many hours are left"
    return f"predicted {', '.join(known)}, by the roofline without data loading and gradient exchange"


def _hours(settings: TrainConfig, plan: Plan, machine: Machine, name: str) -> float | None:
    """Expected hours of the whole run on a kind of GPU; None for float32 without TF32: its rate is not in the table."""
    gpu = GPUS[name]
    if machine.precision == "fp32":
        if not (settings.allow_tf32 and gpu.bf16):
            return None
        gpu = gpu._replace(tflops=gpu.tflops / 2)  # TF32
    macs = sum(vit_macs(encoder) for encoder in plan.online)
    batch = settings.batch_size // machine.world
    step = step_cost(plan.network, batch, gpu, encoder_macs=macs, recompute=settings.gradient_checkpointing)
    return settings.max_train_steps * step.expected / 3600


def _checkpoints_kept(settings: TrainConfig) -> int:
    """How many checkpoints a whole run leaves."""
    saved = sorted(
        {
            *range(settings.checkpointing_steps, settings.max_train_steps, settings.checkpointing_steps),
            settings.max_train_steps,
        }
    )
    if not settings.keep_last:
        return len(saved)
    older, newest = saved[: -settings.keep_last], saved[-settings.keep_last :]
    return len(newest) + sum(bool(settings.keep_every) and step % settings.keep_every == 0 for step in older)


def _si(number: float) -> str:
    """675129632 => "675.1 M"."""
    power = min(max(len(str(int(number))) - 1, 0) // 3, 7)
    return f"{number / 1000**power:.4g} {('', 'K', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}"


def _size(size: float) -> str:
    """Bytes in words, in GiB, MiB or KiB."""
    if size >= GIB:
        return f"{size / GIB:,.1f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
