"""Model files: written whole, read without a second copy of the weights, wrong ones named."""

import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.files import WriteError, sha256
from models.model_file import MODEL_FILE, ModelInfo, find_model, load_model, read_info, save_model
from models.sit import SiT, SiTConfig

CONFIG = SiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, class_token_dim=6, align_dims=())
INFO = ModelInfo(CONFIG, "linear", 32, "ema", {"scale": [0.5]}, encoders=("e",), classes=("ant", "bee"), step=7)


def network(config=CONFIG):
    torch.manual_seed(0)
    network = SiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    return network.eval()


def outputs(network):
    generator = torch.Generator().manual_seed(0)
    latent, token = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 6, generator=generator)
    with torch.no_grad():
        predicted = network(latent, torch.tensor([0.2, 0.9]), torch.tensor([0, 5]), token)
    return predicted.velocity, predicted.class_velocity


def test_what_is_saved_is_loaded(tmp_path):
    """Network, header and class means, bit for bit; the model remembers its file and digest."""
    original, means = network(), torch.arange(30.0).reshape(5, 6)
    folder = tmp_path / "run" / "checkpoints" / "0000007"
    save_model(folder / MODEL_FILE, original.state_dict(), INFO, means)
    model = load_model(tmp_path / "run")
    assert model.info == INFO and torch.equal(model.class_means, means) and not model.network.training
    assert all(map(torch.equal, outputs(original), outputs(model.network)))
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert model.path == folder / MODEL_FILE and model.sha256 == sha256(folder / MODEL_FILE)
    assert [file.name for file in folder.iterdir()] == [MODEL_FILE]


def test_weights_of_half_precision_become_float32(tmp_path):
    save_model(tmp_path / "m", network().half().state_dict(), INFO)
    model = load_model(tmp_path / "m")
    assert {tensor.dtype for tensor in model.network.state_dict().values()} == {torch.float32}
    assert torch.equal(model.network.final_layer.linear.weight, network().half().float().final_layer.linear.weight)


def test_a_loaded_network_does_not_change_its_file(tmp_path):
    """Its weights are mapped from the file: changes of them are private."""
    save_model(tmp_path / "m", network().state_dict(), INFO)
    before = sha256(tmp_path / "m")
    model = load_model(tmp_path / "m")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    assert sha256(tmp_path / "m") == before == model.sha256


def test_loading_makes_no_copy_of_the_weights(tmp_path):
    """Memory that is not backed by the file grows by less than half its size."""
    config = SiTConfig(depth=4, hidden_size=512, num_heads=8, input_size=4, num_classes=5, align_dims=())
    save_model(tmp_path / "m", SiT(config).state_dict(), replace(INFO, network=config))

    def anonymous():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024

    size = (tmp_path / "m").stat().st_size
    before = anonymous()
    model = load_model(tmp_path / "m")
    assert anonymous() - before < size / 2 and size > 2**26
    assert model.network.blocks[3].mlp.fc2.weight.detach().std() > 0


def test_permissions_follow_the_umask(tmp_path):
    """safetensors alone would make files that nobody else can read."""
    before = os.umask(0o022)
    try:
        save_model(tmp_path / "m", network().state_dict(), INFO)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o644


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path):
    """A limit of the file system is one sentence; nothing half-written remains."""
    save_model(tmp_path / "m", network().state_dict(), INFO)
    before = (tmp_path / "m").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(WriteError, match=r"/m cannot be written: .*File too large"):
            save_model(tmp_path / "m", network().state_dict(), replace(INFO, step=8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "m").read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m"]


def test_wrong_files_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"no model file at .*nowhere"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "last.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"a published .pt \(.*last.pt perhaps\)"):
        find_model(tmp_path)
    save_model(tmp_path / "m", network().state_dict(), INFO)
    (tmp_path / "half").write_bytes((tmp_path / "m").read_bytes()[:-10])
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    save_model(tmp_path / "later", network().state_dict(), replace(INFO, schema=2))
    save_model(tmp_path / "deeper", network().state_dict(), replace(INFO, network=replace(CONFIG, depth=2)))
    for name, words in (
        ("half", "half is truncated or not a safetensors file"),
        ("other", "other is not a model file of this project"),
        ("later", "later has schema 2, this code reads 1"),
        ("deeper", r"deeper: the weights do not fit the config in its header: .*blocks\.1"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            read_info(tmp_path / name)
            load_model(tmp_path / name)


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path):
    for name in ("9999999", "10000000", "0000005", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "ema.safetensors").touch()
    assert find_model(tmp_path).parent.name == "10000000"
