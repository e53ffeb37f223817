"""Published checkpoints become model files and go back; hostile ones run nothing."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from config import UserError
from models.model_file import load_model
from models.original_sit import unify_sit
from models.published import derive_config, from_published, read_published, to_published
from models.sit import SiT, SiTConfig

DATA = Path(__file__).parent / "data"
SHARED = Path(os.environ.get("REG_SHARED", Path(__file__).parents[2] / "shared"))


def toy(**changes):
    torch.manual_seed(0)
    config = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "input_size": 4,
        "num_classes": 5,
        "class_token_dim": 6,
        "align_dims": (6,),
        "align_depth": 1,
        "projector_dim": 16,
        **changes,
    }
    network = SiT(SiTConfig(**config)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.2)
    return network


def inputs(config, n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, config.in_channels, config.input_size, config.input_size, generator=g)
    token = torch.randn(n, config.class_token_dim, generator=g) if config.class_token_dim else None
    return x, torch.rand(n, generator=g), torch.randint(config.num_classes + 1, (n,), generator=g), token


def write_published(path, network, **args):
    """As the published train.py saves: model, ema, opt, args (a Namespace), steps."""
    state = to_published(network.state_dict())
    shifted = {name: tensor + 1 for name, tensor in state.items()}
    content = {
        "model": shifted,
        "ema": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "args": argparse.Namespace(resolution=32, **args),
        "steps": 1234,
    }
    torch.save(content, path)
    return state


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("REG", {}),
        ("REG", {"qk_norm": True}),
        ("REPA", {"class_token_dim": 0}),
        ("two encoders", {"align_dims": (6, 8)}),
        ("SiT", {"class_token_dim": 0, "align_dims": ()}),
    ],
)
def test_a_published_checkpoint_makes_the_same_network(tmp_path, kind, changes):
    """Config from the shapes, outputs equal before and after, and back to a file with equal tensors."""
    network = toy(**changes)
    state = write_published(tmp_path / "last.pt", network, path_type="cosine", encoder_depth=1, enc_type="dinov2-vit-b")
    flags = ["--num-heads", "2"]
    convert.main(["--source", str(tmp_path / "last.pt"), "--out", str(tmp_path / "ours.safetensors"), *flags])
    model = load_model(tmp_path / "ours.safetensors")
    expected = (
        network.config if network.config.align_dims else SiTConfig(**vars(network.config) | {"projector_dim": 2048})
    )
    assert model.info.network == expected
    assert (model.info.path, model.info.step, model.info.resolution) == ("cosine", 1234, 32)
    with torch.no_grad():
        before, after = (net(*inputs(network.config), project=True) for net in (network, model.network))
    assert torch.equal(before.velocity, after.velocity)
    convert.main(
        ["--to", "published", "--source", str(tmp_path / "ours.safetensors"), "--out", str(tmp_path / "back.pt")]
    )
    back = read_published(tmp_path / "back.pt")
    assert list(back.state_dict) == list(state) and back.step == 1234
    assert all(torch.equal(back.state_dict[name], state[name]) for name in state)
    assert back.settings["path_type"] == "cosine" and back.settings["encoder_depth"] == 1


def test_the_licence_goes_both_ways(tmp_path):
    """--licence is kept in the model file, in the .pt made of it, and in the model file made of that."""
    write_published(tmp_path / "a.pt", toy())
    convert.main(
        ["--source", str(tmp_path / "a.pt"), "--out", str(tmp_path / "b"), "--num-heads", "2", "--licence", "mit"]
    )
    convert.main(["--to", "published", "--source", str(tmp_path / "b"), "--out", str(tmp_path / "c.pt")])
    convert.main(["--source", str(tmp_path / "c.pt"), "--out", str(tmp_path / "d"), "--num-heads", "2"])
    assert load_model(tmp_path / "d").info.notes["licence"] == "mit"


def test_weights_of_the_other_kind_and_wrapped_names(tmp_path):
    """--weights model takes the raw weights; leading `module.` and `_orig_mod.` fall away in any order."""
    state = write_published(tmp_path / "last.pt", toy())
    assert torch.equal(read_published(tmp_path / "last.pt", "model").state_dict["pos_embed"], state["pos_embed"] + 1)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        for content in (
            {"ema": {prefix + name: t for name, t in state.items()}},
            {prefix + n: t for n, t in state.items()},
        ):
            torch.save(content, tmp_path / "wrapped.pt")
            assert list(read_published(tmp_path / "wrapped.pt").state_dict) == list(state)


def test_legacy_repa_names():
    """decoder_blocks.0 is the block after the last of blocks."""
    network = toy(class_token_dim=0)
    modern = to_published(network.state_dict())
    legacy = {}
    for name, tensor in modern.items():
        part = name.split(".")
        if part[0] == "blocks" and int(part[1]) >= 1:
            part[:2] = ["decoder_blocks", str(int(part[1]) - 1)]
        legacy[".".join(part)] = tensor
    assert any("decoder" in name for name in legacy)
    from models.published import _modern_names

    restored = _modern_names(legacy)
    assert {n: t.data_ptr() for n, t in restored.items()} == {n: t.data_ptr() for n, t in modern.items()}
    SiT(derive_config(restored, {}, convert_heads(2))).load_state_dict(from_published(restored), strict=True)


def convert_heads(n):
    from models.published import Given

    return Given(num_heads=n, encoder_depth=1)


def test_original_sit_runs_time_the_other_way():
    """SiT's t is 0 at noise and its output carries a variance: converted, v(x, t) = -v_SiT(x, 1 - t), first channels."""
    network = toy(class_token_dim=0, align_dims=())
    config = network.config
    state = to_published(network.state_dict())
    g = torch.Generator().manual_seed(5)
    patch_area = config.patch_size**2
    wide = torch.randn(2 * config.in_channels * patch_area, 32, generator=g)
    bias = torch.randn(2 * config.in_channels * patch_area, generator=g)
    sit = {**state, "final_layer.linear.weight": wide, "final_layer.linear.bias": bias}
    # the original network: eight output channels, of which the first four are the velocity
    original = SiT(SiTConfig(**vars(config) | {"in_channels": 8})).eval()
    widened = from_published(sit)
    widened["x_embedder.proj.weight"] = torch.cat([state["x_embedder.proj.weight"], torch.zeros(32, 4, 2, 2)], dim=1)
    original.load_state_dict(widened)
    ours = SiT(config).eval()
    ours.load_state_dict(from_published(unify_sit(sit)))
    x, t, y, _ = inputs(config)
    with torch.no_grad():
        theirs = original(torch.cat([x, torch.zeros_like(x)], dim=1), 1 - t, y).velocity[:, :4]
        assert torch.allclose(ours(x, t, y).velocity, -theirs, atol=1e-5 * float(theirs.abs().max()))
        assert theirs.abs().max() > 0.1 and not torch.allclose(ours(x, 1 - t, y).velocity, -theirs, atol=1e-2)
    narrow = {
        **sit,
        "final_layer.linear.weight": wide.view(patch_area, 2, config.in_channels, 32)[:, 0].reshape(-1, 32),
    }
    narrow["final_layer.linear.bias"] = bias.view(patch_area, 2, config.in_channels)[:, 0].reshape(-1)
    assert all(torch.equal(a, b) for a, b in zip(unify_sit(narrow).values(), unify_sit(sit).values()))  # no learn_sigma


