"""Statistics and metrics: closed forms, brute force, recordings of the ADM evaluator."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations.coherence import token_metrics
from evaluations.metrics import InceptionScore, clip_mmd, frechet_distance, kernel_distance
from evaluations.sliced import Mind
from evaluations.statistics import (
    Moments,
    Statistics,
    compute_moments,
    compute_statistics,
    jackknife_error,
    jackknife_groups,
    without,
)
from tests.reference_metrics import check, inception_score


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(100, np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64))


def test_recorded_metrics_of_the_adm_evaluator():
    """FID and sFID to 1e-6, IS to 1e-10, radii, precision and recall exactly."""
    lines = check(Path(__file__).parent / "data" / "metrics.npz")
    assert len(lines) == 10
    for line in lines:
        assert line.max_rel <= line.limit, line


def test_a_recording_without_its_arrays_is_named(tmp_path):
    """A file that records a metric but lacks what it was computed from is an error, as is one that records none."""
    np.savez(tmp_path / "metrics_a.npz", fid=np.float64(1))
    with pytest.raises(ValueError, match=r"metrics_a\.npz has no entry 'ref_pool'"):
        check(tmp_path / "metrics_a.npz")
    np.savez(tmp_path / "metrics_b.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="records no metric"):
        check(tmp_path / "metrics_b.npz")


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_statistics_do_not_feel_the_batch_size(batch):
    """Mean and covariance equal NumPy's, and are the same bits for every batch size."""
    x = normal(1000, 12)
    moments, whole = Moments(12, chunk=128), Moments(12, chunk=128)
    for rows in x.split(batch):
        moments.update(rows)
    whole.update(x)
    stats, other = moments.statistics(), whole.statistics()
    np.testing.assert_allclose(stats.mean, x.double().numpy().mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(stats.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=0, atol=1e-13)
    assert np.array_equal(stats.covariance, other.covariance) and np.array_equal(stats.mean, other.mean)


def test_statistics_far_from_zero_keep_their_digits():
    """An offset of 1e6 costs the covariance nothing but the rounding of the inputs; raw second moments would lose it."""
    x = normal(500, 3).double()
    shifted = compute_statistics(x + 1e6)
    np.testing.assert_allclose(shifted.covariance, compute_statistics(x).covariance, rtol=1e-8)


def test_merged_moments_equal_the_whole():
    """Groups of different size merge into the statistics of all; an empty one changes nothing."""
    x = normal(300, 5)
    parts = [Moments(5) for _ in range(4)]
    for part, rows in zip(parts, (x[:10], x[10:11], x[11:], x[:0]), strict=True):
        part.update(rows)
    total = Moments(5)
    for part in parts:
        total.merge(part)
    np.testing.assert_allclose(total.statistics().covariance, np.cov(x.double().numpy(), rowvar=False), atol=1e-13)


def test_one_image_has_no_statistics():
    moments = Moments(2)
    moments.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.statistics()
    with pytest.raises(ValueError, match=r"features must be \(N, 2\)"):
        moments.update(torch.zeros(1, 3))


@pytest.mark.parametrize("groups", [2, 5, 7])
def test_jackknife_groups_share_every_class(groups):
    """Each group has about its share of each class, be the file sorted by class or its classes interleaved."""
    rows = torch.arange(1000)
    number = jackknife_groups(rows, groups)
    for labels in (rows % 10, rows // 100, rows % groups):
        for label in labels.unique():
            shares = torch.bincount(number[labels == label], minlength=groups) / (labels == label).sum()
            assert (shares - 1 / groups).abs().max() < 0.05


def test_jackknife_error_of_a_mean():
    """Leaving out single values gives the textbook standard error of the mean."""
    x = normal(40).double()
    left_out = [(x.sum() - value).item() / 39 for value in x]
    assert jackknife_error(left_out) == pytest.approx(x.std().item() / 40**0.5, rel=1e-12)


def test_statistics_without_a_group():
    """Leaving a group out equals the statistics of the other rows, also where the group's mean lies apart."""
    x = normal(90, 3) + torch.arange(3).repeat(30)[:, None] * 5.0
    for number in range(3):
        stats = without(compute_moments(x), compute_moments(x[number::3]))
        rest = torch.cat([x[other::3] for other in range(3) if other != number]).double().numpy()
        np.testing.assert_allclose(stats.covariance, np.cov(rest, rowvar=False), atol=1e-12)
        np.testing.assert_allclose(stats.mean, rest.mean(0), atol=1e-13)
    with pytest.raises(ValueError, match="leaving 89 of 90 images out"):
        without(compute_moments(x), compute_moments(x[:89]))


def test_frechet_of_diagonal_gaussians():
    """Closed form: |m1 - m2|^2 + sum (s1 - s2)^2, to 1e-12."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        m1, m2 = rng.standard_normal((2, 30))
        s1, s2 = rng.uniform(0.1, 3, (2, 30))
        expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
        found = frechet_distance(gaussian(m1, np.diag(s1**2)), gaussian(m2, np.diag(s2**2)))
        assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_of_50_pairs():
    """50 pairs of covariances of rank 24 down to 1 in 24 dimensions: the closed form of the factors to 1e-12.

    Also scipy's sqrtm to 1e-8 of the traces wherever that is meaningful: the square root of a singular product keeps
    half the digits of each zero eigenvalue, so the bound grows with the number of lost ranks.
    """
    rng = np.random.default_rng(1)
    worst = 0.0
    for pair in range(50):
        ranks = [24, 24] if pair < 20 else [24 - (pair - 20) % 24, int(rng.integers(1, 25))]
        factors = [rng.standard_normal((24, rank)) * rng.uniform(0.1, 2) for rank in ranks]
        c1, c2 = (f @ f.T for f in factors)
        traces = np.trace(c1) + np.trace(c2)
        m1, m2 = rng.standard_normal((2, 24))
        shift = ((m1 - m2) ** 2).sum()
        found = frechet_distance(gaussian(m1, c1), gaussian(m2, c2))
        closed = shift + traces - 2 * np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
        assert found == pytest.approx(closed, rel=1e-12), ranks
        published = shift + traces - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2)).real
        lost = 24 - min(ranks)
        assert abs(found - published) <= 1e-8 * max(lost, 1) * (shift + traces), ranks
        worst = max(worst, abs(found - published) / (shift + traces) if lost == 0 else 0.0)
    assert worst < 1e-12


def test_frechet_is_a_distance():
    """Zero for equal statistics (also singular ones), symmetric, and the squared shift for equal covariances."""
    full, thin = compute_statistics(normal(400, 20)), compute_statistics(normal(8, 20, seed=1))
    for stats in (full, thin):
        assert frechet_distance(stats, stats) <= 1e-12 * np.trace(stats.covariance)
    assert frechet_distance(full, thin) == pytest.approx(frechet_distance(thin, full), rel=1e-12)
    moved = full._replace(mean=full.mean + 0.5)
    assert frechet_distance(full, moved) == pytest.approx(20 * 0.25, rel=1e-12)


def test_frechet_refuses_what_it_cannot_compare():
    a, b = compute_statistics(normal(9, 3)), compute_statistics(normal(9, 4))
    with pytest.raises(ValueError, match="dimensions differ: 3 and 4"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="sample statistics hold NaN"):
        frechet_distance(a, a._replace(mean=np.full(3, np.nan)))


def test_inception_score_extremes():
    """Uncertain images score 1, certain and evenly spread ones the number of classes, also with zero probabilities."""
    assert inception_score(torch.full((20, 5), 0.2).log()).value == pytest.approx(1, abs=1e-12)
    certain = torch.eye(5).repeat(4, 1).log()
    assert inception_score(certain).value == pytest.approx(5, rel=1e-12)


def test_inception_score_takes_chunks_in_file_order():
    """Equals a plain loop over chunks, a short last one included, whatever the order and size of the updates."""
    log_p = normal(25, 6).double().log_softmax(1)
    chunks = []
    for part in (log_p[:10], log_p[10:20], log_p[20:]):
        p = part.exp()
        chunks.append((p * (part - p.mean(0).log())).sum(1).mean().exp().item())
    score = InceptionScore(25, 6, split=10)
    for first, last in ((17, 25), (0, 4), (4, 17)):
        score.update(log_p[first:last], first)
    assert score.estimate().value == pytest.approx(np.mean(chunks), rel=1e-13)
    assert score.estimate().error == pytest.approx(np.std(chunks, ddof=1) / 3**0.5, rel=1e-12)
    assert inception_score(log_p, 100).error is None


def test_kernel_distance_equals_torch_fidelity():
    """On whole sets (no subsets left to chance) the unbiased polynomial MMD is torch-fidelity's."""
    from torch_fidelity.metric_kid import kernel_mmd

    a, b = normal(60, 10).double(), normal(60, 10, seed=1).double() + 0.3
    estimate = kernel_distance(a, b, subsets=3, subset_size=60)
    assert estimate.value == pytest.approx(float(kernel_mmd(a.numpy(), b.numpy())), rel=1e-10)
    assert estimate.error == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased():
    """Sets of one distribution average to zero within their error; the seed repeats the subsets."""
    a, b = normal(400, 10), normal(400, 10, seed=1)
    estimate = kernel_distance(a, b, subsets=200, subset_size=50)
    assert abs(estimate.value) < 5 * estimate.error
    assert estimate == kernel_distance(a, b, subsets=200, subset_size=50)
    assert kernel_distance(a, b + 1, subsets=20).value > 0.1
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(a, b[:1])


def test_clip_mmd_of_two_directions():
    """One embedding on each side, 90 degrees apart: 1000 (2 - 2 exp(-2 / 200)); length does not matter."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert clip_mmd(a, b) == pytest.approx(1000 * (2 - 2 * np.exp(-1 / 100)), rel=1e-12)
    assert clip_mmd(a, 3 * a) == pytest.approx(0, abs=1e-9)


def test_token_agreement_on_constructed_pairs():
    """Equal tokens agree fully; tokens of other images of the class keep the class and lose the image."""
    classes = torch.arange(40) % 4
    means = torch.eye(4, 16) * 5
    read = means[classes] + normal(40, 16) * 0.3
    cosine, shuffled, retrieval, agreement = token_metrics(2 * read, read, means)
    assert cosine.value == pytest.approx(1) and retrieval.value == 1 and agreement.value == 1
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (read, read))
    off_diagonal = (a @ b.T)[~torch.eye(40, dtype=torch.bool)].mean().item()
    assert shuffled.value == pytest.approx(off_diagonal, rel=1e-10)
    *_, retrieval, agreement = token_metrics(read.roll(4, 0), read, means)
    assert retrieval.value < 0.2 and agreement.value == 1
    assert token_metrics(read.roll(1, 0), read, means)[3].value == 0
    assert token_metrics(read[:1], read[:1])[1:] == (None, None, None)
    with pytest.raises(ValueError, match="class tokens have shape"):
        token_metrics(read[:, :3], read)


def test_mind_of_equal_numbers_and_of_a_shift():
    """The formula in numpy on the same directions; a shift by s gives 3 |s|^2 up to the choice of directions."""
    x, y = normal(60, 5), normal(60, 5, seed=1) * 1.5 + 1
    u = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    a, b = (np.sort(u @ side.double().numpy().T, axis=1) for side in (x, y))
    found = Mind(x)(y)
    assert found.value == pytest.approx(3 * 5 * np.mean((a - b) ** 2), rel=1e-9)
    shift = torch.tensor([1.0, -2, 0, 0, 0.5])
    moved = Mind(x, directions=20_000)(x + shift)
    assert moved.value == pytest.approx(3 * shift.square().sum().item(), rel=0.02)
    assert Mind(x)(x).value == 0 and Mind(x)(y.flip(0)).value == pytest.approx(found.value, rel=1e-12)


def test_mind_of_unequal_numbers():
    """As if every image were there several times, so that both sets have as many; the error falls with the samples."""
    x, y = normal(6, 3), normal(10, 3, seed=1)
    both = Mind(x.repeat_interleave(5, 0))(y.repeat_interleave(3, 0)).value
    assert Mind(x)(y).value == pytest.approx(both, rel=1e-9)
    assert Mind(y)(x).value == pytest.approx(both, rel=1e-9)
    few, many = (Mind(normal(4000, 3))(normal(n, 3, seed=2)).error for n in (40, 4000))
    assert many < few / 4
    with pytest.raises(ValueError, match="at least 2 images"):
        Mind(x)(y[:1])
