"""Starting a run: what is refused in one sentence, and when; trackers; recipes and paths as people write them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import train
from config import UserError, parse
from sampling import tokens
from sampling.labels import read_labels
from tests.test_trackers import FakeWandb
from tests.tiny import train_flags
from training import folder, trackers
from training.settings import TrainConfig


@pytest.mark.parametrize("function", ["init", "define_metric"])
def test_wandb_fails_at_the_start(tools, tmp_path, monkeypatch, function):
    """Whatever it raises, also no error of its own: one sentence, before the first step."""
    wandb = FakeWandb(mode="offline")
    wandb.failing = (function,)
    wandb.Error = lambda text: OSError(28, "No space left on device")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(
        UserError, match=r"--report-to wandb: \[Errno 28\] No space .*: set WANDB_MODE=offline, or choose"
    ):
        train.main(train_flags(tools["data"], tmp_path, "--report-to", "wandb"))
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def test_tensorboard_fails_at_the_start(tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", full)
    with pytest.raises(
        UserError, match=r"--report-to tensorboard: .*No space left on device: or choose --report-to none"
    ):
        trackers.open_tracker(tmp_path, SimpleNamespace(report_to="tensorboard"), 0)


def test_a_dataset_that_was_extended(tmp_path):
    """The refusal has the number of classes and the first difference, not a thousand names."""
    (tmp_path / "checkpoints/0000001").mkdir(parents=True)
    classes = [f"n{i:08d}" for i in range(1000)]
    settings = TrainConfig()
    folder.record_settings(tmp_path, settings, {"network": {}, "classes": classes})
    with pytest.raises(UserError) as refused:
        folder.record_settings(tmp_path, settings, {"network": {}, "classes": [*classes, "zebra"]})
    assert "classes: 1000 before, 1001 now; number 1000: None before, zebra now" in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("names", [("batch_size", "batch_size"), ("batch_size", "batch-size")])
def test_a_recipe_with_a_key_twice(tmp_path, names):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{names[0]}: 256\nseed: 1\n{names[1]}: 64\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: batch_size is given twice, in lines 1 and 3"):
        parse(TrainConfig, "", ["--config", str(recipe)])


def test_a_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    """`--flag=~/x` is not expanded by the shell: a recipe, folders, lists of labels, rows of tokens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/runs\ninit_from: ~/model\n")
    settings = parse(TrainConfig, "", ["--config=~/recipe.yaml", "--data-dir=~/data"])
    assert settings.output_dir == tmp_path / "runs" and settings.data_dir == tmp_path / "data"
    (tmp_path / "labels.txt").write_text("0\n2\n")
    assert read_labels(("~/labels.txt",), (), 3, (), 2).values.tolist() == [0, 2]
    np.save(tmp_path / "tokens.npy", np.ones((2, 4), np.float32))
    assert tokens._rows_of_file("~/tokens.npy:1", 4).shape == (1, 4)


def test_no_means_float32_in_a_recipe(tmp_path):
    """YAML reads `no` as false."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: no\n")
    settings = parse(TrainConfig, "", ["--config", str(recipe)])
    assert settings.mixed_precision == "fp32"


@pytest.mark.parametrize(
    "wrong",
    [
        ("--adam-beta1", "1.5"),
        ("--ema-decay", "2"),
        ("--ema-decay", "1.0"),
        ("--seed", "1" + "0" * 20),
        ("--depth", "0"),
        ("--hidden-size", "0"),
        ("--num-heads", "3"),
        ("--eval-every", "5", "--eval-reference", "nowhere.npz"),
        ("--vae", "nowhere"),
        ("--max-hours", "nan"),
        ("--exp-name", "a" * 256),
    ],
    ids=lambda flags: " ".join(flags)[:30],
)
def test_the_dry_run_refuses_what_the_start_refuses(tools, tmp_path, wrong):
    flags = train_flags(tools["data"], tmp_path, *wrong)
    with pytest.raises(UserError) as start:
        train.main(flags)
    with pytest.raises(UserError) as dry:
        train.main([*flags, "--dry-run"])
    assert str(start.value) == str(dry.value)
