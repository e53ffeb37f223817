"""Whole measurements from files, and the programs of evaluation."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError, parse
from evaluations import features, measure
from evaluations.features import Extractor, Features
from evaluations.metrics import frechet_distance
from evaluations.registry import METRICS
from evaluations.results import columns, load
from evaluations.settings import EvaluateConfig
from evaluations.statistics import compute_statistics
from tests.toy_images import averages, pixels

ROOT = Path(__file__).parents[1]


def test_a_measurement_from_files(measurement, judge, tmp_path):
    """All metrics of one space, class accuracy, protocol and warnings arrive in results.json and the Markdown row."""
    everything = measurement(
        density_coverage=True, kernel_distance=True, classifier=str(judge), memorization=3, error_groups=4
    )
    measure.measure(everything)
    found = load(tmp_path / "results.json")
    expected = {"fd_judge", "precision_judge", "recall_judge", "density_judge", "coverage_judge", "kd_judge"}
    assert set(found.metrics) == expected | {"class_accuracy", "authenticity"}
    extractor = features.load_timm(str(judge))
    pair = [
        compute_statistics(extractor(torch.from_numpy(pixels(n, seed=seed)).permute(0, 3, 1, 2)).pooled)
        for n, seed in ((60, 0), (40, 1))
    ]
    assert found.metrics["fd_judge"].value == pytest.approx(frechet_distance(*pair), rel=1e-4)
    assert found.metrics["fd_judge"].error > 0
    assert (found.metrics["fd_judge"].n_samples, found.metrics["fd_judge"].n_reference) == (40, 60)
    assert found.metrics["class_accuracy"].value == 1.0
    assert found.protocol["sampling"] == {"schema": 1, "mode": "sde", "steps": 250, "cfg_scale": 2.3}
    assert any("only 40 samples" in warning for warning in found.warnings)
    assert "sde 250" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "memorization.png") as picture:
        assert picture.size[0] == 6 * (64 + 4) and picture.size[1] > 64  # three pairs in a row, enlarged to 64 pixels


def test_wrong_labels_lower_the_accuracy(measurement, judge, tmp_path):
    """The judge's answers shifted by one class are all wrong; missing or impossible labels are refused."""
    with np.load(tmp_path / "s.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    np.savez(tmp_path / "s.npz", images, (labels + 1) % 5)
    judged = measurement(classifier=str(judge), features=(), reference=())
    found = measure.measure(judged)
    assert found.metrics["class_accuracy"].value == 0
    assert [warning.split(":")[0] for warning in found.warnings] == ["only 40 samples"]
    np.savez(tmp_path / "s.npz", images)
    with pytest.raises(ValueError, match=r"needs the labels of the samples \(arr_1\)"):
        measure.measure(judged)
    np.savez(tmp_path / "s.npz", images, labels + 5)
    with pytest.raises(ValueError, match=r"has label .*, the classifier .* 5 classes"):
        measure.measure(judged)


def test_generated_tokens_against_the_encoder(measurement, judge, tmp_path):
    """Tokens read off the images themselves agree fully; the same tokens shifted by one image do not."""
    from models.encoder import load_encoder

    encoder = load_encoder(str(judge), 4)
    with np.load(tmp_path / "s.npz") as stored:
        tokens = encoder(torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2)).class_token.numpy()
    np.savez(tmp_path / "r.npz", pixels(60), np.arange(60) % 4)
    asked = {"features": (), "class_tokens": tmp_path / "tokens.npy", "encoder": str(judge), "token_grid": 4}
    np.save(tmp_path / "tokens.npy", tokens)
    found = measure.measure(measurement(**asked)).metrics
    for key in ("token_cosine", "token_retrieval", "token_class_agreement"):
        assert found[key].value == pytest.approx(1, abs=1e-5), key
    assert found["token_cosine_shuffled"].value < 0.99
    np.save(tmp_path / "tokens.npy", np.roll(tokens, 1, axis=0))
    assert measure.measure(measurement(**asked)).metrics["token_retrieval"].value < 0.2
    np.save(tmp_path / "tokens.npy", tokens[:30])
    with pytest.raises(ValueError, match=r"tokens\.npy holds float32 \(30, 32\), not one float vector for each of 40"):
        measure.measure(measurement(**asked))


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 7}, {"dtype": "fp64"}])
def test_batch_size_and_dtype_leave_the_numbers(measurement, change):
    usual, other = measure.measure(measurement()), measure.measure(measurement(cache=False, **change))
    for key, metric in usual.metrics.items():
        assert other.metrics[key].value == pytest.approx(metric.value, rel=1e-3), key


def test_two_processes_measure_the_same(measurement, tmp_path, judge):
    """torchrun with 2 gloo processes gives the numbers of one: 41 images split unevenly, all metrics of one space."""
    np.savez(tmp_path / "s.npz", pixels(41, seed=1), np.arange(41) % 5)
    extra = {"density_coverage": True, "kernel_distance": True, "classifier": str(judge), "cache": False}
    single = measure.measure(measurement(**extra))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "evaluations/evaluate.py",
        "--samples",
        tmp_path / "s.npz",
        "--reference",
        tmp_path / "r.npz",
        "--features",
        f"timm:{judge}",
        "--density-coverage",
        "--kernel-distance",
        "--classifier",
        judge,
        "--device",
        "cpu",
        "--no-cache",
        "--out",
        tmp_path / "two.json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    both = load(tmp_path / "two.json")
    assert both.metrics.keys() == single.metrics.keys() and both.warnings == single.warnings
    for key, metric in single.metrics.items():
        assert both.metrics[key].value == pytest.approx(metric.value, rel=1e-5), key


