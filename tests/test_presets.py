"""generate.py --preset: what each preset means, and what wins over it."""

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import generate as program
from common.presets import GUIDANCE_HIGH, GUIDANCE_SCALE, PRESETS
from common.processes import Processes
from config import as_dict
from generate import read
from models import acceleration
from models.guidance import Guidance
from sampling import run
from sampling.job import load
from sampling.messages import what_it_makes
from sampling.sampler import guidance_of, solver_of
from sampling.settings import SampleConfig, resolved
from tests import toy_model
from train import TrainConfig
from training import previews

ROOT = Path(__file__).parents[1]
place = toy_model.place  # a fixture


def flags(place, out, *more, model="m", preset="preview"):
    return ["--checkpoint", str(place / model), "--out", str(out), "--preset", preset, *more]


def sample(place, out, *more, **names):
    """Run in this process; the sidecar."""
    run.generate(read(flags(place, out, *more, **names)))
    return json.loads((out / "samples.json").read_text())


def job(place, *more, **names):
    settings = read(flags(place, place / "unused", *more, **names))
    return load(settings, Processes("cpu"))


def test_presets_speak_of_settings():
    """Each key is a setting, each value passes the checks; the class token's own follow the latent's."""
    known = {field.name for field in fields(SampleConfig)}
    for name, values in PRESETS.items():
        assert set(values) <= known - {"preset"} and not any(key.startswith("cls_") for key in values)
        settings = read(["--checkpoint", "c", "--out", "o", "--preset", name])
        assert {key: getattr(settings, key) for key in values} == values
        solver_of(resolved(settings)), guidance_of(resolved(settings))


def test_paper_is_the_setting_of_the_readme_and_the_recipes():
    """The preset, the documented commands of 50,000 samples and the recipes' guided results are one setting."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/sampling.md")).replace("\\\n", " ")
    found = re.findall(r"generate\.py (--checkpoint .*(?:50000|--preset paper).*)", text)
    assert found
    preset = resolved(read(["--checkpoint", "c", "--out", "o", "--preset", "paper"]))
    for command in found:
        written = resolved(read(shlex.split(command)))
        same = replace(written, checkpoint=preset.checkpoint, out=preset.out, preset="paper")
        assert same == preset, command
    guidance = guidance_of(preset)
    assert guidance.scales(0.85) == (2.3, 2.3) and guidance.scales(0.86) == (1, 1)
    stated = [
        found
        for recipe in sorted((ROOT / "recipes").glob("*.yaml"))
        for found in re.findall(r"guidance\n?#? *([\d.]+) on t in \[([\d.]+), ([\d.]+)\]", recipe.read_text())
    ]
    assert stated and {tuple(map(float, found)) for found in stated} == {(GUIDANCE_SCALE, 0.0, GUIDANCE_HIGH)}


def test_preview_is_what_training_shows(monkeypatch):
    """As many pictures, steps and the same guidance as the previews of a run."""
    train = {field.name: field.default for field in fields(TrainConfig)}
    preview = resolved(read(["--checkpoint", "c", "--out", "o", "--preset", "preview"]))
    assert preview.num_fid_samples == previews.PREVIEWS and preview.num_steps == train["preview_steps"]
    training = Guidance(train["preview_scale"], high=GUIDANCE_HIGH)
    assert all(guidance_of(preview).scales(t) == training.scales(t) for t in torch.linspace(0, 1, 101))


def test_what_preview_makes(place, tmp_path, capsys):
    """16 guided pictures in 50 steps, labels spread, grid and gallery; it says so before."""
    sidecar = sample(place, tmp_path / "s")
    expected = {
        "n": 16,
        "mode": "sde",
        "solver": "euler",
        "steps": 50,
        "cfg_scale": 2.3,
        "cls_cfg_scale": 2.3,
        "guidance_low": 0.0,
        "guidance_high": 0.85,
        "labels": "spread",
        "dtype": "fp32",
        "nfe": 50,
    }
    assert {key: sidecar[key] for key in expected} == expected and 90 <= sidecar["forwards"] <= 95
    with np.load(tmp_path / "s" / "samples.npz") as stream:
        assert stream["arr_1"].tolist() == [i % 5 for i in range(16)]
    written = sorted(p.name for p in (tmp_path / "s").iterdir())
    assert written == ["gallery.html", "grid.png", "samples.json", "samples.npz"]
    said = capsys.readouterr().out.splitlines()
    assert said[1] == (
        "16 images of 8 x 8, SDE euler 50 steps, guidance 2.3 on t in [0, 0.85], labels spread over 5 classes, fp32 "
        f"on cpu, to {tmp_path / 's'}"
    )
    assert said[-1].endswith("16 samples of 8 x 8, 50 evaluations each; look at grid.png and gallery.html")


def test_flags_and_recipe_win(place, tmp_path):
    """The class token follows a scale that a flag gives."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("preset: paper\nnum-steps: 20\nguidance-high: 0.5\n")
    more = ["--config", str(recipe), "--cfg-scale", "1.5", "--num-steps", "10"]
    settings = read(["--checkpoint", "c", "--out", "o", *more])
    assert (settings.num_fid_samples, settings.num_steps, settings.guidance_high) == (50_000, 10, 0.5)
    assert guidance_of(resolved(settings)).scales(0.4) == (1.5, 1.5)
    assert as_dict(read(["--checkpoint", "c", "--out", "o"]))["cfg_scale"] == 1.0, "no preset: the defaults as before"


