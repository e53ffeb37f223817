"""Frechet distance of the EMA's samples while it trains: a few thousand of them, the same noise and labels every time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.reporting import progress
from config import UserError
from evaluations import features
from evaluations.image_sets import open_images
from evaluations.metrics import frechet_distance
from evaluations.statistics import Moments, Statistics
from models.autoencoder import Autoencoder
from models.guidance import Guidance
from models.interpolant import Interpolant
from models.sit import SiT
from training import previews
from training.launch import Processes

FIRST_INDEX = 1 << 20  # of the noise; previews have the numbers from 0 on


class FrechetProbe:
    """Compares unguided samples with a reference set in one feature space. All processes share the work."""

    def __init__(
        self,
        processes: Processes,
        autoencoder: Autoencoder,
        *,
        reference: Path,
        space: str,
        count: int,
        batch: int = 32,
        resolution: int | None = None,
    ) -> None:
        """reference: npz, image folder or packed dataset. space: as for evaluate.py --features. resolution: what a folder of
        images of several sizes is cropped to.

        Raises FileNotFoundError or ValueError naming what is missing.
        """
        self.processes, self.autoencoder, self.count, self.batch = processes, autoencoder, count, batch
        self.extractor = features.load(space, device=processes.device)
        self.reference = self._reference_statistics(reference, resolution)

    @torch.no_grad()
    def measure(self, network: SiT, interpolant: Interpolant, *, seed: int, steps: int) -> float:
        """The Frechet distance, in every process."""
        labels = previews.preview_labels(network.config.num_classes, self.count).to(self.processes.device)
        moments, batches = None, list(self._mine(self.count))
        with self._bar(len(batches) * steps, "step", f"sampling {self.count} images for the Frechet distance") as bar:
            for rows in batches:
                index = rows.to(labels.device)
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
                moments = self._add(moments, self.autoencoder.decode(state.latent))
        return frechet_distance(self.reference, self._whole(moments))

    def _reference_statistics(self, path: Path, resolution: int | None) -> Statistics:
        images = open_images([path], fallback=resolution)
        if images.statistics and "pooled" in images.statistics and self.extractor.space == "inception":
            return images.statistics["pooled"]
        moments, batches = None, list(self._mine(len(images)))
        with self._bar(sum(map(len, batches)), "image", f"reference {path}") as bar:
            for rows in batches:
                pixels = torch.from_numpy(images.read(int(rows[0]), int(rows[-1]) + 1).copy()).permute(0, 3, 1, 2)
                moments = self._add(moments, pixels)
                bar.update(len(rows))
        return self._whole(moments)

    def _bar(self, total: int, unit: str, description: str) -> tqdm:
        """Of the main process's part of the work; the others' parts are as large."""
        return progress(total, unit=unit, description=description, shown=self.processes.is_main)

    def _mine(self, count: int) -> Iterator[Tensor]:
        """Batches of this process's stretch of the numbers below count."""
        share = torch.arange(count).tensor_split(self.processes.world)[self.processes.rank]
        return iter(share.split(self.batch)) if len(share) else iter(())

    def _add(self, moments: Moments | None, pixels: Tensor) -> Moments:
        pooled = self.extractor(pixels).pooled
        moments = moments or Moments(pooled.shape[1], pooled.device)
        moments.update(pooled.double())
        return moments

    def _whole(self, moments: Moments | None) -> Statistics:
        if moments is None:
            raise UserError(f"there are fewer images than the {self.processes.world} processes that are to share them")
        if self.processes.world > 1:
            moments.all_reduce()
        return moments.statistics()
