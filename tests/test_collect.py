"""One pass over a set: features and their sums, and the audit of the images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from evaluations import measure
from evaluations.audit import Auditor, set_warnings, sorted_share
from evaluations.collect import collect, statistics_of
from evaluations.image_sets import ImageSet, open_images
from evaluations.metrics import frechet_distance
from evaluations.statistics import compute_statistics
from tests.toy_images import averages, pixels


def test_collect_equals_the_metrics_of_all_features(tmp_path):
    """Groups, batches and kept rows change nothing in the statistics of the whole."""
    images = pixels(50)
    np.savez(tmp_path / "s.npz", images)
    source, extractor = open_images([tmp_path / "s.npz"]), averages()
    whole = extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).pooled
    expected = compute_statistics(whole)
    for batch_size, groups in ((1, 1), (16, 5), (64, 3)):
        found = collect(source, extractor, batch_size=batch_size, groups=groups)
        assert torch.equal(found.pooled, whole)
        assert frechet_distance(expected, found.statistics("pooled")) < 1e-9
        np.testing.assert_allclose(found.statistics("pooled").covariance, expected.covariance, rtol=1e-12)
    assert torch.equal(collect(source, extractor, batch_size=8, keep=10).pooled, whole[:10])


def test_a_part_of_a_folder_is_taken_evenly(tmp_path):
    """Neighbour metrics on a part of a sorted folder use images of all classes."""
    for number, image in enumerate(pixels(30, size=8)):
        folder = tmp_path / f"class{number // 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    source = open_images([tmp_path])
    kept = collect(source, averages(), batch_size=7, keep=6).pooled
    whole = collect(source, averages(), batch_size=7).pooled
    rows = [i for i in range(30) if (whole[i] == kept[:, None]).all(-1).any()]
    assert len(kept) == 6 and [sum(r // 10 == c for r in rows) for c in range(3)] == [2, 2, 2]


def test_auditor_counts_copies_and_flat_images(tmp_path):
    images = pixels(6)
    images[4] = images[1]
    images[5] = 77
    auditor = Auditor()
    for rows in (images[:2], images[2:]):
        auditor.update(rows)
    assert auditor.warnings() == ["1 of 6 samples are a single colour", "1 of 6 samples are copies of others"]
    assert (auditor.lowest, auditor.highest) == (images.min(), images.max())
    auditor = Auditor()
    auditor.update(images // 4 + 60)
    assert auditor.warnings()[-1] == f"pixels span {images.min() // 4 + 60} to {images.max() // 4 + 60} of 0 to 255"


def test_statistics_of_batches_equal_those_of_a_set(tmp_path):
    """Images that come as batches, such as a sampler's, give the numbers of the same images in a file."""
    np.savez(tmp_path / "s.npz", pixels(50))
    batches = torch.from_numpy(pixels(50)).permute(0, 3, 1, 2).split(7)
    found, whole = (
        statistics_of(batches, averages()),
        collect(open_images([tmp_path / "s.npz"]), averages(), batch_size=16),
    )
    assert np.array_equal(found.covariance, whole.statistics("pooled").covariance) and found.n == 50
    with pytest.raises(UserError, match="fewer images than"):
        statistics_of([], averages())


def test_sorted_share():
    """1 for sorted classes, about 0 for shuffled ones, below for interleaved ones; no warning without repeats."""
    classes = np.arange(1000) // 100
    assert sorted_share(classes) == pytest.approx(1)
    assert abs(sorted_share(np.random.default_rng(0).permutation(classes))) < 0.1
    assert sorted_share(np.arange(1000) % 10) < 0
    assert sorted_share(np.arange(5)) == sorted_share(np.zeros(5)) == 0


def test_suspicious_samples_are_reported(measurement, tmp_path):
    """Constant, repeated and badly scaled samples and unknown makers each give a warning; for IS also sorted classes."""
    images = (pixels(40, seed=1) > 127).astype(np.uint8)
    images[7] = 1
    images[9] = images[8]
    (tmp_path / "s.json").unlink()
    np.savez(tmp_path / "s.npz", images, np.arange(40) // 8)
    found = " | ".join(measure.measure(measurement()).warnings)
    for part in (
        "1 of 40 samples are a single colour",
        "1 of 40 samples are copies",
        "in [0, 1]",
        "no JSON beside s.npz",
    ):
        assert part in found, part
    ordered = np.arange(60) // 10
    samples = ImageSet("s", (60, 8, 8, 3), None, None)
    reference = ImageSet("r", (64, 8, 8, 3), None, None)

    def lines(classes, split, reference=None):
        return " | ".join(set_warnings(samples, reference, classes, split))

    assert "IS uses chunks of 50" in lines(ordered, 50) and "sorted by class: shuffle" in lines(ordered, 100)
    assert "sorted" not in lines(ordered.reshape(6, 10).T.ravel(), 50) and "sorted" not in lines(None, 50)
    assert "64 images, fewer than" in lines(ordered, 50, reference) and "64" not in lines(None, 50, reference)
    assert "differ in size: 8 x 8 and 4 x 8" in lines(None, 50, replace(reference, shape=(64, 4, 8, 3)))
