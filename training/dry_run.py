"""What a run will be, in numbers, before it costs anything: printed by `--dry-run` and at the start of every run."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.units import duration, size_text
from config import UserError
from dataset import PackedDataset, StepSampler
from models.acceleration import check_norm_kernel
from models.cost import GPUS, USABLE, TrainingMemory, cost, named_gpu, step_cost, training_memory, vit_macs
from packed.format import read_manifest
from training.assumed import assumed_manifest, record_bytes
from training.checkpoints import superseded
from training.graph import WARM_UP, check
from training.initial import open_source
from training.launch import Processes, asked_precision, check_launcher, gpu_memory
from training.plan import Plan, make_plan
from training.settings import TrainConfig

USUAL_GPUS = ("A100", "H100", "H200")  # whose time is predicted where no GPU is named
GIB = 2**30
_ON = "on: compiling, the first step takes a minute or two"
COMPILE = {None: f"auto: off on a CPU, on a GPU {_ON}", True: _ON, False: "off"}

CUDA_GRAPH = (
    f"on: captured after {WARM_UP} steps; the memory of a step then stays reserved, and previews need theirs beside it"
)


def dry_run(settings: TrainConfig) -> str:
    """The plan in words, for --dry-run.

    Raises:
        UserError: a real start would be refused for its settings or dataset, or --gpu is not in the table.
    """
    precision = asked_precision(settings.mixed_precision)
    check_launcher(settings.gradient_accumulation_steps)
    gpus: tuple[str, ...] = USUAL_GPUS
    name = memory = None
    if settings.gpu is not None:
        name = named_gpu(settings.gpu)
        if name is None:
            raise UserError(f"--gpu {settings.gpu} is not in the table, choose from {', '.join(GPUS)}")
        gpus, memory = (name,), GPUS[name].memory * GIB
        settings = replace(settings, compile=settings.compile is not False)
        if precision == "auto":
            precision = "bf16" if GPUS[name].bf16 else "fp16"
    if settings.assume is not None:
        manifest = assumed_manifest(settings)
        settings = replace(settings, data_dir=Path(settings.assume))  # names it in messages
    assert settings.data_dir is not None
    if settings.assume is None:
        manifest = read_manifest(settings.data_dir)
    plan, world = make_plan(settings, manifest), int(os.environ.get("WORLD_SIZE", 1))
    if settings.cuda_graph:
        check(precision, world, None)
    if settings.norm_kernel:
        check_norm_kernel(plan.network.hidden_size, precision, None, settings.compile)
    check_shares(settings, world)
    if settings.assume is None:
        PackedDataset(settings.data_dir, plan.fields)  # finds missing files and impossible labels
    plan.class_means(settings.data_dir)  # there is none where the dataset is assumed
    open_source(settings, plan)
    settings = with_micro_batches(settings, plan, world, precision, memory)
    micro = settings.gradient_accumulation_steps
    StepSampler(manifest.count, settings.batch_size, seed=settings.seed, world=world, micro=micro)
    return _lines(Forecast(settings, plan, world, precision, gpus, name, memory).rows())


def check_shares(settings: TrainConfig, world: int) -> None:
    """Raise UserError where `world` processes cannot share the images of a step, or the samples of the Frechet probe."""
    if settings.batch_size % world:
        raise UserError(f"batch size {settings.batch_size} must be divisible by {world} processes")
    if settings.eval_every and settings.eval_samples < world:
        raise UserError(
            f"--eval-samples {settings.eval_samples}: fewer images than the {world} processes that share them"
        )


def with_micro_batches(
    settings: TrainConfig, plan: Plan, world: int, precision: str, memory: float | None
) -> TrainConfig:
    """The settings, with --micro-batch turned into gradient_accumulation_steps.

    Args:
        settings: as given.
        plan: made of them.
        world: processes, whose number divides the batch size.
        precision: "fp32", "fp16", "bf16" or "auto".
        memory: bytes of each GPU; None: not known, or a CPU, whose memory is not counted.

    Raises:
        UserError: it is neither a number nor auto, does not divide the batch, or no micro-batch fits.
    """
    if settings.micro_batch is None:
        return settings
    if settings.gradient_accumulation_steps != 1:
        raise UserError("--micro-batch and --gradient-accumulation-steps say the same thing: give one of them")
    images, flag = settings.batch_size // world, f"--micro-batch {settings.micro_batch}"
    if settings.micro_batch != "auto":
        if not settings.micro_batch.isdecimal() or int(settings.micro_batch) < 1:
            raise UserError(f"{flag} is neither a whole number of images nor auto")
        if images % int(settings.micro_batch):
            raise UserError(f"{flag} does not divide the {images} images per step of each of {world} processes")
        return replace(settings, gradient_accumulation_steps=images // int(settings.micro_batch))
    if memory is None:
        return settings
    forecast = Forecast(settings, plan, world, precision)
    steps = forecast.fitting(USABLE * memory, settings.gradient_checkpointing)
    if steps is None:
        needed = size_text(forecast.needed_memory(images, settings.gradient_checkpointing))
        raise UserError(
            f"{flag}: one image needs {needed} of the {size_text(USABLE * memory)} that the GPU has for tensors; use "
            "--gradient-checkpointing, a smaller --model or a larger GPU"
        )
    return replace(settings, gradient_accumulation_steps=steps)


def start_text(settings: TrainConfig, plan: Plan, processes: Processes, folder: Path) -> str:
    """The same plan for a run that starts now, with what it runs on and where it writes."""
    device, name, memory = "CPU", None, None
    gpus: tuple[str, ...] = ()
    if processes.device.type == "cuda":
        device = name = torch.cuda.get_device_name(processes.device)
        gpus = tuple(filter(None, [named_gpu(device)]))
        memory = gpu_memory(processes.device)
    forecast = Forecast(settings, plan, processes.world, processes.precision, gpus, name, memory)
    return _lines([*forecast.rows(), ("device", device), ("folder", str(folder))])


@dataclass(frozen=True)
class Forecast:
    """What a run needs and how long it takes on a machine.

    Attributes:
        world: processes.
        precision: "fp32", "fp16", "bf16", or "auto" where the GPU is not known.
        gpus: keys of models.cost.GPUS to predict the time for.
        name, memory: of the GPU to compare with, in bytes; None: there is nothing to compare with.
    """

    settings: TrainConfig
    plan: Plan
    world: int
    precision: str
    gpus: tuple[str, ...] = ()
    name: str | None = None
    memory: float | None = None

    def rows(self) -> list[tuple[str, str]]:
        """(name, text) of each line."""
        settings, plan, config, manifest = self.settings, self.plan, self.plan.network, self.plan.manifest
        counted, images = cost(config), settings.max_train_steps * settings.batch_size
        accumulation = settings.gradient_accumulation_steps
        slot = f"class token of width {config.class_token_dim}" if config.class_token_dim else "no class token"
        aligned = f"aligned after block {config.align_depth}" if config.align_dims else "no alignment"
        where = "run in the step" if plan.online else "cached in the dataset" if plan.cached else "none needed"
        checkpoint = 16 * (counted.parameters + counted.projector_parameters)
        saved = [*range(0, settings.max_train_steps, settings.checkpointing_steps)[1:], settings.max_train_steps]
        kept = len(saved) - len(superseded(saved, settings.keep_last, settings.keep_every))
        texts = {
            "dataset": f"{settings.data_dir}{' (assumed)' if settings.assume else ''}: {manifest.count:,} images of "
            f"{manifest.resolution} px, {len(manifest.classes)} classes, latents {config.in_channels} x "
            f"{config.input_size} x {config.input_size} of {plan.vae}, "
            f"{size_text(record_bytes(manifest) * manifest.count)} of records",
            "network": f"{config.depth} blocks of width {config.hidden_size}, {config.num_heads} heads, "
            f"{config.num_tokens} tokens ({config.num_patches} patches); {slot}; {aligned}",
            "encoders": ", ".join(plan.encoders) + (": " if plan.encoders else "") + where,
            "parameters": f"{_si(counted.parameters)}, and {_si(counted.projector_parameters)} in projectors",
            "compute": f"{_si(counted.flops)} multiply-adds per image forward, "
            f"{_si(counted.train_flops)}FLOP per training image, {_si(counted.train_flops * images)}FLOP in all",
            "steps": f"{settings.max_train_steps:,} of {settings.batch_size} images: {images:,} images, "
            f"{images / manifest.count:.1f} epochs",
            "processes": f"{self.world}, with micro-batches of {self._local(accumulation)} images, "
            f"{accumulation} per step",
            "precision": self._precision(),
            "compile": COMPILE[settings.compile] + "; Triton kernels for the norms" * settings.norm_kernel,
            "CUDA graph": CUDA_GRAPH if settings.cuda_graph else None,
            "memory": self._memory_text(),
            "GPU": self._comparison(self.memory) if self.memory is not None else None,
            "time": self._time_text(),
            "disk": f"{size_text(checkpoint)} per checkpoint, {size_text(checkpoint * kept)} for the {kept} kept",
        }
        return [(name, text) for name, text in texts.items() if text is not None]

    def needed_memory(self, accumulation: int, recompute: bool) -> float:
        """Bytes that one process needs on its GPU, without allocator slack and the CUDA context.

        Args:
            accumulation: micro-batches per step.
            recompute: gradient checkpointing.
        """
        return self._counted(recompute).total(self._local(accumulation)) + self._encoder_bytes()

    def fitting(self, usable: float, recompute: bool, least: int = 1) -> int | None:
        """The fewest micro-batches per step, at least `least`, that need no more than `usable` bytes; None: none does."""
        images = self.settings.batch_size // self.world
        for accumulation in range(least, images + 1):
            if images % accumulation == 0 and self.needed_memory(accumulation, recompute) <= usable:
                return accumulation
        return None

    def _local(self, accumulation: int) -> int:
        """Images of a micro-batch."""
        return self.settings.batch_size // (self.world * accumulation)

    def _counted(self, recompute: bool) -> TrainingMemory:
        return training_memory(self.plan.network, half=self.precision != "fp32", recompute=recompute)

    def _encoder_bytes(self) -> int:
        """Float32 weights of the encoders that run in the step."""
        return sum(4 * p.numel() for encoder in self.plan.online for p in encoder.parameters())

    def _precision(self) -> str:
        if self.precision == "auto":
            return "auto: bf16 where the GPU has it, else fp16; fp32 on the CPU"
        if self.settings.mixed_precision == "auto" and asked_precision("auto") != "auto":
            return f"{self.precision}, as accelerate's launcher asks"
        return self.precision

    def _memory_text(self) -> str:
        recompute = self.settings.gradient_checkpointing
        memory = self._counted(recompute)
        total = self.needed_memory(self.settings.gradient_accumulation_steps, recompute)
        encoders = f", {size_text(self._encoder_bytes())} of encoders" if self.plan.online else ""
        return (
            f"about {size_text(total)} per process: {size_text(memory.total(0))} of weights, gradients, AdamW and EMA"
            f"{encoders}, {size_text(memory.activations)} per image"
        )

    def _comparison(self, memory: float) -> str:
        """Whether a step fits the GPU, and if not, the settings that make it fit."""
        usable, now = USABLE * memory, self.settings.gradient_accumulation_steps
        needed = self.needed_memory(now, self.settings.gradient_checkpointing)
        text = f"{self.name}, {size_text(memory)}, of which {size_text(usable)} are for tensors: {size_text(needed)} "
        if needed <= usable:
            return text + "fit"
        ways = []
        for recompute in sorted({self.settings.gradient_checkpointing, True}):
            accumulation = self.fitting(usable, recompute, now)
            if accumulation is not None:
                flags = ["--gradient-checkpointing"] * (recompute and not self.settings.gradient_checkpointing)
                flags += [f"--gradient-accumulation-steps {accumulation}"] * (accumulation != now)
                ways.append(f"{' '.join(flags)} ({size_text(self.needed_memory(accumulation, recompute))})")
        if not ways:
            return text + "do not fit at any batch size: take a smaller --model or a larger GPU"
        return text + "do not fit: use " + ", or ".join(ways)

    def _time_text(self) -> str:
        predicted = {name: self._hours(name) for name in self.gpus}
        known = [
            f"{duration(hours * 3600)} on {self.world} {name}" for name, hours in predicted.items() if hours is not None
        ]
        if not known:
            what = "this precision without TF32" if predicted else self.name or "a CPU"
            return f"not predicted for {what}; metrics.jsonl says how many hours are left"
        return f"predicted {', '.join(known)}, by counted operations and traffic, without data loading and gradient exchange"

    def _hours(self, name: str) -> float | None:
        """Hours of the whole run on a kind of GPU; None for float32 without TF32, whose rate is not in the table."""
        gpu = GPUS[name]
        if self.precision == "fp32":
            if not (self.settings.allow_tf32 and gpu.bf16):
                return None
            gpu = gpu._replace(tflops=gpu.tflops / 2)  # TF32
        macs, recompute = sum(map(vit_macs, self.plan.online)), self.settings.gradient_checkpointing
        step = step_cost(self.plan.network, self._local(1), gpu, encoder_macs=macs, recompute=recompute)
        launching = self.settings.gradient_accumulation_steps * step.host  # of each micro-batch
        seconds = step.device if self.settings.cuda_graph else max(launching, step.device)
        return self.settings.max_train_steps * seconds / 3600


def _lines(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _si(number: float) -> str:
    """675129632 => "675.1 M"."""
    power = min(max(len(str(int(number))) - 1, 0) // 3, 7)
    return f"{number / 1000**power:.4g} {('', 'K', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}"
