"""Frechet distance of the EMA's samples while it trains: a few thousand, from the same noise and labels every time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import rank, world
from common.reporting import progress
from config import UserError
from evaluations import features
from evaluations.collect import collect_batches
from evaluations.images import open_images
from evaluations.metrics import frechet_distance
from evaluations.statistics import Statistics
from models.autoencoder import Autoencoder
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.sit import SiT
from training import previews

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
        self.reference = self._reference_statistics(reference, resolution)

    @torch.no_grad()
    def measure(self, network: SiT, interpolant: Interpolant, *, seed: int, steps: int) -> float:
        """The Frechet distance, in every process."""
        labels = previews.preview_labels(network.config.num_classes, self.count).to(self.device)
        batches = _own_rows(self.count)

        def sampled(bar: tqdm) -> Iterator[Tensor]:
            for rows in batches:
                index = rows.to(self.device)
                state = previews.sample(
                    network,
                    interpolant,
                    labels[index],
                    FIRST_INDEX + index,
                    seed=seed,
                    steps=steps,
                    guidance=Guidance(),
                    progress=lambda done: bar.update(),
                )
                yield self.autoencoder.decode(state.latent)

        words = f"sampling {self.count} images for the Frechet distance"
        with _bar(len(batches) * steps, "step", words) as bar:
            return frechet_distance(self.reference, collect_batches(sampled(bar), self.extractor))

    def _reference_statistics(self, path: Path, resolution: int | None) -> Statistics:
        images = open_images([path], fallback=resolution)
        if images.statistics and "pooled" in images.statistics and self.extractor.space == "inception":
            return images.statistics["pooled"]
        batches = _own_rows(len(images))

        def read(bar: tqdm) -> Iterator[Tensor]:
            for rows in batches:
                yield torch.from_numpy(images.read(int(rows[0]), int(rows[-1]) + 1).copy()).permute(0, 3, 1, 2)
                bar.update(len(rows))

        with _bar(sum(map(len, batches)), "image", f"reference {path}") as bar:
            return collect_batches(read(bar), self.extractor)


def _bar(total: int, unit: str, description: str) -> tqdm:
    """Of rank 0's part of the work; the others' parts are as large."""
    return progress(total, unit=unit, description=description, shown=rank() == 0)


def _own_rows(count: int) -> tuple[Tensor, ...]:
    """Batches of this rank's stretch of the numbers below `count`."""
    if count < world():
        raise UserError(f"there are {count} images to compare, fewer than the {world()} processes that share them")
    return torch.arange(count).tensor_split(world())[rank()].split(BATCH)
