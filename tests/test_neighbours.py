"""Nearest-neighbour metrics: brute force, the published float16 arithmetic, constructed sets."""

import numpy as np
import pytest
import torch

from evaluations import neighbours
from evaluations.memorization import closest_pairs, copying
from evaluations.neighbours import density_coverage, nearest, neighbour_radii, precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_radii(x: torch.Tensor, k: int) -> torch.Tensor:
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    return distances.sort(1).values[:, k]


@pytest.mark.parametrize("block", [10_000, 37])
def test_float32_rule_equals_brute_force(block, monkeypatch):
    """Radii to float32 rounding; precision, recall, density and coverage equal, also over many small blocks."""
    monkeypatch.setattr(neighbours, "BLOCK", block)
    real, fake = normal(90, 6), normal(70, 6, seed=1) * 0.8 + 0.3
    cross = ((real[:, None] - fake[None]) ** 2).sum(-1)
    result = precision_recall(real, fake, rule="fp32")
    torch.testing.assert_close(result.radii_reference, brute_radii(real, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.radii_samples, brute_radii(fake, 3), rtol=1e-4, atol=1e-5)
    inside = cross <= brute_radii(real, 3)[:, None]
    assert result.precision == inside.any(0).double().mean().item()
    assert result.recall == (cross <= brute_radii(fake, 3)[None]).any(1).double().mean().item()
    wide = cross <= brute_radii(real, 5)[:, None]
    both = density_coverage(real, fake, k=5)
    assert both.density == pytest.approx(wide.sum().item() / (5 * 70)) and both.density > 0
    assert both.coverage == wide.any(1).double().mean().item()
    found = nearest(real, fake)
    assert torch.equal(found.indices, cross.argmin(0))


def eigen_half_sum(row: np.ndarray) -> np.float16:
    """The documented summation order, one number at a time."""
    if len(row) > 1600:
        middle = -(-len(row) // 16) * 8
        return np.float16(eigen_half_sum(row[:middle]) + eigen_half_sum(row[middle:]))
    lanes = np.zeros((4, 8), np.float16)
    vectors = [row[i : i + 8] for i in range(0, len(row) // 8 * 8, 8)]
    whole = len(vectors) // 4 * 4
    for i in range(whole):
        lanes[i % 4] = lanes[i % 4] + vectors[i]
    total = lanes[0]
    for extra in (*lanes[1:], *vectors[whole:]):
        total = total + extra
    wide = total.astype(np.float32)
    while len(wide) > 1:
        wide = wide[: len(wide) // 2] + wide[len(wide) // 2 :]
    rest = np.float16(0)
    for value in row[len(row) // 8 * 8 :]:
        rest = np.float16(rest + value)
    return np.float16(rest + np.float16(wide[0]))


@pytest.mark.parametrize("width", [3, 8, 48, 50, 200, 1700, 2048])
def test_adm_rule_rounds_each_step_to_float16(width):
    """Radii equal a scalar walk through ADM's formula in float16, for widths off and on the vector length."""
    x = normal(12, width).abs() * 0.4
    half = x.numpy().astype(np.float16)
    norms = [eigen_half_sum(row) for row in half * half]
    distances = np.empty((12, 12), np.float16)
    for i in range(12):
        for j in range(12):
            product = np.float16(half[i].astype(np.float32) @ half[j].astype(np.float32))
            distances[i, j] = max(np.float16(np.float16(norms[i] - 2 * product) + norms[j]), np.float16(0))
    expected = np.sort(distances.astype(np.float32), axis=1)[:, 3]
    assert np.array_equal(neighbour_radii(x, k=3, rule="adm").numpy(), expected)


def test_adm_rule_falls_back_to_float32_where_float16_overflows():
    """Features whose squared norms pass 65504 give float32's radii; a block that fits is still rounded."""
    x = normal(40, 30) * 60
    torch.testing.assert_close(
        neighbour_radii(x, k=3, rule="adm"), neighbour_radii(x, k=3, rule="fp32"), rtol=0, atol=0
    )
    small = x / 60
    assert not torch.equal(neighbour_radii(small, k=3, rule="adm"), neighbour_radii(small, k=3, rule="fp32"))


@pytest.mark.parametrize("rule", ["adm", "fp32"])
def test_mode_collapse_is_precise_and_forgetful(rule):
    """Samples of one of ten modes: high precision, low recall and coverage. Identical sets: 1 and 1."""
    centres = normal(10, 8) * 10
    real = (centres[:, None] + normal(10, 40, 8, seed=1)).flatten(0, 1)
    fake = centres[0] + normal(200, 8, seed=2) * 0.9
    result = precision_recall(real, fake, rule=rule)
    assert result.precision > 0.8 and result.recall < 0.15
    assert density_coverage(real, fake).coverage < 0.15
    same = precision_recall(real, real, rule=rule)
    assert (same.precision, same.recall) == (1.0, 1.0)


def test_neighbours_refuse_too_few_points():
    with pytest.raises(ValueError, match="3 nearest neighbours need more than 3 images in each set, got 3"):
        precision_recall(normal(3, 4), normal(9, 4))
    with pytest.raises(ValueError, match="must be one of adm, fp32, got 'half'"):
        precision_recall(normal(9, 4), normal(9, 4), rule="half")
    with pytest.raises(ValueError, match="dimensions differ"):
        precision_recall(normal(9, 4), normal(9, 5))


def test_copies_of_reference_images_are_found():
    """Samples that repeat reference images lead the list of pairs, with their images, and authenticity counts them."""
    reference = normal(50, 12)
    fresh = normal(30, 12, seed=1) * 1.5
    samples = torch.cat([fresh, reference[[7, 3]] + 1e-3])
    pairs = closest_pairs(reference, samples, 2)
    assert set(zip(pairs.samples, pairs.reference, strict=True)) == {(30, 7), (31, 3)}
    assert closest_pairs(reference, reference, 1).authenticity == 0
    assert closest_pairs(reference, fresh, 1).authenticity > 0.5


def test_copying_is_the_share_of_pairs():
    """Against all pairs; a half for new samples, one for copies, and a warning for the latter alone."""
    training, held_out, fresh = normal(80, 5), normal(40, 5, seed=1), normal(50, 5, seed=2)
    distances = [((training[:, None] - x[None]) ** 2).sum(-1).min(0).values for x in (fresh, held_out)]
    less, same = (op(distances[0][:, None], distances[1][None]).double() for op in (torch.lt, torch.eq))
    found = copying(training, held_out, fresh)
    assert found.share == pytest.approx((less + same / 2).mean().item(), abs=1e-6)
    assert found.error == pytest.approx(((50 + 40 + 1) / (12 * 50 * 40)) ** 0.5)
    assert abs(found.share - 0.5) < 3 * found.error and found.warning() is None
    copies = copying(training, held_out, training[:50] + 1e-3)
    assert copies.share > 0.99 and "samples are nearer to training images than held-out images are" in copies.warning()
