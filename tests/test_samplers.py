"""Solvers against closed forms: for Gaussian data the velocity is known, and so is where every solver must end."""

import sys
from itertools import pairwise

import pytest
import torch

from models.choices import GRIDS, PATHS, SOLVERS
from models.interpolant import Interpolant
from models.samplers import Solver, ode_times, sde_times, shifted
from models.solvers import Diffusion, dpm_solver_pp, euler, euler_maruyama, heun
from models.state import State

DATA_STD = 0.5


def gaussian(path, std=DATA_STD):
    """The exact velocity for data N(0, std^2): E[dx_t / dt | x_t] = (d_alpha alpha std^2 + d_sigma sigma) / var_t x_t."""

    def velocity(state, t):
        c = Interpolant(path).coefficients(t)
        gain = (c.d_alpha * c.alpha * std**2 + c.d_sigma * c.sigma) / (c.alpha**2 * std**2 + c.sigma**2)
        return state.map(lambda x: gain * x)

    return velocity


def one():
    return State(torch.ones(1, 1, 1, 1).double(), torch.full((1, 2), -2.0).double())


def normals(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda step=0: State(torch.randn(count, 1, 1, 1, generator=g), torch.randn(count, 1, generator=g))


def solve(name, steps, path, mode="ode", **settings):
    noise = normals(20_000)
    start = noise() if mode == "sde" else one()
    return Solver(mode, name, steps, **settings)(gaussian(path), start, Interpolant(path), noise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS["ode"])
def test_ode_scales_noise_to_data(name, path):
    """The flow of Gaussian data is x -> std x: every solver finds it, for latent and token alike."""
    out = solve(name, 200, path, rtol=1e-6, atol=1e-6)
    assert out.latent.item() == pytest.approx(DATA_STD, abs=5e-3)
    assert out.class_token.tolist() == [pytest.approx([-2 * DATA_STD] * 2, abs=1e-2)]
    assert out.latent.dtype == torch.float64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS["sde"])
def test_sde_returns_the_data_distribution(name, path):
    """20,000 samples have the data's standard deviation: 4 standard errors are 0.010; the published grid's last step adds a
    bias of -0.006 (unit data: 0.998)."""
    out = solve(name, 250, path, mode="sde")
    for part in out:
        assert part.std().item() == pytest.approx(DATA_STD, abs=0.016)
        assert part.mean().item() == pytest.approx(0, abs=0.016)


def test_unit_gaussian_under_the_published_settings():
    """SDE of 250 steps, linear path, data N(0, 1): standard deviation 0.998 within the error of 200,000 samples."""
    noise = normals(200_000)
    out = Solver()(gaussian("linear", 1.0), noise(), Interpolant(), noise)
    assert out.latent.std().item() == pytest.approx(0.998, abs=0.004)


@pytest.mark.parametrize("diffusion", [("linear", 0.5), ("sigma", 1.0), ("constant", 1.0), ("linear", 0.0)])
def test_every_diffusion_coefficient_has_the_same_marginals(diffusion):
    """On the cosine path, where linear and sigma differ; scale 0 is the ODE."""
    out = solve("euler", 400, "cosine", mode="sde", diffusion=Diffusion(*diffusion), last_step="ode")
    assert out.latent.std().item() == pytest.approx(DATA_STD, abs=0.016)


def test_diffusion_coefficients_by_name():
    """linear: 2t (published), sigma: 2 sigma(t), constant: 1."""
    t, cosine = torch.tensor(0.25).double(), Interpolant("cosine")
    assert Diffusion("linear")(t, cosine) == 0.5
    assert Diffusion("sigma", 2.0)(t, cosine) == pytest.approx(4 * 0.3826834, rel=1e-6)
    assert Diffusion("constant", 3.0)(t, cosine) == 3


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp", 2)])
def test_order_of_convergence(name, order):
    """Halving the step divides the error by 2**order (nonlinear velocity, from t = 0.9 to 0.1)."""
    interpolant = Interpolant("linear")

    def velocity(state, t):
        return state.map(lambda x: torch.sin(3 * x) + t * torch.cos(x))

    def end(solver, steps):
        times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        if solver == "heun":  # its last step is Euler's, for the sake of t = 0: stop before it
            times = torch.cat([times, times[-1:]])
        return {
            "euler": lambda: euler(velocity, one(), times),
            "heun": lambda: heun(velocity, one(), times),
            "dpmpp": lambda: dpm_solver_pp(velocity, one(), times, interpolant),
        }[solver]().latent.item()

    exact = end("heun", 5000)
    errors = [abs(end(name, steps) - exact) for steps in (80, 160, 320)]
    measured = [torch.tensor(a / b).log2().item() for a, b in pairwise(errors)]
    assert measured[-1] == pytest.approx(order, abs=0.25), (errors, measured)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_dpmpp_is_exact_for_a_single_datum(mode, path):
    """If all data is one point, the data estimate is constant and two steps of the exponential integrator suffice."""
    interpolant, datum = Interpolant(path), 1.7

    def velocity(state, t):
        c = interpolant.coefficients(t)

        def part(x):
            eps = (x - c.alpha * datum) / c.sigma
            return c.d_alpha * datum + c.d_sigma * eps

        return state.map(part)

    noise = normals(50)
    out = Solver(mode, "dpmpp", 2)(velocity, noise(), interpolant, noise)
    for part in out:
        assert torch.allclose(part, torch.full_like(part, datum), atol=1e-9)


