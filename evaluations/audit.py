"""What makes the numbers of a set of samples doubtful: copies, flat images, wrong ranges, sorted classes, small sets."""

import hashlib

import numpy as np
import torch

from common.processes import gather, gather_rows
from evaluations.image_sets import ImageSet

PAPER_IMAGES = 50_000  # FID and IS depend on the number of images; papers use this one


class Auditor:
    """Looks for copies, flat images and wrong ranges, batch by batch."""

    def __init__(self) -> None:
        self.flat, self.lowest, self.highest = 0, 255, 0
        self._hashes: list[int] = []

    def update(self, images: np.ndarray) -> None:
        """Add uint8 images (B, H, W, 3)."""
        rows = np.ascontiguousarray(images.reshape(len(images), -1))
        low, high = rows.min(1), rows.max(1)
        self.flat += int((low == high).sum())
        self.lowest, self.highest = min(self.lowest, int(low.min())), max(self.highest, int(high.max()))
        for row in rows:
            digest = hashlib.blake2b(row.data, digest_size=8).digest()
            self._hashes.append(int.from_bytes(digest, "little", signed=True))

    def warnings(self) -> list[str]:
        """One sentence for each thing that is suspicious in the images of all ranks, on rank 0; call it on every rank."""
        hashes = gather_rows(torch.tensor(self._hashes, dtype=torch.int64))
        flat, lowest, highest = zip(*gather((self.flat, self.lowest, self.highest)))
        n, copies, low, high = len(hashes), len(hashes) - len(hashes.unique()), min(lowest), max(highest)
        warnings = [f"{sum(flat)} of {n} samples are a single colour"] if any(flat) else []
        if copies:
            warnings.append(f"{copies} of {n} samples are copies of others")
        if high <= 1:
            warnings.append(f"pixels span {low} to {high}: values in [0, 1] cast to uint8?")
        elif high - low < 128:
            warnings.append(f"pixels span {low} to {high} of 0 to 255")
        return warnings


def sorted_share(classes: np.ndarray) -> float:
    """How far images of one class lie together in file order: 0 for a random order, 1 for a sorted one.

    (share of neighbours with equal class - share expected by chance) / (1 - that), for classes (N,).
    """
    n = len(classes)
    _, counts = np.unique(classes, return_counts=True)
    if len(counts) < 2:
        return 0.0
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    largest = (n - len(counts)) / (n - 1)  # what a sorted file reaches
    equal = float((classes[1:] == classes[:-1]).mean())
    return (equal - chance) / (largest - chance) if largest > chance else 0.0


def set_warnings(samples: ImageSet, reference: ImageSet | None, classes: np.ndarray | None, split: int) -> list[str]:
    """One sentence for each property of the sets by which the numbers differ from a paper's.

    Args:
        samples, reference: the two sides; no reference if none was given.
        classes: (N,) labels or predicted classes of the samples where Inception is among the feature spaces, else None.
        split: images per chunk of the Inception Score.
    """
    n, warnings = len(samples), []
    if n < PAPER_IMAGES:
        warnings.append(
            f"only {n:,} samples: FID is overestimated and cannot be compared with papers ({PAPER_IMAGES:,})"
        )
    # statistics that come with a file are of a larger set than the images in it
    if classes is not None and reference is not None and not reference.statistics and len(reference) < 2048:
        warnings.append(f"the reference has {len(reference)} images, fewer than the 2048 dimensions of Inception")
    if classes is not None and sorted_share(classes) > 0.5:
        consequence = f"IS uses chunks of {split} in file order and comes out wrong" if n > split else "shuffle them"
        warnings.append(f"the samples are sorted by class: {consequence}")
    if reference is not None and len(reference) and reference.shape[1:] != samples.shape[1:]:
        sizes = " and ".join(f"{s.shape[1]} x {s.shape[2]}" for s in (samples, reference))
        warnings.append(f"samples and reference differ in size: {sizes}")
    if samples.sidecar is None:
        warnings.append(f"no JSON beside {samples.name} says how the samples were made")
    return warnings
