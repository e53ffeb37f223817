"""Model files and checkpoints that are not what was written, and a run whose record of its settings is gone."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
import torch

import convert
import generate
import train
from config import UserError
from evaluations import cknna
from models.model_file import find_model, load_model, read_state
from tests.packs import flip
from tests.tiny import train_flags


@pytest.fixture(scope="module")
def trained(tools, tmp_path_factory):
    """A run of two steps, two checkpoints."""
    out = tmp_path_factory.mktemp("trained")
    train.main(train_flags(tools["data"], out, "--checkpointing-steps", "1", steps=2))
    return out / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def programs(tools, model, out, monkeypatch):
    """Each program that loads a model file, with what it writes."""
    measured = ["cknna", "--checkpoint", str(model), "--dataset", str(tools["data"]), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*measured, "--out", str(out / "c.json")])
    yield lambda: generate.main(["--checkpoint", str(model), "--out", str(out / "s"), "--num-fid-samples", "2"])
    yield lambda: convert.main(["--to", "published", "--source", str(model), "--out", str(out / "x.pt")])
    yield cknna.main
    yield lambda: train.main(train_flags(tools["data"], out, "--init-from", str(model), name="from"))


@pytest.mark.parametrize("place", ["in a checkpoint", "by itself"])
def test_a_flipped_bit_in_a_model_file(tools, run, tmp_path, monkeypatch, place):
    """Every program that loads it refuses, names the file, and leaves nothing."""
    model, out = find_model(run), tmp_path / "out"
    if place == "by itself":
        model = shutil.copy(model, tmp_path / "m.safetensors")
    flip(model, -1000)
    for program in programs(tools, model, out, monkeypatch):
        with pytest.raises(UserError, match=rf"{model} has changed since it was written \(SHA-256"):
            program()
    assert not out.exists() or not [file for file in out.rglob("*") if file.is_file() and "lock" not in file.name]


def test_the_model_file_of_another_checkpoint(run):
    """A mixture of two checkpoints, each file whole, is refused; so is one beside a damaged state.json."""
    older, newer = (run / "checkpoints" / step for step in ("0000001", "0000002"))
    shutil.copy(older / "ema.safetensors", newer / "ema.safetensors")
    with pytest.raises(UserError, match=r"0000002/ema\.safetensors has changed since it was written"):
        load_model(run)
    (older / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"0000001/state\.json lacks"):
        load_model(older)


def test_files_without_a_digest_of_their_own(trained, tmp_path):
    """Of earlier versions: loaded as they are."""
    from safetensors.torch import load_file, save_file

    model = load_model(trained)
    save_file(load_file(model.path), tmp_path / "m", metadata={"reg": json.dumps(asdict(model.info))})
    again = load_model(tmp_path / "m")
    assert again.info == model.info
    assert all(map(torch.equal, model.network.state_dict().values(), again.network.state_dict().values()))


def test_config_json_is_gone(tools, run, capsys):
    """The settings are compared with those in state.json: another learning rate or network is refused, the same resumes."""
    (run / "config.json").unlink()
    out = run.parent
    with pytest.raises(
        UserError, match=r"run was started with other settings \(--learning-rate: 0.0001 before, 0.5 now"
    ):
        train.main(train_flags(tools["data"], out, "--learning-rate", "0.5"))
    with pytest.raises(UserError, match=r"--depth: 2 before, 3 now\): choose another --exp-name"):
        train.main(train_flags(tools["data"], out, "--depth", "3", "--accept-changes"))
    assert not (run / "config.json").exists()
    train.main(train_flags(tools["data"], out, steps=3))
    assert "config.json is missing: the settings are compared with those of" in capsys.readouterr().out
    assert read_state(run / "checkpoints" / "0000003").settings["learning_rate"] == 1e-4
    assert (run / "config.json").is_file()