def test_stochastic_dpmpp_keeps_the_marginals_in_between():
    """Stopped at t = 0.3 the state has the interpolant's variance there, for unit data."""
    noise, times = normals(100_000), torch.tensor([1.0, 0.8, 0.6, 0.45, 0.3, 0.0]).double()
    times = torch.cat([torch.linspace(1, 0.3, 60).double(), torch.tensor([0.29]).double()])
    out = dpm_solver_pp(gaussian("linear", 1.0), noise(), times, Interpolant(), noise)
    assert out.latent.std().item() == pytest.approx((0.71**2 + 0.29**2) ** 0.5, abs=0.01)


def test_evaluations_of_each_solver():
    """NFE: one per step; for Heun two, but one in the last step; for dopri5 what the tolerance needs."""
    for mode, names in SOLVERS.items():
        for name in names:
            calls = []

            def velocity(state, t, calls=calls):
                calls.append(float(t))
                return gaussian("linear")(state, t)

            noise = normals(1)
            Solver(mode, name, 7)(velocity, noise(), Interpolant(), noise)
            if name != "dopri5":
                assert len(calls) == {"heun": 13}.get(name, 7), name
                assert min(calls) > 0, "t = 0 is not asked of the network"
    counts = []
    for tolerance in (1e-2, 1e-8):
        calls = []

        def velocity(state, t, calls=calls):
            calls.append(float(t))
            return gaussian("linear")(state, t)

        Solver("ode", "dopri5", rtol=tolerance, atol=tolerance)(velocity, one(), Interpolant(), None)
        counts.append(len(calls))
    assert counts[1] > counts[0]


def test_dopri5_without_torchdiffeq_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match="pip install torchdiffeq"):
        solve("dopri5", 1, "linear")


def test_a_state_without_class_token():
    """Plain SiT: every solver carries a State of the latent alone."""
    for mode, names in SOLVERS.items():
        for name in names:
            noise = lambda step=0: State(torch.ones(2, 1, 1, 1))  # noqa: E731
            out = Solver(mode, name, 5)(gaussian("linear"), noise(), Interpolant(), noise)
            assert out.class_token is None and out.latent.shape == (2, 1, 1, 1)


def test_published_grids():
    """SDE: num_steps times from 1 to 0.04, then 0. ODE: uniform from 1 to 0."""
    assert torch.equal(Solver("sde", num_steps=250).times, sde_times(250))
    assert Solver("sde", num_steps=3).times.tolist() == pytest.approx([1, 0.52, 0.04, 0])
    assert torch.equal(Solver("ode", num_steps=4).times, ode_times(4))


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_fall_from_one_to_zero(grid, mode):
    times = Solver(mode, num_steps=20, grid=grid, shift=3.0 if grid == "shifted" else 1.0).times
    assert times[0] == 1 and times[-1] == 0 and len(times) == 21 and times.dtype == torch.float64
    assert (times[1:] < times[:-1]).all()
    if mode == "sde":
        assert times[-2].item() == pytest.approx(0.04)


def test_shift_moves_steps_towards_noise():
    """t' = s t / (1 + (s - 1) t): the middle goes to s / (1 + s); shift 1 changes nothing."""
    u = torch.tensor([0.25, 0.5, 0.75]).double()
    assert shifted(u, 3.0)[1] == 0.75 and torch.equal(shifted(u, 1.0), u)


def test_the_last_step():
    """drift, as published, subtracts on the linear path w/2 = 0.04 of the predicted noise too much; ode does not."""
    interpolant, t = Interpolant(), torch.tensor([0.04, 0.0]).double()
    eps, datum = 2.0, 3.0
    state = State(torch.full((1, 1, 1, 1), 0.96 * datum + 0.04 * eps).double())

    def velocity(state, t):
        return State(torch.full((1, 1, 1, 1), eps - datum).double())

    ends = [
        euler_maruyama(velocity, state, t, interpolant, None, last_step=last).latent.item() for last in ("drift", "ode")
    ]
    assert ends == pytest.approx([datum - 0.04 * eps, datum])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "pde"}, "mode 'pde' is none of sde, ode"),
        ({"name": "heun"}, "solver of mode sde 'heun' is none of euler, dpmpp"),
        ({"mode": "ode", "num_steps": 0}, "mode ode needs at least 1 steps, got 0"),
        ({"num_steps": 1}, "mode sde needs at least 2 steps, got 1"),
        ({"grid": "random"}, "time grid 'random' is none of"),
        ({"shift": 3.0}, "shift 3.0 must be positive, and belongs to the time grid shifted"),
        ({"t_last": 0.0}, "the SDE's last time must lie between 0 and 1, got 0.0"),
        ({"last_step": "none"}, "last step 'none' is none of drift, ode"),
        ({"diffusion": Diffusion("constant")}, "the constant diffusion coefficient needs the last step ode"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Solver(**settings)


def test_bad_diffusions_are_named():
    with pytest.raises(ValueError, match="diffusion coefficient 'cubic' is none of linear, sigma, constant"):
        Diffusion("cubic")
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        Diffusion("linear", -1)
