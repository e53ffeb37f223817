"""The interpolant: end points, derivatives, and the identities between velocity, score and data."""

import pytest
import torch

from models.choices import PATHS
from models.interpolant import Interpolant


def pair(n=7):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 2, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(n, 3, 2, 2, generator=g, dtype=torch.float64)
    return x, noise, torch.linspace(0.05, 0.95, n, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path):
    """x_0 is the data, x_1 the noise."""
    x, noise, _ = pair()
    i = Interpolant(path)
    torch.testing.assert_close(i.interpolate(x, noise, torch.zeros(len(x), dtype=torch.float64)), x)
    torch.testing.assert_close(i.interpolate(x, noise, torch.ones(len(x), dtype=torch.float64)), noise)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_agree_with_autograd(path):
    """d_alpha and d_sigma are the derivatives of alpha and sigma."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    c = Interpolant(path).coefficients(t)
    torch.testing.assert_close(torch.autograd.grad(c.alpha.sum(), t, retain_graph=True)[0], c.d_alpha)
    torch.testing.assert_close(torch.autograd.grad(c.sigma.sum(), t)[0], c.d_sigma)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_the_true_velocity(path):
    """With the velocity of a known pair the score is -noise / sigma and the denoised estimate is the data."""
    x, noise, t = pair()
    i = Interpolant(path)
    x_t, v = i.interpolate(x, noise, t), i.velocity(x, noise, t)
    sigma = i.coefficients(t).sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(i.score(v, x_t, t), -noise / sigma)
    torch.testing.assert_close(i.denoised(v, x_t, t), x)


@pytest.mark.parametrize("path", PATHS)
def test_time_of_sigma_ratio_inverts_the_ratio(path):
    """t(sigma / alpha) = t."""
    i = Interpolant(path)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    c = i.coefficients(t)
    torch.testing.assert_close(i.time_of_sigma_ratio(c.sigma / c.alpha), t)


def test_per_sample_times_reach_their_own_sample():
    """Each sample is interpolated at its own t, in tokens (N, D) as in latents (N, C, H, W): no broadcast over the batch."""
    for shape in [(5, 6), (5, 2, 3, 3)]:
        x, noise = torch.randn(shape), torch.randn(shape)
        t = torch.rand(5)
        for path in PATHS:
            i = Interpolant(path)
            for f in (i.interpolate, i.velocity):
                together = f(x, noise, t)
                assert together.shape == x.shape
                torch.testing.assert_close(together, torch.stack([f(x[k], noise[k], t[k]) for k in range(5)]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'edm' is none of linear, cosine"):
        Interpolant("edm")
    with pytest.raises(ValueError, match=r"t must be a scalar .* got \(2,\)"):
        Interpolant().interpolate(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(2))
