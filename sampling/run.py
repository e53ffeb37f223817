"""Sampling from start to end: agree on the work, sample and keep part after part, assemble the files."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import WriteError, check_space, read_json
from common.pictures import write_png
from common.processes import Processes, gather, on_first, share
from common.reporting import progress, say
from common.units import size_text
from config import UserError, differences, identity
from models.obtain import obtain
from sampling import messages
from sampling.assemble import SIDECAR, TOKENS, assemble, is_finished, png_file, restore_pictures
from sampling.job import Job, load
from sampling.parts import SETTINGS, Parts, refuse_mixing
from sampling.sampler import Drawn, guidance_of, solver_of
from sampling.settings import SampleConfig, resolved
from sampling.work import batches

_SOLVED = 0.95  # of a batch's work when its solver is through; the rest is decoding and writing
_PLAIN = ("seed", "mode", "solver", "steps", "time_grid", "shift", "t_last", "diffusion", "last_step")  # settings
_SECONDS_BETWEEN_LOOKS = 1.0  # at what the other ranks have finished


def generate(settings: SampleConfig) -> None:
    """Sample what is missing of a job, on all ranks; rank 0 assembles the files."""
    plain = resolved(settings)
    solver_of(plain), guidance_of(plain)  # bad values are refused before anything is looked for
    process = Processes(settings.device)
    with closing(Parts(settings.out / "parts")) as parts:
        begun = on_first(lambda: _begin(settings, process, parts))
        agreed = share((begun[0].settings, begun[1]) if begun else None)
        if agreed is None:
            return
        if not process.first:
            parts.claim(joins=True)  # a rank may outlive the others
        job, work = begun or (load(agreed[0], process), agreed[1])
        _compare(job)
        start = time.monotonic()  # from here on the ranks meet only in the folder of parts
        sample_parts(job, parts, work)
        if process.first:
            seconds, made = time.monotonic() - start, sum(map(len, work))
            measured = {
                "vae": job.autoencoder.name,
                "checkpoint": str(job.settings.checkpoint),
                "per_proc_batch_size": settings.per_proc_batch_size,
                "processes": process.world,
                "device": torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu",
                "seconds": round(seconds, 2),
                "samples_per_second": round(made / seconds, 4) if made else None,
            }
            say(assemble(job, parts, measured))


def _begin(settings: SampleConfig, process: Processes, parts: Parts) -> tuple[Job, list[range]] | None:
    """Rank 0 loads first and says what there is to do: the job and the missing batches, or None if nothing is missing.

    Raises:
        UserError: the folder belongs to another job or to other settings, or the disk is too small.
    """
    with suppress(WriteError):  # a folder that is complete may be read-only; `begin` reports it for others
        parts.claim()  # refused before anything is loaded
    _refuse_other_solver(settings, parts)
    guide = settings.guide_checkpoint
    found = replace(settings, checkpoint=obtain(settings.checkpoint), guide_checkpoint=guide and obtain(guide))
    job = load(found, process)
    out, count, side = settings.out, settings.num_fid_samples, job.model.info.resolution
    wanted = [TOKENS] if settings.class_tokens else []
    if is_finished(out, count, job.identity, wanted, have_parts=bool(parts.done())):
        restore_pictures(job)
        if not settings.keep_parts:
            parts.remove()  # those that a kill at the very end has left
        say(f"{out} is complete: {count} samples with these settings are there")
        return None

    def missing() -> list[range]:
        size, aligned = settings.per_proc_batch_size, job.identity["batches"] is not None
        return batches(parts.done(), count, size, aligned=aligned)

    row = side * side * 3 + 4 * job.model.info.network.class_token_dim
    needed = row * (count + sum(map(len, missing())))
    free = check_space("--out", out, needed)
    parts.begin(job.identity)
    work = missing()  # without the damaged parts
    left = sum(map(len, work))
    say(messages.what_it_makes(job))
    resumed = f"{left:,} of them are still to be made; " if left < count else ""
    say(f"{resumed}disk: {size_text(needed)} needed, {size_text(free)} free")
    return job, work


def _refuse_other_solver(settings: SampleConfig, parts: Parts) -> None:
    """Raise OtherSettings, before anything is loaded, where the folder's samples have another seed or solver.

    What a model decides (guidance, labels, precision) is compared after it is loaded.
    """
    now = identity(resolved(settings))
    now["steps"] = now.pop("num_steps")
    for folder, name in ((settings.out, SIDECAR), (parts.folder, SETTINGS)):
        before: dict[str, Any] = {}
        with suppress(UserError):  # missing, or damaged, of which more later
            before = read_json(folder / name)
        if isinstance(before, dict):
            known = [key for key in _PLAIN if key in before]
            refuse_mixing(folder, {key: before[key] for key in known}, {key: now[key] for key in known})


def _compare(job: Job) -> None:
    """Raise UserError where a rank has loaded something else than rank 0: another file of the same name, for one."""
    first, *others = gather(job.identity)
    for rank, other in enumerate(others, start=1):
        for name, expected, found in differences(first, other):
            raise UserError(
                f"rank {rank} has {name} = {found} and rank 0 has {expected}: all ranks need the same files"
            )


class Images:
    """The finished images of all ranks, on a bar; those of this rank move with the solver's steps.

    bar: total is the number of samples. parts: what is on disk. mine: the batches of this rank.
    """

    def __init__(self, bar: tqdm, parts: Parts, mine: list[range]) -> None:
        self.bar, self.parts, self.mine = bar, parts, frozenset(mine)
        self.written = 0  # by this rank
        self.solved = 0  # by this rank, still to be decoded or written
        self._others, self._looked = 0, float("-inf")

    def show(self, batch: int = 0, fraction: float = 0.0) -> None:
        """Move the bar. batch: images of the present batch. fraction: of its solver steps that are done."""
        if self.bar.disable:
            return
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._others = sum(len(samples) for samples in self.parts.done() if samples not in self.mine)
            self._looked = time.monotonic()
        done = min(self._others + self.written + _SOLVED * (self.solved + fraction * batch), float(self.bar.total or 0))
        self.bar.n = max(self.bar.n, int(done) if done == int(done) else round(done, 1))
        self.bar.update(0)


def sample_parts(job: Job, parts: Parts, work: list[range]) -> None:
    """Sample this rank's share of the batches; `work` are those of all ranks.

    A second thread, on a GPU in a stream of its own, decodes and writes one batch while the next is sampled. After the first
    batch rank 0 says how long all of them will take.
    """
    settings, process = job.settings, job.process
    mine = work[process.rank :: process.world]
    stream = torch.cuda.Stream() if process.device.type == "cuda" else None
    waiting: Future[int] | None = None
    start = time.monotonic()
    count, finished = settings.num_fid_samples, sum(map(len, parts.done()))

    def keep(samples: range, label: Tensor, drawn: Drawn, ready: torch.cuda.Event | None) -> int:
        with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
            if stream and ready:
                stream.wait_event(ready)
                drawn.state.map(lambda x: x.record_stream(stream) or x)
            arrays = job.arrays(label, drawn)
        if settings.png:
            for number, pixels in zip(samples, arrays["pixels"], strict=True):
                write_png(png_file(settings.out, number), pixels)
        parts.write(samples, arrays)
        if process.first and samples == mine[0]:
            text = messages.how_long(job, work, time.monotonic() - start, drawn.forwards)
            if text:
                say(text)
        return len(samples)

    with (
        ThreadPoolExecutor(1) as pool,
        progress(count, unit="image", description="sampling", initial=finished, shown=process.first) as bar,
    ):
        images = Images(bar, parts, mine)
        for samples in mine:
            label, drawn = job.sample(samples, partial(images.show, len(samples)))
            ready = torch.cuda.Event() if stream else None
            if ready:
                ready.record()
            if waiting:
                images.written += waiting.result()
            images.solved = len(samples)
            waiting = pool.submit(keep, samples, label, drawn, ready)
        if waiting:
            images.written += waiting.result()
            images.solved = 0
        images.show()
        while process.first and sum(map(len, parts.done())) < count:  # the others are still at it
            images.show()
            time.sleep(0.2)
        bar.n = count
        bar.update(0)