def test_dtype_auto_is_decided_before_it_is_recorded(place, monkeypatch):
    """bfloat16 where the GPU has it; a flag wins; the default stays float32."""
    for device, decided in (("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")):
        monkeypatch.setattr(acceleration, "best_precision", lambda _, device=device: device)
        found = job(place)
        assert found.identity["dtype"] == found.settings.dtype == decided
        assert found.sampler.dtype == acceleration.DTYPES[decided]
    monkeypatch.setattr(acceleration, "best_precision", lambda _: "bf16")
    assert job(place, "--dtype", "float32").identity["dtype"] == "fp32"
    assert job(place, preset="paper").identity["dtype"] == "fp32"
    assert read(["--checkpoint", "c", "--out", "o"]).dtype == "fp32"


def test_a_model_without_null_class_is_previewed_unguided(place, tmp_path, capsys):
    """With one clause that says so; a scale asked for by a flag is refused as without a preset."""
    toy_model.write_model(place, "undropped", toy_model.CONFIG, cfg_prob=0.0)
    assert sample(place, tmp_path / "s", model="undropped")["cfg_scale"] == 1.0
    said = capsys.readouterr().out.splitlines()[1]
    assert "unguided, as the model was trained without label dropout (cfg-prob 0), labels spread" in said
    for more in (["--cfg-scale", "2.3"], ["--cls-cfg-scale", "2"], ["--labels", "null"]):
        with pytest.raises(ValueError, match="has no null class"):
            job(place, *more, model="undropped")
    with pytest.raises(ValueError, match="has no null class"):
        job(place, model="undropped", preset="paper")
    guided = job(place, "--guide-checkpoint", str(place / "m"), model="undropped")
    assert guided.identity["cfg_scale"] == 2.3, "autoguidance needs no null class"


def test_spread_labels_belong_to_their_number_of_samples(place, tmp_path):
    """Where the labels depend on the number of samples, a folder is not continued with another number."""
    three, four, ten, eleven = (job(place, "--num-fid-samples", n).identity for n in ("3", "4", "10", "11"))
    assert three["label_values_sha256"] != four["label_values_sha256"] and ten == eleven


def test_a_given_token_names_the_labels_of_a_preview(place, tmp_path):
    """--like with the preset: more like that one, not the token under all labels."""
    tokens = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "t.npy", tokens.numpy())
    liked = job(place, "--like", f"{tmp_path}/t.npy:0")
    assert liked.identity["labels"] == "token" and len(set(liked.label(torch.arange(16)).tolist())) == 1
    chosen = job(place, "--like", f"{tmp_path}/t.npy", "--classes", "2", "4")
    assert chosen.label(torch.arange(4)).tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cfg-scale", "1"], "SDE euler 50 steps, unguided, labels spread over 5 classes, fp32 on cpu"),
        (["--cls-cfg-scale", "0"], "guidance 2.3 on t in [0, 0.85] (class token 1 on [0, 0.85]), labels"),
        (["--guide-checkpoint", "GUIDE"], "autoguidance 2.3 on t in"),
        (["--mode", "ode", "--solver", "dopri5"], "ODE dopri5 (rtol 0.001, atol 0.001), guidance"),
        (["--time-grid", "shifted", "--best-of", "3"], "(shifted grid), guidance 2.3 on t in [0, 0.85], best of 3,"),
        (["--classes", "1", "3"], "labels spread over 2 classes"),
        (["--labels", "balanced", "--classes", "2"], "labels balanced over 1 class,"),
        (["--labels", "1", "2", "3"], "3 given labels in turn"),
        (["--labels", "random"], "random labels of 5 classes"),
        (["--labels", "null", "--cfg-scale", "1"], "unguided, no labels, fp32"),
        (["--num-fid-samples", "1", "--dtype", "bf16"], "bf16 on cpu"),
    ],
)
def test_it_says_what_it_will_make(place, more, words):
    line = what_it_makes(job(place, *(str(place / "m") if word == "GUIDE" else word for word in more)))
    assert words in line and line.startswith("1 image of" if "--num-fid-samples" in more else "16 images of 8 x 8, ")


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--ckpt", "--checkpoint"),
        ("--model-path", "--checkpoint"),
        ("--n", "--num-fid-samples"),
        ("-n", "--num-fid-samples"),
        ("--num-samples=16", "--num-fid-samples"),
        ("--steps", "--num-steps"),
        ("--cfg", "--cfg-scale"),
        ("--guidance-scale", "--cfg-scale"),
        ("--scale", "--cfg-scale"),
        ("--bs", "--per-proc-batch-size"),
        ("--batch-size", "--per-proc-batch-size"),
        ("--sample-dir", "--out"),
        ("--output", "--out"),
        ("--global-seed", "--seed"),
        ("--sampler", "--solver"),
        ("--class-labels", "--labels"),
        ("--precision", "--dtype"),
    ],
)
def test_flags_of_other_projects_are_answered(monkeypatch, capsys, flag, ours):
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", "c", "--out", "o", flag, "1"])
    with pytest.raises(SystemExit) as stop:
        program.run(program.main)
    assert stop.value.code == 2
    assert f"error: unknown argument '{flag}': here it is '{ours}', " in capsys.readouterr().err


def test_help_ends_with_two_commands(capsys):
    with pytest.raises(SystemExit):
        read(["--help"])
    for line in capsys.readouterr().out.rstrip().splitlines()[-2:]:
        words = shlex.split(line.split("generate.py")[1])
        assert read(words).preset in PRESETS
