"""Guidance is a wrapper of the velocity: where, how strongly, against what, and at which cost."""

import pytest
import torch

from models.guidance import Guidance, Meter, network_velocity
from models.interpolant import Interpolant
from models.samplers import Solver
from models.sit import SiT, SiTConfig
from models.state import State


def tiny(seed=0, **changes):
    """A network whose outputs are not zero, as those of a fresh one are."""
    shape = {"depth": 1, "hidden_size": 32, "num_heads": 2, "input_size": 4, "num_classes": 5, "class_token_dim": 6}
    config = SiTConfig(**{**shape, "align_dims": (), **changes})
    torch.manual_seed(seed)
    network = SiT(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


LABEL = torch.tensor([0, 3, 4])


def start(network=None):
    g = torch.Generator().manual_seed(1)
    return State(torch.randn(3, 4, 4, 4, generator=g).double(), torch.randn(3, 6, generator=g).double())


def at(velocity, t=0.5):
    return velocity(start(), torch.tensor(t, dtype=torch.float64))


def close(a, b, tolerance=2e-6):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


def test_scale_one_is_no_guidance_and_costs_one_pass():
    """Scale 1, no guidance and everything outside of the interval are the conditional prediction, in one pass."""
    network = tiny()
    plain = at(network_velocity(network, LABEL))
    for guidance in (Guidance(1.0), Guidance(3.0, None, 0.6, 1.0), Guidance(3.0, 2.0, 0.0, 0.4)):
        meter = Meter()
        assert close(at(network_velocity(network, LABEL, guidance, meter=meter)), plain, 0)
        assert meter == Meter(1, 1)


def test_formula_null_label_and_cost():
    """v_null + s (v - v_null) on latent and token with their own scales; the null label is num_classes, not 1000."""
    network, meter = tiny(), Meter()
    seen = []

    class Listening(torch.nn.Module):
        config = network.config

        def forward(self, x, t, y, token):
            seen.append(y)
            return network(x, t, y, token)

    guided = at(network_velocity(Listening(), LABEL, Guidance(2.5, 1.5), meter=meter))
    assert meter == Meter(1, 2) and len(seen) == 1 and seen[0].tolist() == [0, 3, 4, 5, 5, 5]
    with_label = at(network_velocity(network, LABEL))
    without = at(network_velocity(network, torch.full_like(LABEL, 5)))
    expected = without.map(lambda u, c, s: u + s * (c - u), with_label, State(2.5, 1.5))
    assert close(guided, expected)


@pytest.mark.parametrize(("t", "on"), [(0.2, True), (0.85, True), (0.1999, False), (0.8501, False)])
def test_the_interval_includes_both_ends(t, on):
    assert (Guidance(2.0, None, 0.2, 0.85).scales(t) != (1, 1)) == on


def test_the_token_has_its_own_scale_and_interval():
    """Each part is guided in its own interval; both predictions are made where either is."""
    guidance = Guidance(3.0, 2.0, 0.0, 0.5, class_low=0.4, class_high=1.0)
    assert guidance.scales(0.2) == (3.0, 1.0)
    assert guidance.scales(0.45) == (3.0, 2.0)
    assert guidance.scales(0.9) == (1.0, 2.0)
    network, meter = tiny(), Meter()
    latent_only = at(network_velocity(network, LABEL, guidance, meter=meter), 0.2)
    plain = at(network_velocity(network, LABEL), 0.2)
    assert meter.forwards == 2
    assert close(latent_only.class_token, plain.class_token) and not close([latent_only.latent], [plain.latent], 1e-3)


def test_the_token_follows_the_latent_by_default():
    assert Guidance(2.3, None, 0.0, 0.85).scales(0.5) == (2.3, 2.3)
    assert Guidance(2.3, 1.0).scales(0.5) == (2.3, 1.0)
    assert Guidance(1.0, 2.0).scales(0.5) == (1.0, 2.0) and not Guidance(1.0, 2.0).off
    assert Guidance().off and Guidance(1.0, 1.0).off


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_guiding_the_velocity_guides_the_drift(path):
    """v - w/2 score(v) is affine in v: guiding either gives the same drift (float64, 1e-12)."""
    network, interpolant, t = tiny(), Interpolant(path), torch.tensor(0.5, dtype=torch.float64)
    state = start()

    def drift(v):
        return v.map(lambda v, x: v - t * interpolant.score(v, x, t), state)

    label, null = at(network_velocity(network, LABEL)), at(network_velocity(network, torch.full_like(LABEL, 5)))
    guided_velocity = null.map(lambda u, c: u + 2.3 * (c - u), label)
    guided_drift = drift(null).map(lambda u, c: u + 2.3 * (c - u), drift(label))
    assert close(drift(guided_velocity), guided_drift, 1e-12)


def test_autoguidance_replaces_the_null_prediction():
    """v_weak + s (v - v_weak), both for the label; a guide equal to the network changes nothing."""
    network, weak, meter = tiny(), tiny(1), Meter()
    guided = at(network_velocity(network, LABEL, Guidance(2.0), guide=weak, meter=meter))
    good, bad = at(network_velocity(network, LABEL)), at(network_velocity(weak, LABEL))
    assert close(guided, good.map(lambda g, b: b + 2 * (g - b), bad)) and meter == Meter(1, 2)
    assert close(at(network_velocity(network, LABEL, Guidance(2.0), guide=network)), good)


def test_a_network_without_the_slot():
    """Plain SiT and REPA: the token stays absent through guidance."""
    network = tiny(class_token_dim=0)
    out = network_velocity(network, LABEL, Guidance(2.0))(State(start().latent), torch.tensor(0.5))
    assert out.class_token is None and out.latent.dtype == torch.float64


def test_reduced_precision_stays_near():
    """bfloat16 arithmetic, float64 result; the deviation is that of bfloat16 (2**-8), not zero."""
    network = tiny()
    exact, reduced = (at(network_velocity(network, LABEL, dtype=d)) for d in (torch.float32, torch.bfloat16))
    error = (exact.latent - reduced.latent).abs().max() / exact.latent.abs().max()
    assert reduced.latent.dtype == torch.float64 and 0 < error < 0.03


def test_rows_do_not_depend_on_the_batch():
    network = tiny()
    together = at(network_velocity(network, LABEL, Guidance(2.0)))
    for i in range(3):
        velocity = network_velocity(network, LABEL[i : i + 1], Guidance(2.0))
        alone = velocity(start().map(lambda x, i=i: x[i : i + 1]), torch.tensor(0.5))
        assert close(alone, together.map(lambda x, i=i: x[i : i + 1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 0.5, "high": 0.4}, r"the guidance interval \[0.5, 0.4\] must lie in \[0, 1\], low end first"),
        ({"class_low": -0.1}, r"the guidance interval \[-0.1, 1.0\]"),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Guidance(2.0, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "name"), [("sde", "euler"), ("sde", "dpmpp"), ("ode", "heun"), ("ode", "dpmpp")])
def test_a_gpu_samples_the_same_states(mode, name):
    """Noise, guidance and solver on CUDA: the states of the CPU within 1e-4 (float32 networks, TF32 off)."""
    from models import acceleration
    from sampling.sampler import Sampler

    acceleration.allow_tf32(False)
    ends = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(tiny().to(device), Interpolant(), Solver(mode, name, 20), Guidance(2.0, None, 0.0, 0.8))
        ends.append(sampler(torch.arange(3, device=device), LABEL.to(device)).state.map(lambda x: x.cpu()))
    assert close(*ends, 1e-4)
