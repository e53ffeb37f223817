"""Do samples repeat training images? The closest pairs as a picture, and how many are suspiciously close."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.pictures import Cell, Line, write_sheet
from evaluations.image_sets import ImageSet
from evaluations.neighbours import nearest, neighbour_radii

PAIRS_PER_ROW = 4


class Pairs(NamedTuple):
    """The `count` samples closest to a reference image: indices (count,) of both, squared distances (count,).

    authenticity (Alaa et al. 2022): share of all samples farther from their nearest reference image than that image is
    from its own nearest neighbour; near 0 for copies, above 0.5 for data as new as the reference itself.
    """

    samples: np.ndarray
    reference: np.ndarray
    distances: np.ndarray
    authenticity: float


def closest_pairs(reference: torch.Tensor, samples: torch.Tensor, count: int) -> Pairs:
    """The pairs of samples (M, D) and reference images (N, D), given their pooled features."""
    found = nearest(reference, samples)
    radii = neighbour_radii(reference, k=1, rule="fp32")
    authenticity = (found.distances > radii[found.indices]).double().mean().item()
    order = found.distances.argsort()[:count]
    columns = [t.cpu().numpy() for t in (order, found.indices[order], found.distances[order])]
    return Pairs(columns[0], columns[1], columns[2], authenticity)


class Copying(NamedTuple):
    """How often a sample is nearer to the training images than a held-out image is: 1/2 for samples as new as those.

    share: over all pairs of a sample and a held-out image (the U statistic of Meehan et al. 2020 over its largest value).
    error: its standard deviation where both are equally new.
    """

    share: float
    error: float

    def warning(self) -> str | None:
        """A plain sentence where samples are nearer by more than 3 standard deviations."""
        if self.share - 0.5 <= 3 * self.error:
            return None
        return (
            f"samples are nearer to training images than held-out images are (in {self.share:.0%} of all pairs, 50 % "
            "expected): the model repeats training images; stop earlier, or train on more"
        )


def copying(training: torch.Tensor, held_out: torch.Tensor, samples: torch.Tensor) -> Copying:
    """Compare the distances of samples (M, D) and held-out images (K, D) to their nearest training images (N, D).

    Args:
        training, held_out, samples: pooled features on one device.
    """
    ours, theirs = (nearest(training, points).distances.cpu() for points in (samples, held_out))
    ordered = theirs.sort().values
    below, up_to = (torch.searchsorted(ordered, ours, right=right).double() for right in (False, True))
    share = 1 - ((below + up_to) / 2).mean().item() / len(ordered)
    return Copying(share, ((len(ours) + len(ordered) + 1) / (12 * len(ours) * len(ordered))) ** 0.5)


def write_pairs(path: Path, pairs: Pairs, samples: ImageSet, reference: ImageSet, rows: np.ndarray) -> None:
    """Write a PNG of the pairs, sample left and reference right, closest first.

    Args:
        path: file to write.
        pairs: indices into the features.
        samples, reference: the images.
        rows: (K,) index in `reference` of each row of its features.
    """
    numbers = rows[pairs.reference]
    left, right = samples.pick(pairs.samples), reference.pick(numbers)
    cells = []
    for sample, number, distance, *pixels in zip(pairs.samples, numbers, pairs.distances, left, right):
        cells.append(Cell(pixels[0], (Line(f"sample {sample}"),)))
        cells.append(Cell(pixels[1], (Line(f"reference {number}"), Line(f"at {distance**0.5:.3g}"))))
    width = 2 * PAIRS_PER_ROW
    write_sheet(path, [cells[start : start + width] for start in range(0, len(cells), width)])
