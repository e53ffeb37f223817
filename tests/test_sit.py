"""The network: shapes, initialisation, sizes, and that the class token and the patches see each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.cost import cost
from models.published import from_published, to_published
from models.sit import PRESETS, SiT, SiTConfig, preset

TOY = SiTConfig(
    depth=2,
    hidden_size=32,
    num_heads=2,
    patch_size=2,
    input_size=4,
    num_classes=5,
    class_token_dim=12,
    align_dims=(12, 7),
    align_depth=1,
    projector_dim=16,
)
SHAPES = Path(__file__).parents[2] / "shared" / "reference" / "published_state_dict_shapes.json"


def inputs(config, n=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, config.in_channels, config.input_size, config.input_size, generator=g)
    token = torch.randn(n, config.class_token_dim, generator=g) if config.class_token_dim else None
    return x, torch.rand(n, generator=g), torch.tensor([0, 1, config.num_classes])[:n], token


def randomized(config):
    """A network without any zero weight, as after training."""
    torch.manual_seed(0)
    network = SiT(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return network


@pytest.mark.parametrize("class_token_dim", [0, 12])
@pytest.mark.parametrize("align_dims", [(), (12,), (12, 7)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_output_shapes_of_every_ablation_row(class_token_dim, align_dims, qk_norm):
    """SiT, REPA, token-only and REG are one class with two switches."""
    config = replace(TOY, class_token_dim=class_token_dim, align_dims=align_dims, qk_norm=qk_norm)
    x, t, y, token = inputs(config)
    output = SiT(config)(x, t, y, token, project=True)
    assert output.velocity.shape == x.shape
    assert (output.class_velocity is None) if token is None else (output.class_velocity.shape == token.shape)
    assert [p.shape for p in output.projections] == [(3, 4 + (token is not None), dim) for dim in align_dims]
    assert SiT(config)(x, t, y, token).projections == ()


def test_first_prediction_is_exactly_zero():
    """Both output layers start at zero (adaLN-Zero)."""
    output = SiT(TOY)(*inputs(TOY))
    assert output.velocity.abs().max() == 0
    assert output.class_velocity.abs().max() == 0


def test_class_token_and_patches_are_entangled():
    """The class token changes the latent's velocity and the latent the class token's: no branch is dead."""
    network = randomized(TOY)
    x, t, y, token = inputs(TOY)
    base = network(x, t, y, token)
    assert (network(x, t, y, token + 1).velocity - base.velocity).abs().max() > 1e-4
    assert (network(x + 1, t, y, token).class_velocity - base.class_velocity).abs().max() > 1e-4


def test_samples_of_a_batch_do_not_mix():
    """Each sample is computed as if alone."""
    network = randomized(TOY)
    batch = inputs(TOY)
    together = network(*batch)
    for i in range(3):
        alone = network(*[part[i : i + 1] for part in batch])
        torch.testing.assert_close(alone.velocity[0], together.velocity[i], atol=1e-5, rtol=1e-5)


def test_every_condition_matters():
    """Time and label, the null class included, change the prediction."""
    network = randomized(TOY)
    x, t, y, token = inputs(TOY)
    base = network(x, t, y, token).velocity
    assert (network(x, t * 0.5, y, token).velocity - base).abs().amax((1, 2, 3)).min() > 1e-5
    assert (network(x, t, (y + 1) % 6, token).velocity - base).abs().amax((1, 2, 3)).min() > 1e-5


def test_unpatchify_inverts_the_patch_embedding():
    """A patch embedding that copies pixels, followed by unpatchify, returns the image: rows and columns are not swapped."""
    config = replace(TOY, hidden_size=16, num_heads=1, class_token_dim=0, input_size=6)
    network = SiT(config)
    with torch.no_grad():  # channel (p, q, c) of a patch vector = pixel c at row p, column q
        weight = torch.zeros(16, 4, 2, 2)
        for p in range(2):
            for q in range(2):
                for c in range(4):
                    weight[(p * 2 + q) * 4 + c, c, p, q] = 1
        network.x_embedder.proj.weight.copy_(weight)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(network.unpatchify(network.x_embedder(x)), x)


def test_gradient_checkpointing_changes_nothing():
    """Recomputed blocks give the same gradients."""
    x, t, y, token = inputs(TOY)
    gradients = []
    for recompute in (False, True):
        network = randomized(TOY).train()
        network.gradient_checkpointing = recompute
        output = network(x, t, y, token, project=True)
        (output.velocity.square().sum() + output.projections[0].square().sum()).backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_runs(name):
    """All twelve sizes, the S ones that crash in the published code included (forward on the meta device)."""
    with torch.device("meta"):
        network = SiT(preset(name))
        output = network(
            torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long), torch.empty(2, 768)
        )
    assert output.velocity.shape == (2, 4, 32, 32) and output.class_velocity.shape == (2, 768)


@pytest.mark.skipif(not SHAPES.is_file(), reason="the list of published shapes is not on this machine")
def test_names_and_shapes_are_those_of_the_published_checkpoints():
    """Every published parameter has its place, with its shape, and nothing is left over."""
    published = json.loads(SHAPES.read_text())
    assert published
    for name, shapes in published.items():
        with torch.device("meta"):
            state = to_published(SiT(preset(name, align_depth=4)).state_dict())
        assert {k: list(v.shape) for k, v in state.items()} == shapes


def test_renaming_is_its_own_inverse():
    state = SiT(TOY).state_dict()
    assert list(from_published(to_published(state))) == list(state)
    assert list(to_published(state)) != list(state)


def test_cost_of_the_class_token_slot_is_the_papers():
    """XL/2: 675 M -> 677 M parameters (+0.30 %) and 114.46 -> 114.90 GFLOPs (+0.38 %), counted on the modules.

    The paper's percentage of parameters comes from the rounded millions; its FLOPs leave out the attention products and
    count the normalisations, which ours do not: 0.06 % of the whole.
    """
    without, with_slot = cost(preset("SiT-XL/2", class_token_dim=0)), cost(preset("SiT-XL/2"))
    millions = [round(c.parameters / 1e6) for c in (without, with_slot)]
    gflops = [(c.flops - c.attention_flops) / 1e9 for c in (without, with_slot)]
    assert millions == [675, 677]
    assert round(100 * (millions[1] / millions[0] - 1), 2) == 0.30
    assert gflops == pytest.approx([114.46, 114.90], rel=1e-3)
    assert 100 * (gflops[1] / gflops[0] - 1) == pytest.approx(0.38, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 3}, "input_size 4 must be divisible by patch_size 3"),
        ({"num_heads": 5}, "hidden_size 32 must be divisible by num_heads 5"),
        ({"align_depth": 3}, "alignment after block 3, but the network has blocks 1 to 2"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TOY, **change)


def test_wrong_inputs_are_named():
    """A latent or class token of another shape than the config's, or a missing one, is one sentence."""
    network = SiT(TOY)
    x, t, y, token = inputs(TOY)
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4, 4\), got \(4, 8, 8\)"):
        network(torch.zeros(3, 4, 8, 8), t, y, token)
    with pytest.raises(ValueError, match="class token of width 12, got 0"):
        network(x, t, y)
    with pytest.raises(ValueError, match="SiT-M/2"):
        preset("SiT-M/2")
