"""The objective: exact minimum, per-sample formulas, and randomness that depends on nothing but (seed, step, index)."""

from dataclasses import replace

import pytest
import torch

from loss import Objective, alignment, draw
from models.choices import PATHS
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig, SiTOutput
from models.state import State
from tests.test_sit import TOY

LATENT = SiTConfig(hidden_size=32, num_heads=2, input_size=4, class_token_dim=12)
SMALL = replace(LATENT, input_size=2, class_token_dim=6)


def batch(n=6):
    g = torch.Generator().manual_seed(1)
    clean = State(torch.randn(n, 4, 4, 4, generator=g), torch.randn(n, 12, generator=g))
    label = torch.randint(0, 5, (n,), generator=g)
    teachers = [torch.randn(n, 5, 12, generator=g), torch.randn(n, 5, 7, generator=g)]
    draws = draw(0, 3, torch.arange(n), LATENT, "uniform")
    return clean, label, teachers, draws


@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_network_reaches_the_minimum(path):
    """The true velocities and the teacher's own tokens give velocity 0, class velocity 0, alignment -1."""
    clean, label, teachers, draws = batch()
    interpolant = Interpolant(path)

    def oracle(x, t, y, token, *, project):
        v = clean.map(lambda x, e: interpolant.velocity(x, e, t), draws.noise)
        return SiTOutput(v.latent, v.class_token, tuple(3 * z for z in teachers))

    objective = Objective(interpolant)
    terms = objective(oracle, clean, label, teachers, draws, null_label=5)
    assert terms.velocity.abs().max() == 0 and terms.class_velocity.abs().max() == 0
    torch.testing.assert_close(terms.alignment, -torch.ones(6))
    torch.testing.assert_close(objective.total(terms), torch.tensor(-0.5))


@pytest.mark.parametrize("path", PATHS)
def test_velocity_terms_equal_a_per_sample_loop(path):
    """Each sample's loss uses its own t, on latent and class token alike."""
    clean, label, _, draws = batch()
    prediction = State(torch.randn(6, 4, 4, 4), torch.randn(6, 12))
    objective = Objective(Interpolant(path), cfg_prob=0)
    terms = objective(lambda *a, project: SiTOutput(*prediction, ()), clean, label, [], draws, null_label=5)
    for k in range(6):
        for part, noise, out, loss in zip(clean, draws.noise, prediction, (terms.velocity, terms.class_velocity)):
            target = objective.interpolant.velocity(part[k], noise[k], draws.time[k])
            torch.testing.assert_close(loss[k], ((out[k] - target) ** 2).mean())


def test_alignment_equals_the_per_sample_loop():
    """Vectorised alignment = the published loop over encoders, samples and tokens."""
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(6, 5, 12, generator=g), torch.randn(6, 5, 7, generator=g)]
    theirs = [torch.randn(6, 5, 12, generator=g), torch.randn(6, 5, 7, generator=g)]
    total = 0.0
    for p, z in zip(ours, theirs, strict=True):
        for i in range(6):
            for j in range(5):
                total += -(p[i, j] @ z[i, j]) / (p[i, j].norm() * z[i, j].norm()) / (2 * 6 * 5)
    torch.testing.assert_close(alignment(ours, theirs).mean(), total)


