"""--init-from: a run that starts from a trained model, of other classes, another size or other parts, or is refused."""

import json
from dataclasses import replace

import pytest
import torch

import train
from config import UserError
from models.model_file import find_model, load_model, read_info, save_model
from models.sit import SiT
from models.transfer import Target, check, class_rows, transfer
from tests.tiny import CONFIG, log_lines, train_flags, write_dataset


@pytest.fixture(scope="module")
def source(tools, tmp_path_factory):
    """A run of two steps on ash, birch and cedar."""
    out = tmp_path_factory.mktemp("source")
    train.main(train_flags(tools["data"], out, "--learning-rate", "1e-2", steps=2))
    return out / "run"


def start(data, out, source, *extra, **more):
    train.main(train_flags(data, out, "--init-from", str(source), *extra, **more))


def test_the_run_starts_from_the_source(tools, source, tmp_path, capsys):
    """At a learning rate of almost nothing the run's weights and EMA are the source's EMA; steps count from 0."""
    (tmp_path / "run/checkpoints/0000100.bak").mkdir(parents=True)  # no checkpoint: the run has not begun
    start(tools["data"], tmp_path, source, "--learning-rate", "1e-30", steps=1)
    assert "3 of 3 classes by name, 0 fresh" in capsys.readouterr().out
    before, after = load_model(source), load_model(tmp_path / "run")
    for name, tensor in before.network.state_dict().items():
        assert torch.allclose(after.network.state_dict()[name], tensor, rtol=0, atol=1e-25), name
    assert after.info.step == 1 and after.info.notes["initialised_from"] == before.sha256
    facts = json.loads((tmp_path / "run/config.json").read_text())["facts"]
    assert facts["initialised_from"] == before.sha256


def test_a_resumed_run_does_not_need_its_source(tools, source, tmp_path):
    """The source may be gone by then, for the dry run too; the model file still names its digest."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(find_model(source).read_bytes())
    start(tools["data"], tmp_path, copy, steps=1)
    digest = load_model(copy).sha256
    copy.unlink()
    start(tools["data"], tmp_path, copy, "--dry-run", steps=2)
    start(tools["data"], tmp_path, copy, steps=2)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]
    assert read_info(find_model(tmp_path / "run")).notes["initialised_from"] == digest


def network_pair(**changes):
    """A source of random weights with its header, and a fresh network that differs in `changes`."""
    from models.model_file import ModelInfo

    torch.manual_seed(0)
    network = SiT(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    scale = {"scale": (1.0,), "bias": (0.0,), "order": "bias_scale"}
    info = ModelInfo(CONFIG, "linear", 8, "v", scale, ("e",), classes=("Grey heron", "owl", "wren"))
    return network, info, SiT(replace(CONFIG, **changes))


def target(network, classes=("wren", "swift", "grey_heron"), **changes):
    from models.autoencoder import LatentNormalization

    given = {
        "network": network.config,
        "path": "linear",
        "classes": classes,
        "vae": "v",
        "vae_weights": "",
        "factor": 2,
    }
    given |= {"normalization": LatentNormalization((1.0,)), "encoders": ("e",), "encoder_weights": ("",)}
    return Target(**{**given, **changes})


def test_label_rows_follow_their_names():
    source, info, network = network_pair(num_classes=4)
    fresh = network.y_embedder.embedding_table.weight.clone()
    said = transfer(source.state_dict(), info, network, target(network, ("wren", "swift", "grey_heron", "tit")))
    rows, table = network.y_embedder.embedding_table.weight, source.y_embedder.embedding_table.weight
    assert torch.equal(rows[[0, 2, 4]], table[[2, 0, 3]]) and torch.equal(rows[[1, 3]], fresh[[1, 3]])
    assert said == ["2 of 4 classes by name, 2 fresh"]
    assert class_rows(("a b", "A_B", "c"), ("A-B", "c", "A_B")) == {1: 2, 2: 1}  # two that are alike decide nothing


def test_positions_are_resampled():
    """To a grid of twice the side: at the middle of four new tokens lies an old one; the class token's stays zero."""
    source, info, network = network_pair(input_size=8)
    with torch.no_grad():
        source.pos_embed[:, 1:] = torch.arange(4.0)[None, :, None]
    said = transfer(source.state_dict(), info, network, target(network))
    grid = network.pos_embed[0, 1:, 0].view(4, 4)
    assert "positions resampled from 2 x 2 to 4 x 4" in said and network.pos_embed[0, 0].abs().max() == 0
    assert torch.allclose(grid.mean(), torch.tensor(1.5), atol=1e-5) and (grid[:, 1:] > grid[:, :-1]).all()
    x = torch.randn(2, 4, 8, 8)
    assert network(x, torch.rand(2), torch.tensor([0, 3]), torch.randn(2, 16)).velocity.shape == x.shape


