"""What train.py refuses before anything starts: flags, folders, settings of an earlier start."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import train
from common.lock import FolderLock
from config import UserError
from tests.tiny import log_lines as lines
from tests.tiny import train_flags as flags
from tests.tiny import write_dataset, write_encoder

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--enc-type", "toy-99"), r"--enc-type toy-99: dataset .* holds tokens of toy-16; pack it again"),
        (("--vae", "mse"), r"--vae mse: dataset .* was packed with VAE"),
        (("--resolution", "256"), r"--resolution 256: dataset .* was packed at 8 pixels"),
        (("--num-classes", "1000"), r"--num-classes 1000: dataset .* has 3 classes"),
        (
            ("--patch-size", "4"),
            r"--patch-size 4 gives 1 x 1 patches, but the tokens of toy-16 were packed on a 2 x 2 grid",
        ),
        (
            ("--batch-size", "9", "--gradient-accumulation-steps", "2"),
            r"batch size 9 must be divisible by 1 processes x 2",
        ),
        (("--model", "SiT-M/2"), r"model 'SiT-M/2' is none of"),
        (("--encoder-depth", "3"), r"alignment after block 3, but the network has blocks 1 to 2"),
        (("--learning-rate", "0"), r"--learning-rate must be above 0, got 0.0"),
        (("--cfg-prob", "1.5"), r"--cfg-prob must be at most 1, got 1.5"),
        (("--exp-name", "a/b"), r"--exp-name 'a/b' must be the name of a folder"),
        (("--eval-every", "2"), r"--eval-every needs --eval-reference"),
        (("--eval-training", "x"), r"--eval-training is compared with at each --eval-every steps"),
        (("--adam-beta1", "1.5"), r"--adam-beta1 must be below 1, got 1.5"),
        (("--ema-decay", "1"), r"--ema-decay must be below 1, got 1.0"),
        (("--seed", str(10**20)), r"--seed must be below 18446744073709551616, got 100000000000000000000"),
        (("--learning-rate", "inf"), r"--learning-rate must be below inf, got inf"),
        (("--adam-epsilon", "nan"), r"--adam-epsilon must be at least 0, got nan"),
        (("--projector-dim", "0"), r"--projector-dim must be above 0"),
        (("--sampling-steps", "2", "--vae", "VAE-FOLDER"), r"--vae VAE-FOLDER"),
    ],
)
def test_contradictions_are_one_sentence(tools, tmp_path, extra, words):
    """Before anything starts, with the flag and what to do; the dry run refuses the same, apart from the VAE's files."""
    for dry in ((), ("--dry-run",)) if "VAE-FOLDER" not in extra else ((),):
        with pytest.raises(ValueError, match=words):
            train.main(flags(tools["data"], tmp_path, *extra, *dry))
    assert not list(tmp_path.glob("*/checkpoints"))