def test_results_are_saved_when_nobody_reads_the_output(measurement, judge, tmp_path):
    """`evaluate ... | head -1`: the pipe breaks during the measurement, which goes on."""
    command = [sys.executable, "-m", "evaluations.evaluate", "--samples", tmp_path / "s.npz", "--device", "cpu"]
    command += ["--reference", tmp_path / "r.npz", "--features", f"timm:{judge}", "--no-cache"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 0, process.stderr.read().decode()
    assert "fd_judge" in load(tmp_path / "results.json").metrics


def test_every_metric_can_be_measured(measurement, judge, tmp_path, monkeypatch):
    """With all switches on, each entry of the registry gives its columns: in Inception's space, in CLIP's, elsewhere."""
    torch.manual_seed(0)
    np.save(tmp_path / "tokens.npy", torch.randn(40, 32).numpy())
    colours = averages()

    def load_features(spec, **_):
        plain = spec != "inception"
        return Extractor(
            spec,
            spec,
            lambda x: Features(f := colours(x).pooled, None if plain else f[:, :3], None if plain else f),
            torch.device("cpu"),
        )

    monkeypatch.setattr("evaluations.features.load", load_features)
    everything = {"density_coverage": True, "kernel_distance": True, "mind": True, "memorization": 1, "token_grid": 4}
    everything |= {"classifier": str(judge), "class_tokens": tmp_path / "tokens.npy", "encoder": str(judge)}
    np.savez(tmp_path / "r.npz", pixels(60), np.arange(60) % 4)
    everything["training_images"] = (tmp_path / "s.npz",)  # the samples themselves: they are copies
    found = measure.measure(measurement(features=("inception", "clip", "other"), **everything))
    assert found.metrics["nearer_to_training"].value == 1 and found.protocol["n_training"] == 40
    assert any("samples are nearer to training images" in warning for warning in found.warnings)
    keys = {"clip": "cmmd", "inception": "fid", "other": "fd_other"}
    assert {found.metrics[key].space for key in keys.values()} == set(keys)
    for entry in METRICS:
        for column in entry.columns:
            assert any(key == column.key or key.startswith(f"{column.key}_") for key in found.metrics), column.key
    assert "fd_inception" not in found.metrics and "fid_other" not in found.metrics
    assert {column.key for column in columns([found])} == set(found.metrics)


def test_program_errors_are_one_line(tmp_path):
    """The script form finds the project from any folder; a user's mistake is one line and status 2."""
    command = [sys.executable, str(ROOT / "evaluations" / "evaluate.py"), "--samples", str(tmp_path / "no.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'no.npz'}: no such file or folder\n"


def test_steps_after_the_features_are_named(measurement, capsys):
    measure.measure(measurement(density_coverage=True))
    captured = capsys.readouterr()
    steps = [line.removeprefix("judge: ") for line in captured.out.splitlines() if line.startswith("judge: ")]
    of = "of 40 samples and 60 reference images"
    assert steps == [f"{words} {of}" for words in ("FD", "Precision, Recall", "Density, Coverage")]
    assert captured.err.count("100%") == 2 and "reference, judge" in captured.err and "samples, judge" in captured.err


@pytest.mark.parametrize("program", ["cknna", "compare", "evaluate", "report"])
def test_examples_of_the_help_can_be_given(program):
    """Every example is a command whose flags the program takes."""
    module = importlib.import_module(f"evaluations.{program}")
    (settings,) = (value for name, value in vars(module).items() if name.lower() == f"{program}config")
    for example in module.EXAMPLES:
        words = shlex.split(example)
        assert (
            f"evaluations{'/' if words[1].endswith('.py') else '.'}{program}" in example and len(module.EXAMPLES) >= 2
        )
        words = words[2 if words[1].endswith(".py") else 3 :]
        parse(settings, "", words if words[0].startswith("-") else ["--results", *words])


@pytest.mark.parametrize(
    ("flag", "ours"),
    [("--ref", "--reference"), ("--sample-batch", "--samples"), ("--bs", "--batch-size"), ("--n", "--num-samples")],
)
def test_flags_of_other_projects(flag, ours):
    with pytest.raises(UserError, match=f"unknown argument '{flag}': here it is '{ours}'"):
        parse(EvaluateConfig, "", ["--samples", "a.npz", flag, "5"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"batch_size": 0}, "--batch-size"), ({"error_groups": 1}, "--error-groups 1"), ({"split": 0}, "--split")],
)
def test_impossible_settings(change, sentence, tmp_path):
    flags = [word for name, value in change.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(UserError, match=sentence):
        parse(EvaluateConfig, "", ["--samples", str(tmp_path), *flags])