def test_the_class_token_may_be_left_out_of_the_alignment():
    """The patch tokens alone: what REPA's alignment of them is; velocities stay as they were."""
    clean, label, teachers, draws = batch()
    projections = tuple(torch.randn(z.shape, generator=torch.Generator().manual_seed(2)) for z in teachers)
    network = lambda *a, project: SiTOutput(*draws.noise, projections)  # noqa: E731
    whole, patches = (
        Objective(align_class_token=aligned)(network, clean, label, teachers, draws, null_label=5)
        for aligned in (True, False)
    )
    expected = alignment([p[:, 1:] for p in projections], [z[:, 1:] for z in teachers])
    assert torch.equal(patches.alignment, expected) and torch.equal(patches.class_velocity, whole.class_velocity)
    assert not torch.equal(patches.alignment, whole.alignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alignment_survives_tiny_half_precision_tokens(dtype):
    """Tokens whose squares underflow in half precision still have the right cosine and a finite gradient."""
    p = torch.full((2, 3, 8), 2e-5, dtype=dtype, requires_grad=True)
    z = torch.full((2, 3, 8), 1e-4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = alignment([p], [z])
    torch.testing.assert_close(value, -torch.ones(2), atol=1e-3, rtol=0)
    value.sum().backward()
    assert p.grad.isfinite().all()


def test_gradients_reach_every_parameter():
    """No parameter is unused: DDP needs no search for unused ones."""
    torch.manual_seed(0)
    network = SiT(TOY).train()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    clean, label, teachers, draws = batch()
    objective = Objective(cfg_prob=0.5)
    objective.total(objective(network, clean, label, teachers, draws, null_label=5)).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_ablation_rows_switch_terms_off():
    """Without class token and teachers the objective is plain SiT's."""
    clean, label, _, draws = batch()
    draws = draws._replace(noise=State(draws.noise.latent))
    objective = Objective()
    terms = objective(
        lambda *a, project: SiTOutput(torch.zeros(6, 4, 4, 4), None, ()),
        State(clean.latent),
        label,
        [],
        draws,
        null_label=5,
    )
    assert terms.class_velocity.abs().max() == 0 and terms.alignment.abs().max() == 0
    torch.testing.assert_close(objective.total(terms), terms.velocity.mean())


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_draws_depend_on_seed_step_and_index_alone(weighting):
    """A slice of the global batch draws what the whole draws there; other seeds and steps draw otherwise."""
    args = (LATENT, weighting)
    whole = draw(7, 11, torch.arange(8), *args)
    part = draw(7, 11, torch.tensor([5, 2]), *args)
    for of_whole, of_part in zip((*whole.noise, *whole), (*part.noise, *part)):
        if isinstance(of_whole, torch.Tensor):
            assert torch.equal(of_whole[[5, 2]], of_part)
    assert not torch.equal(whole.noise.latent, draw(8, 11, torch.arange(8), *args).noise.latent)
    assert not torch.equal(whole.noise.latent, draw(7, 12, torch.arange(8), *args).noise.latent)


def test_draws_have_their_distributions():
    """Noises are standard normal and independent of each other; uniform t; log-normal t has median 1/2 on both paths."""
    d = draw(0, 0, torch.arange(4000), SMALL, "uniform")
    for part in (d.posterior, d.noise.latent, d.noise.class_token):
        assert abs(part.mean()) < 0.02 and abs(part.std() - 1) < 0.02
    assert abs((d.posterior * d.noise.latent).mean()) < 0.02
    assert abs(d.time.mean() - 0.5) < 0.02 and abs(d.time.std() - 12**-0.5) < 0.01
    z = draw(0, 0, torch.arange(4000), SMALL, "lognormal")
    for path in PATHS:
        t = Objective(Interpolant(path), weighting="lognormal").times(z)
        assert t.min() > 0 and t.max() < 1 and abs(t.median() - 0.5) < 0.02


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_label_dropout_is_cfg_prob(probability):
    """The share of null labels is cfg_prob (the published flag of that name is never read)."""
    seen = []

    def listen(x, t, y, token, *, project):
        seen.append(y)
        return SiTOutput(torch.zeros_like(x), None, ())

    n = 5000
    draws = draw(0, 0, torch.arange(n), replace(SMALL, class_token_dim=0), "uniform")
    objective = Objective(cfg_prob=probability)
    objective(listen, State(torch.zeros(n, 1, 1, 1)), torch.arange(n) % 5, [], draws, null_label=5)
    dropped = seen[0] == 5
    assert abs(dropped.float().mean() - probability) < 0.02
    assert torch.equal(seen[0][~dropped], (torch.arange(n) % 5)[~dropped])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="cfg-prob"):
        Objective(cfg_prob=1.5)
    with pytest.raises(ValueError, match="'edm' is none of uniform, lognormal"):
        Objective(weighting="edm")


def test_a_network_trained_on_four_samples_learns_them():
    """Two hundred steps on one tiny batch cut the velocity loss by more than half: the pieces fit together."""
    torch.manual_seed(0)
    network, objective = SiT(TOY).train(), Objective(cfg_prob=0)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    clean, label, teachers, _ = batch(4)
    losses = []
    for step in range(200):
        draws = draw(0, step, torch.arange(4), LATENT, "uniform")
        terms = objective(network, clean, label, teachers, draws, null_label=5)
        objective.total(terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(v.detach().mean()) for v in terms[:3]])
    first, last = torch.tensor(losses[:10]).mean(0), torch.tensor(losses[-20:]).mean(0)
    assert last[0] < 0.5 * first[0] and last[1] < 0.5 * first[1] and last[2] < -0.7