def test_wrong_folders(tools, tmp_path):
    """Missing, or not packed: FileNotFoundError naming it."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.main(flags(tmp_path / "nowhere", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        train.main(flags(tmp_path / "empty", tmp_path))


def test_another_config_says_what_differs(tools, tmp_path, capsys):
    """Same folder, other settings: the differences and the ways on; --accept-changes continues, another network never."""
    train.main(flags(tools["data"], tmp_path, steps=2))
    with pytest.raises(UserError, match=r"--learning-rate: 0.0001 before, 0.0002 now\): repeat the former values"):
        train.main(flags(tools["data"], tmp_path, "--learning-rate", "2e-4"))
    with pytest.raises(UserError, match=r"--depth: 2 before, 3 now\): choose another --exp-name"):
        train.main(flags(tools["data"], tmp_path, "--depth", "3", "--accept-changes"))
    with pytest.raises(UserError, match=r"images: 20 before, 21 now"):
        train.main(flags(write_dataset(tmp_path / "other", count=21, vae=tools["vae"]), tmp_path))
    train.main(flags(tools["data"], tmp_path, "--learning-rate", "2e-4", "--accept-changes"))
    assert "continuing with another setting: --learning-rate: 0.0001 before, 0.0002 now" in capsys.readouterr().out
    assert [line["lr"] for line in lines(tmp_path)] == [1e-4, 1e-4, 2e-4, 2e-4]
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["learning_rate"] == 2e-4
    train.main(flags(tools["data"], tmp_path, "--learning-rate", "2e-4", "--log-every", "2", steps=6))  # free to change


def test_one_run_a_folder(tools, tmp_path):
    """A second run in the same folder is refused, naming the process that has it; afterwards it may."""
    lock = FolderLock(tmp_path / "run", "run.lock", "")
    with pytest.raises(
        UserError, match=rf"run is in use by process {os.getpid()} on .*; wait for it, or choose another"
    ):
        train.main(flags(tools["data"], tmp_path))
    lock.close()
    train.main(flags(tools["data"], tmp_path, steps=1))


def test_what_costs_little_is_checked_first(tools, tmp_path, monkeypatch):
    """Flags, dataset, lock and record of the folder: before the VAE, weights of encoders or the reference are read."""
    from training import setup

    loaded: list[str] = []
    for name in ("load_autoencoder", "load_encoder", "FrechetProbe"):
        original = getattr(setup, name)

        def load(*args, name=name, original=original, **rest):
            loaded.append(name)
            return original(*args, **rest)

        monkeypatch.setattr(setup, name, load)
    reference = tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.zeros((8, 8, 8, 3), dtype=np.uint8))
    expensive = ("--sampling-steps", "2", "--preview-steps", "1", "--eval-every", "2", "--eval-samples", "8")
    expensive += ("--eval-reference", str(reference), "--eval-features", f"timm:{tools['encoder']}")
    expensive += ("--enc-type", str(tools["encoder"]))
    train.main(flags(tools["pixels"], tmp_path, *expensive, steps=1))
    assert sorted(set(loaded)) == ["FrechetProbe", "load_autoencoder", "load_encoder"]
    loaded.clear()
    lock = FolderLock(tmp_path / "run", "run.lock", "")
    with pytest.raises(UserError, match="run is in use by process"):
        train.main(flags(tools["pixels"], tmp_path, *expensive))
    lock.close()
    for wrong in (("--learning-rate", "1"), ("--batch-size", "7", "--gradient-accumulation-steps", "2")):
        with pytest.raises(UserError, match=r"was started with other settings|must be divisible"):
            train.main(flags(tools["pixels"], tmp_path, *expensive, *wrong))
    with pytest.raises(UserError, match="does not exist"):
        train.main(flags(tools["pixels"], tmp_path, *expensive, "--enc-type", "./nowhere"))
    assert loaded == []


def test_class_means_are_read_before_the_first_step(tmp_path):
    """A missing file of the dataset is found by the dry run and at the start, not at the first save."""
    data = write_dataset(tmp_path / "data")
    (data / "class_means.npy").unlink()
    for dry in ((), ("--dry-run",)):
        with pytest.raises(UserError, match=r"class_means\.npy is missing; repair it"):
            train.main(flags(data, tmp_path, *dry))
    assert not (tmp_path / "run").exists()
    train.main(flags(data, tmp_path, "--no-class-token", name="without", steps=1))  # which does not use them


def test_a_start_that_failed_binds_nobody(tools, tmp_path):
    """Before the first checkpoint the settings may change: here those of an encoder whose weights were missing."""
    broken = write_encoder(tmp_path / "broken")
    for weights in broken.glob("*model*"):
        weights.unlink()
    with pytest.raises(UserError, match="broken"):
        train.main(flags(tools["pixels"], tmp_path, "--enc-type", str(broken)))
    train.main(flags(tools["pixels"], tmp_path, "--enc-type", str(tools["encoder"]), steps=1))


def test_a_folder_that_cannot_be_made(tools, tmp_path):
    """One sentence with its name."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run/run.lock cannot be written: Not a directory"):
        train.main(flags(tools["data"], tmp_path / "file"))