@pytest.mark.parametrize("there", [True, False], ids=["left out", "fresh"])
def test_parts_of_one_side(there):
    """Class token and projectors that only one of the two has: left out, or fresh; the rest is the source's."""
    source, info, network = network_pair(class_token_dim=0, align_dims=()) if there else network_pair()
    if not there:
        bare = replace(CONFIG, class_token_dim=0, align_dims=())
        source, info = SiT(bare), replace(info, network=bare, encoders=())
    said = transfer(source.state_dict(), info, network, target(network))
    word = "left out" if there else "fresh"
    assert {f"class token {word}", f"projectors {word}"} <= set(said)
    assert torch.equal(network.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert torch.equal(network.pos_embed[:, -4:], source.pos_embed[:, -4:])


def test_projectors_of_another_encoder_are_fresh():
    source, info, network = network_pair()
    before = network.projectors[0][0].weight.clone()
    said = transfer(source.state_dict(), replace(info, encoders=("f",)), network, target(network))
    assert "projectors fresh" in said and torch.equal(network.projectors[0][0].weight, before)


@pytest.mark.parametrize(
    ("of_source", "of_target", "words"),
    [
        ({"vae_weights": "a"}, {"vae_weights": "b"}, "VAE v, the dataset holds those of v: their weights differ"),
        ({}, {"factor": 4}, "8 px are 4 latent pixels there"),
        ({"normalization": {"scale": (0.5,)}}, {}, "normalised in another way"),
        ({"path": "cosine"}, {}, "--path-type cosine"),
        (
            {"encoder_weights": ("a",)},
            {"encoder_weights": ("b",)},
            r"makes class tokens of e, this run of e: pack .* \(--enc-type",
        ),
        ({"encoders": ("dinov2-vit-s",)}, {"encoders": ("dinov2-vit-b",)}, "makes class tokens of dinov2-vit-s"),
        ({"network": replace(CONFIG, depth=3)}, {}, "has depth 3, this run has 2: give --depth 3"),
        ({"network": replace(CONFIG, qk_norm=True)}, {}, "give --qk-norm"),
        ({"network": replace(CONFIG, in_channels=8)}, {}, "in_channels 8, this run has 4: it cannot be used"),
    ],
)
def test_what_means_something_else_is_refused(of_source, of_target, words):
    _, info, network = network_pair()
    assert check(info, target(network), "m") == []
    with pytest.raises(UserError, match=words):
        check(replace(info, **of_source), target(network, **of_target), "m")


def test_what_cannot_be_compared_is_said():
    """Different names of VAE or encoder, where a digest is missing: perhaps the same network in a folder."""
    _, info, network = network_pair()
    doubts = check(info, target(network, vae="./v", encoders=("./e",)), "m")
    assert len(doubts) == 2 and all("cannot be compared" in doubt for doubt in doubts)
    published = target(network, vae="stabilityai/sd-vae-ft-mse", vae_weights="b")
    assert check(replace(info, vae="ema", vae_weights="a"), published, "m") == []  # one encoder, two decoders


def test_a_refused_start_writes_nothing(tools, source, tmp_path):
    """Also where the source is no model file; the dry run refuses the same."""
    no_model = tmp_path / "no.safetensors"
    no_model.write_text("nothing")
    other = replace(read_info(find_model(source)), vae="w", vae_weights="a", normalization={"scale": (0.5,)})
    save_model(tmp_path / "w.safetensors", load_model(source).network.state_dict(), other)
    for file, words in (
        (no_model, "no.safetensors"),
        (tmp_path / "w.safetensors", "normalised in another way"),
        (tools["encoder"], "no model file at"),
    ):
        for dry in ((), ("--dry-run",)):
            with pytest.raises(UserError, match=words):
                start(tools["data"], tmp_path / "runs", file, *dry)
    assert not (tmp_path / "runs").exists()


def test_other_resolution_and_classes_train(source, tmp_path, capsys):
    """From 3 classes to others, without class token: a run that learns."""
    data = write_dataset(tmp_path / "data", vae="toy-vae")
    start(data, tmp_path, source, "--no-class-token", "--lr-warmup-steps", "2", "--lr-schedule", "cosine", steps=4)
    assert "class token left out" in capsys.readouterr().out
    rates = [line["lr"] for line in log_lines(tmp_path)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.5e-4])
    with pytest.raises(UserError, match="last step of the learning rate: 4 before, 5 now"):
        start(data, tmp_path, source, "--no-class-token", "--lr-warmup-steps", "2", "--lr-schedule", "cosine", steps=5)
