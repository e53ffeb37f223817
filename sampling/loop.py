"""The sampling loop: the batches of one process, kept one by one, and a bar of the images of all processes."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from common.pictures import write_png
from common.reporting import progress
from sampling.assemble import png_file
from sampling.labels import share
from sampling.messages import how_long
from sampling.parts import Parts
from sampling.sampler import Drawn

if TYPE_CHECKING:
    from sampling.job import Job

_SOLVED = 0.95  # of a batch's work when its solver is through; the rest is decoding and writing
_SECONDS_BETWEEN_LOOKS = 1.0  # at what the other processes have finished


class Images:
    """The finished images of all processes, on a bar; those of this process move with the solver's steps.

    bar: total is the number of samples. parts: what is on disk. mine: the batches of this process.
    """

    def __init__(self, bar: tqdm, parts: Parts, mine: list[range]) -> None:
        self.bar, self.parts, self.mine = bar, parts, frozenset(mine)
        self.written = 0  # by this process
        self.solved = 0  # by this process, still to be decoded or written
        self._others, self._looked = 0, float("-inf")

    def show(self, batch: int = 0, fraction: float = 0.0) -> None:
        """Move the bar. batch: images of the present batch. fraction: of its solver steps that are done."""
        if self.bar.disable:
            return
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._others = sum(len(samples) for samples in self.parts.done() if samples not in self.mine)
            self._looked = time.monotonic()
        done = min(self._others + self.written + _SOLVED * (self.solved + fraction * batch), self.bar.total)
        self.bar.n = max(self.bar.n, int(done) if done == int(done) else round(done, 1))
        self.bar.update(0)


def sample_parts(job: "Job", parts: Parts, work: list[range], say: Callable[[str], object]) -> None:
    """Sample this process's share of the batches.

    A second thread decodes and writes one batch while the next is sampled.

    work: the batches of all processes. say: takes the estimate of the whole, after the first process's first batch.
    """
    request, process = job.request, job.process
    mine = share(work, process.rank, process.world)
    if request.png:
        (request.out / "png").mkdir(exist_ok=True)
    stream = torch.cuda.Stream() if process.device.type == "cuda" else None
    waiting: Future | None = None
    start = time.monotonic()
    finished = sum(map(len, parts.done()))
    with (
        ThreadPoolExecutor(1) as pool,
        progress(request.count, unit="image", description="sampling", initial=finished, shown=process.first) as bar,
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
            waiting = pool.submit(_keep, job, parts, samples, label, drawn, stream, ready)
            if process.first and samples == mine[0]:
                waiting.add_done_callback(partial(_say_how_long, job, work, start, drawn.forwards, say))
        if waiting:
            images.written += waiting.result()
            images.solved = 0
        images.show()
        while process.first and sum(map(len, parts.done())) < request.count:  # the others are still at it
            images.show()
            time.sleep(0.2)
        images.bar.n = request.count
        images.bar.update(0)


def _say_how_long(
    job: "Job", work: list[range], start: float, forwards: int, say: Callable[[str], object], batch: Future
) -> None:
    """Called when the first batch is on disk, or failed."""
    text = None if batch.exception() else how_long(job, work, time.monotonic() - start, forwards)
    if text:
        say(text)


def _keep(
    job: "Job",
    parts: Parts,
    samples: range,
    label: Tensor,
    drawn: Drawn,
    stream: torch.cuda.Stream | None,
    ready: torch.cuda.Event | None,
) -> int:
    """Decode and write one batch, on a GPU in a stream of its own. Returns its number of images."""
    with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
        if stream and ready:
            stream.wait_event(ready)
            drawn.state.map(lambda x: x.record_stream(stream) or x)
        arrays = job.arrays(label, drawn)
    if job.request.png:
        for number, pixels in zip(samples, arrays["pixels"], strict=True):
            write_png(png_file(job.request.out / "png", number), pixels)
    parts.write(samples, arrays)
    return len(samples)
