"""Frechet distance of the EMA's samples while it trains: a few thousand, from the same noise and labels every time."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import rank, world
from common.reporting import progress
from config import UserError
from evaluations import features
from evaluations.collect import collect, statistics_of
from evaluations.image_sets import open_images
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


class FrechetProbe:
    """Compares unguided samples with a reference set in one feature space. All ranks share the work."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        *,
        reference: Path,
        space: str,
        count: int,
        resolution: int | None = None,
    ) -> None:
        """Load the feature network and measure the reference.

        Args:
            autoencoder: decodes the samples.
            device: of network, autoencoder and features.
            reference: npz, image folder or packed dataset.
            space: as for evaluate.py --features.
            count: of samples.
            resolution: what a folder of images of several sizes is cropped to.

        Raises:
            UserError: weights or images are missing, or there are fewer images than ranks.
        """
        self.autoencoder, self.device, self.count = autoencoder, device, count
        self.extractor = features.load(space, device=device)
        images = open_images([reference], fallback=resolution)
        if count < world():
            raise UserError(f"--eval-samples {count}: fewer images than the {world()} processes that share them")
        if images.statistics and "pooled" in images.statistics and self.extractor.space == "inception":
            self.reference = images.statistics["pooled"]
        else:
            words = f"reference {reference}"
            with without_tf32():
                found = collect(images, self.extractor, batch_size=BATCH, keep=0, progress=words)
            self.reference = found.statistics("pooled")

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
    ) -> float:
        """The Frechet distance, in every process; features are computed without TF32, as evaluate.py does.

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

        # the bar shows rank 0's part of the work; the others' parts are as large
        words = f"sampling {self.count} images for the Frechet distance"
        with progress(len(batches) * steps, unit="step", description=words, shown=rank() == 0) as bar, without_tf32():
            return frechet_distance(self.reference, statistics_of(sampled(bar), self.extractor))
