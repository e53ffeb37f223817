"""The benchmark of fine-tuning, on tiny networks and noise."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import finetune
from config import UserError, parse


@pytest.fixture
def flags(tools, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "RESULTS", tmp_path / "results")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in "abcd":
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(7):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.png")
    recipe = tmp_path / "tiny.yaml"
    shape = "model: SiT-S/2\ndepth: 2\nhidden-size: 32\nnum-heads: 2\nencoder-depth: 1\nprojector-dim: 32\n"
    recipe.write_text(shape + "batch-size: 4\nmixed-precision: fp32\nnum-workers: 0\nlog-every: 1\n")
    given = {"out": tmp_path / "out", "images": tmp_path / "images", "vae": tools["vae"], "encoder": tools["encoder"]}
    given |= {"judge": judge, "recipe": recipe, "resolution": 8, "per-class": 5, "base-steps": 2, "num-steps": 2}
    words = [word for name, value in {**given, "samples": 20, "seeds": 3}.items() for word in (f"--{name}", str(value))]
    return [*words, "--steps", "2", "3", "4"]


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on(flags, tmp_path, capsys):
    """A row for each arm and step, before and the real images; a second start packs, trains and measures nothing again."""
    finetune.main([*flags, "--new", "c", "d"])
    rows = json.loads((tmp_path / "results/finetune-digits.json").read_text())["rows"]
    assert [(row["arm"], row["step"]) for row in rows] == [
        ("base", 0),
        *[(arm, step) for arm in ("fine-tuned", "scratch") for step in (2, 3, 4)],
    ]
    assert all(row["fd"] > 0 and 0 <= row["nearer_to_training"] <= 1 for row in rows)
    table = (tmp_path / "results/finetune-digits.md").read_text()
    assert table.count("\n") >= 5 and "The training images themselves" in table
    assert "torch" in table.splitlines()[-1]
    shutil.rmtree(tmp_path / "out/base")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()}
    finetune.main([*flags, "--new", "c", "d"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/results").iterdir()} == times
    assert not (tmp_path / "out/base").exists()  # the base model is there


def test_a_folder_is_never_used_for_other_settings(flags, tmp_path):
    """But for the seeds, of which there may be more, and the names; a recipe is compared by its content."""

    def record(*more):
        finetune.record(parse(finetune.FinetuneBenchmark, "", [*flags, *more]))

    record()
    record("--seeds", "3", "4", "--label", "other")
    with pytest.raises(UserError, match=r"out was made with other settings \(--samples: 20 before, 30 now\): choose"):
        record("--samples", "30")
    with (tmp_path / "tiny.yaml").open("a") as recipe:
        recipe.write("adam-beta1: 0.5\n")
    with pytest.raises(UserError, match=r"--recipe: tiny\.yaml, SHA-256 "):
        record()


def test_a_class_that_is_not_there(flags, tmp_path):
    """Folders are classes, other files beside them are not."""
    (tmp_path / "images/train/README").touch()
    with pytest.raises(UserError, match=r"--new z: .*train has no such class \(a, b, c, d\)"):
        finetune.main([*flags, "--new", "z"])
