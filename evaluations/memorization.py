"""Do samples repeat training images? The closest pairs as a picture, and how many are suspiciously close."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations.images import ImageSet
from evaluations.neighbours import nearest, neighbour_radii

GAP = 4  # pixels of white between pairs


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
    """reference (N, D), samples (M, D): pooled features."""
    found = nearest(reference, samples)
    radii = neighbour_radii(reference, k=1, rule="fp32")
    authenticity = (found.distances > radii[found.indices]).double().mean().item()
    order = found.distances.argsort()[:count]
    columns = (t.cpu().numpy() for t in (order, found.indices[order], found.distances[order]))
    return Pairs(*columns, authenticity)


def write_pairs(path: Path, pairs: Pairs, samples: ImageSet, reference: ImageSet, rows: np.ndarray) -> None:
    """A PNG of the pairs, sample left and reference right, closest first, in rows of four. rows: index in `reference`
    of each row of its features."""
    from PIL import Image

    left, right = samples.pick(pairs.samples), reference.pick(rows[pairs.reference])
    height = max(left.shape[1], right.shape[1])
    width = left.shape[2] + right.shape[2] + GAP
    across = min(4, len(left))
    down = -(-len(left) // across)
    sheet = np.full((down * (height + GAP), across * (width + GAP), 3), 255, dtype=np.uint8)
    for number, (sample, neighbour) in enumerate(zip(left, right, strict=True)):
        y, x = number // across * (height + GAP), number % across * (width + GAP)
        sheet[y : y + sample.shape[0], x : x + sample.shape[1]] = sample
        x += sample.shape[1]
        sheet[y : y + neighbour.shape[0], x : x + neighbour.shape[1]] = neighbour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
