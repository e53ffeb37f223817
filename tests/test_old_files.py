"""Files written by earlier versions are read, resumed and continued.

tests/data/old was written by version 0.1.0 (commit 83daf46), before settings were renamed or removed: a packed dataset, a
run after 4 steps, a model file, finished samples, the parts of unfinished ones (8 of 12), and a recipe.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

OLD = Path(__file__).parent / "data" / "old"
ROOT = Path(__file__).parents[1]
GENERATE = (
    "--checkpoint",
    "old/model.safetensors",
    "--num-fid-samples",
    "12",
    "--num-steps",
    "4",
    "--per-proc-batch-size",
    "4",
    "--cfg-scale",
    "2",
    "--labels",
    "balanced",
    "--class-tokens",
    "--vae",
    "old/vae",
)
TRAIN = ("--config", "old/recipe.yaml", "--data-dir", "old/packed", "--output-dir", "old")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files, named by relative paths as when they were written."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(OLD, tmp_path / "old")).relative_to(tmp_path)


def program(monkeypatch, file, *arguments):
    """Run a program in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
    runpy.run_path(str(ROOT / file), run_name="__main__")


def samples(folder):
    with np.load(folder / "samples.npz") as stream:
        return stream["arr_0"], stream["arr_1"]


def same_pictures(a, b):
    """Equal but for the last bit of rounding, which differs between kinds of processors."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def lines(folder):
    return {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_a_packed_dataset_is_read_and_verified(old, monkeypatch, capsys):
    from dataset import PackedDataset

    dataset = PackedDataset(old / "packed")
    batch = dataset[[0, 11]]
    assert len(dataset) == 12 and dataset.manifest.classes == ["ash", "birch", "cedar"]
    assert batch.label.tolist() == [0, 2] and batch.patch_tokens[0].shape == (2, 4, 16)
    runpy.run_module("preprocessing.pack", run_name="not main")["main"](["--out", str(old / "packed"), "--verify"])


def test_a_run_is_resumed_as_it_would_have_gone_on(old, monkeypatch):
    """Steps 5 and 6 of the old run are those of a run that starts afresh today."""
    program(monkeypatch, "train.py", *TRAIN, "--exp-name", "run", "--max-train-steps", 6)
    program(monkeypatch, "train.py", *TRAIN, "--exp-name", "fresh", "--max-train-steps", 6)
    resumed, fresh = lines(old / "run"), lines(old / "fresh")
    assert sorted(resumed) == sorted(fresh) == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        for name in ("loss", "velocity", "class_velocity", "alignment", "grad_norm"):
            assert resumed[step][name] == pytest.approx(fresh[step][name], rel=1e-5), (step, name)


def test_a_changed_setting_of_an_old_run_is_still_refused(old, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        program(monkeypatch, "train.py", *TRAIN, "--exp-name", "run", "--max-train-steps", 6, "--learning-rate", 0.5)
    assert "--learning-rate: 0.001 before, 0.5 now" in capsys.readouterr().err


def test_a_model_file_is_sampled(old, monkeypatch):
    program(monkeypatch, "generate.py", *GENERATE, "--out", "again")
    assert same_pictures(samples(Path("again"))[0], samples(old / "samples")[0])


def test_unfinished_parts_are_continued(old, monkeypatch):
    """The 8 samples that are there are kept as they are, the last 4 are made."""
    kept = {path.name: path.read_bytes() for path in (old / "parts/parts").glob("part-*.npz")}
    program(monkeypatch, "generate.py", *GENERATE, "--out", old / "parts", "--keep-parts")
    assert len(kept) == 2 and all((old / "parts/parts" / name).read_bytes() == data for name, data in kept.items())
    pixels, labels = samples(old / "parts")
    assert np.array_equal(pixels[:8], samples(old / "samples")[0][:8])
    assert same_pictures(pixels, samples(old / "samples")[0]) and labels.tolist() == [0, 1, 2] * 4


def test_unfinished_parts_of_other_settings_are_refused(old, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        program(monkeypatch, "generate.py", *GENERATE, "--out", old / "parts", "--seed", 1)
    assert "seed = 0" in capsys.readouterr().err


def test_finished_samples_are_complete_and_measured(old, monkeypatch, capsys):
    from evaluations.image_sets import open_images

    before = (old / "samples/samples.npz").read_bytes()
    program(monkeypatch, "generate.py", *GENERATE, "--out", old / "samples")
    assert "is complete" in capsys.readouterr().out and (old / "samples/samples.npz").read_bytes() == before
    images = open_images([old / "samples/samples.npz"])
    assert images.shape == (12, 8, 8, 3) and images.sidecar["cfg_scale"] == 2.0


def test_a_model_file_is_exported(old):
    from models.model_file import load_model
    from models.published import Given, export_published, import_published

    export_published(old / "model.safetensors", Path("out.pt"))
    info = import_published(Path("out.pt"), Path("back.safetensors"), given=Given(num_heads=2))
    assert info.network == load_model(old / "model.safetensors").info.network and info.step == 4
