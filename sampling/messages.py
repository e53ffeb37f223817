"""What generate.py says: what it will make, before it starts; how long all of it takes, after the first batch."""

import torch

from common.presets import PRESETS
from common.units import duration
from models.samplers import Solver
from sampling.job import Job

LONG = 600  # seconds; for jobs that take longer the quick preset is named


def what_it_makes(job: Job) -> str:
    """One line: number and size, solver, guidance, labels, arithmetic and device, folder."""
    settings, side = job.settings, job.model.info.resolution
    parts = [
        f"{_counted(settings.num_fid_samples, 'image')} of {side} x {side}",
        _solver(job.sampler.solver),
        _guidance(job),
        _token(job),
        _labels(job),
        _machine(job),
        f"to {settings.out}",
    ]
    return ", ".join(part for part in parts if part)


def how_long(job: Job, work: list[range], seconds: float, forwards: int) -> str | None:
    """One line after the first batch, or None when there is no other.

    Args:
        job: the job.
        work: the batches of all processes.
        seconds: that the first batch took, start-up included.
        forwards: network passes of each of its samples.
    """
    at_once = min(job.process.world, len(work))
    if len(work) == at_once:
        return None
    rate = len(work[0]) * at_once / seconds
    missing = sum(map(len, work))
    whole = "all" if missing == job.settings.num_fid_samples else "the remaining"
    text = (
        f"about {duration(missing / rate)} for {whole} {missing:,} images, judged by the first batch "
        f"({rate:.2g} images/s, start-up included)"
    )
    preview = PRESETS["preview"]
    if missing / rate > LONG and job.settings.preset != "preview":
        passes = preview["num_fid_samples"] * 2 * preview["num_steps"]  # guided: two for each step
        quick = duration(passes * seconds / (len(work[0]) * forwards))
        text += f"; --preset preview makes {preview['num_fid_samples']} in about {quick}"
    return text


def _counted(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _solver(solver: Solver) -> str:
    if solver.name == "dopri5":
        return f"ODE dopri5 (rtol {solver.rtol:g}, atol {solver.atol:g})"
    grid = "" if solver.grid == "uniform" else f" ({solver.grid} grid)"
    return f"{solver.mode.upper()} {solver.name} {solver.num_steps} steps{grid}"


def _guidance(job: Job) -> str:
    if job.sampler.guidance.off:
        why = ", as the model was trained without label dropout (cfg-prob 0)" if job.left_unguided else ""
        return "unguided" + why
    names = ("cfg_scale", "guidance_low", "guidance_high")
    latent, token = ([job.identity[prefix + name] for name in names] for prefix in ("", "cls_"))
    text = "{}guidance {:g} on t in [{:g}, {:g}]".format("auto" if job.sampler.guide else "", *latent)
    if job.model.info.network.class_token_dim and token != latent:
        text += " (class token {:g} on [{:g}, {:g}])".format(*token)
    return text


def _token(job: Job) -> str:
    if job.settings.like:
        return f"class token of {' '.join(job.settings.like)}"
    return f"best of {job.settings.best_of}" if job.settings.best_of > 1 else ""


def _labels(job: Job) -> str:
    classes = _counted(len(job.settings.classes) or job.model.info.network.num_classes, "class")
    return {
        "random": f"random labels of {classes}",
        "balanced": f"labels balanced over {classes}",
        "spread": f"labels spread over {classes}",
        "list": f"{_counted(len(job.labels.values), 'given label')} in turn",
        "null": "no labels",
        "token": "labels by the tokens",
    }[job.labels.kind]


def _machine(job: Job) -> str:
    settings, process = job.settings, job.process
    cuda = process.device.type == "cuda"
    tf32 = " (TF32)" if cuda and settings.tf32 and settings.dtype == "fp32" else ""
    count = f"{process.world} x " if process.world > 1 else ""
    return f"{settings.dtype}{tf32} on {count}{torch.cuda.get_device_name(process.device) if cuda else 'cpu'}"
