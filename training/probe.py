"""Frechet distance of the EMA's samples while it trains: a few thousand, from the same noise and labels every time."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import gather_rows, rank, world
from common.reporting import progress
from evaluations import features
from evaluations.collect import collect, statistics_of
from evaluations.image_sets import open_images
from evaluations.memorization import Copying, copying
from evaluations.metrics import frechet_distance
from models.acceleration import without_tf32
from models.autoencoder import Autoencoder
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.sit import SiT
from training import previews
from training.interrupt import Stopped

FIRST_INDEX = 1 << 20  # of the noise; previews have the numbers from 0 on
BATCH = 32  # images
KEPT = 10_000  # images of reference and training images that samples are compared with one by one


class Probed(NamedTuple):
    """The Frechet distance, and how near samples are to the training images, where that is measured."""

    distance: float
    copying: Copying | None


class FrechetProbe:
    """Compares unguided samples with a reference set in one feature space. All ranks share the work."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        *,
        reference: Path,
        training: Path | None = None,
        space: str,
        count: int,
        resolution: int | None = None,
    ) -> None:
        """Load the feature network and measure the reference.

        Args:
            autoencoder: decodes the samples.
            device: of network, autoencoder and features.
            reference: npz, image folder or packed dataset.
            training: the same for the images trained on, with `reference` held out; None: not compared with.
            space: as for evaluate.py --features.
            count: of samples, at least one for each rank.
            resolution: what a folder of images of several sizes is cropped to.

        Raises:
            UserError: weights or images are missing, or there are fewer of these images than ranks.
        """
        self.autoencoder, self.device, self.count = autoencoder, device, count
        self.extractor = features.load(space, device=device)
        images = open_images([reference], fallback=resolution)
        self.training = self.held_out = None
        known = (images.statistics or {}).get("pooled")
        if known is not None and training is None and self.extractor.space == "inception":
            self.reference = known
            return
        keep = 0 if training is None else KEPT
        measured = partial(collect, extractor=self.extractor, batch_size=BATCH, keep=keep)
        with without_tf32():
            found = measured(images, progress=f"reference {reference}")
            self.reference = found.statistics("pooled")
            if training is not None:
                self.held_out, learned = found.pooled, open_images([training], fallback=resolution)
                self.training = measured(learned, progress=f"training images {training}").pooled

    @torch.no_grad()
    def measure(
        self,
        network: SiT,
        interpolant: Interpolant,
        *,
        seed: int,
        steps: int,
        precision: str = "fp32",
        requested: Callable[[], str | None] = lambda: None,
    ) -> Probed:
        """The Frechet distance, in every process, and on rank 0 the nearness to the training images.

        Features are computed without TF32, as evaluate.py does; samples are made as the run's previews are.

        Args:
            network: is sampled from.
            interpolant: of its training.
            seed: of the noise.
            steps: of the SDE.
            precision: of the run; see `previews.sample`.
            requested: why to stop, the same in every process; asked between batches.

        Raises:
            Stopped: a stop was requested.
        """
        labels = previews.preview_labels(network.config.num_classes, self.count).to(self.device)
        batches = torch.arange(self.count).tensor_split(world())[rank()].split(BATCH)
        most = math.ceil(math.ceil(self.count / world()) / BATCH)  # batches of any process

        def sampled(bar: tqdm) -> Iterator[Tensor]:
            for number in range(most):
                if reason := requested():
                    raise Stopped(reason)
                if number == len(batches):  # others have one more
                    return
                index = batches[number].to(self.device)
                state = previews.sample(
                    network,
                    interpolant,
                    labels[index],
                    FIRST_INDEX + index,
                    seed=seed,
                    steps=steps,
                    guidance=Guidance(),
                    precision=precision,
                    progress=lambda done: bar.update(),
                )
                yield self.autoencoder.decode(state.latent)

        rows: list[Tensor] = []

        def extract(pixels: Tensor) -> features.Features:
            with without_tf32():
                found = self.extractor(pixels)
            if self.training is not None:
                rows.append(found.pooled.float().cpu())
            return found

        # the bar shows rank 0's part of the work; the others' parts are as large
        words = f"sampling {self.count} images for the Frechet distance"
        with progress(len(batches) * steps, unit="step", description=words, shown=rank() == 0) as bar:
            distance = frechet_distance(self.reference, statistics_of(sampled(bar), extract))
        if self.training is None or self.held_out is None:
            return Probed(distance, None)
        samples = gather_rows(torch.cat(rows))
        return Probed(distance, copying(self.training, self.held_out, samples) if rank() == 0 else None)