def test_published_shapes_give_the_published_configs():
    """Every size of the published checkpoints is recognised without a flag."""
    file = SHARED / "reference/published_state_dict_shapes.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    for name, shapes in json.loads(file.read_text()).items():
        config = derive_config({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, {})
        from models.sit import preset

        assert config == preset(name), name


def test_recorded_weights_of_the_published_code(tmp_path):
    """The recorded published network computes its recorded outputs after the way through a .pt and a model file."""
    with np.load(DATA / "model_tiny.npz") as file:
        arrays = {key: file[key] for key in file.files}
    heads = json.loads(str(arrays["config"]))
    weights = {
        key.removeprefix("weight/"): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("weight/")
    }
    torch.save({"ema": weights, "args": argparse.Namespace(), "steps": 7}, tmp_path / "last.pt")
    number = next(value for key, value in heads.items() if "heads" in key)
    out = tmp_path / "m.safetensors"
    convert.main(["--source", str(tmp_path / "last.pt"), "--out", str(out), "--num-heads", str(number)])
    model = load_model(out)
    x, t, y, token = (torch.from_numpy(arrays[key]) for key in ("x", "t", "y", "cls"))
    with torch.no_grad():
        out = model.network(x, t, y.long(), token)
    assert np.abs(out.velocity.numpy() - arrays["velocity"]).max() < 2e-5
    assert np.abs(out.class_velocity.numpy() - arrays["cls_velocity"]).max() < 2e-5


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


@pytest.mark.parametrize("place", ["args", "top", "opt"])
def test_malicious_pickles_do_not_run(tmp_path, place):
    """A pickle that calls os.system is refused by name, wherever it sits, and calls nothing."""
    marker = tmp_path / "ran"
    content = {"ema": to_published(toy().state_dict()), place: Bomb(f"touch {marker}")}
    torch.save(content["top"] if place == "top" else content, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is refused.*system"):
        read_published(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state": {}}, "no 'ema' weights, only state"),
        ([1, 2], "holds a list"),
        ({"ema": {"a": torch.ones(1)}}, "not the weights of a SiT"),
    ],
)
def test_other_files_are_named(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=words):
        derive_config(read_published(tmp_path / "other.pt").state_dict, {})


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_published(tmp_path / "no.pt")
    write_published(tmp_path / "last.pt", toy())
    (tmp_path / "half.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half.pt is damaged"):
        read_published(tmp_path / "half.pt")
    with pytest.raises(UserError, match="give --num-heads"):
        convert.main(["--source", str(tmp_path / "last.pt"), "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
