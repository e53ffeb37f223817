"""generate.py from a model file to samples.npz: what it writes, the same images always, bad requests."""

import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import generate as program
from config import RESULT, UserError
from generate import read
from models import acceleration
from sampling.sampler import guidance_of
from sampling.settings import SampleConfig, resolved
from tests import toy_model
from tests.tiny import write_vae
from tests.toy_model import CONFIG, ROOT, flags, generate, loaded, samples, write_model

place, unbroken = toy_model.place, toy_model.unbroken  # fixtures


def test_what_it_writes(place, tmp_path):
    """The npz in ADM's labelled form, the sidecar with every setting and what it cost, grid, gallery, tokens, PNGs."""
    from PIL import Image

    out = tmp_path / "s"
    images, labels = generate(
        place, out, "--cfg-scale", "2", "--guidance-high", "0.6", "--class-tokens", "--png", "--labels", "balanced"
    )
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 50
    assert labels.dtype == np.int64 and labels.tolist() == [i % 5 for i in range(11)]
    assert sorted(p.name for p in out.iterdir()) == [
        "class_token_labels.npy",
        "class_tokens.npy",
        "gallery.html",
        "grid.png",
        "png",
        "samples.json",
        "samples.npz",
    ]
    sidecar = json.loads((out / "samples.json").read_text())
    expected = {
        "schema": 1,
        "n": 11,
        "seed": 0,
        "mode": "sde",
        "solver": "euler",
        "steps": 4,
        "nfe": 4,
        "forwards": 6,
        "cfg_scale": 2.0,
        "cls_cfg_scale": 2.0,
        "guidance_low": 0.0,
        "guidance_high": 0.6,
        "labels": "balanced",
        "uint8_rule": "truncate",
        "dtype": "fp32",
        "vae": str(place / "vae"),
    }
    assert {key: sidecar[key] for key in expected} == expected  # times 1, .68, .36, .04: guided in two
    assert len(sidecar["checkpoint_sha256"]) == 64 and sidecar["versions"]["torch"] == torch.__version__.split("+")[0]
    tokens = np.load(out / "class_tokens.npy")
    assert tokens.shape == (11, 6) and tokens.dtype == np.float32 and np.load(out / "class_token_labels.npy").max() < 5
    for i in (0, 10):
        assert np.array_equal(np.asarray(Image.open(out / "png" / f"{i:06d}.png")), images[i])
    assert Image.open(out / "grid.png").size == (8 * (64 + 4), 2 * (64 + 28)), "8 columns, captions of two lines"
    page = (out / "gallery.html").read_text()
    assert "samples_per_second" not in page, "the page of an interrupted job is the same"
    assert page.count("<figure>") == 11 and "sample 10" in page and sidecar["checkpoint_sha256"] in page


def test_the_model_file_says_everything(place, tmp_path):
    """No class token slot, cosine path: known from the file, no flag for it."""
    config = replace(CONFIG, class_token_dim=0)
    write_model(place, "plain", config, means=False, path="cosine")
    images, _ = generate(place, tmp_path / "s", "--checkpoint", str(place / "plain"))
    assert images.shape == (11, 8, 8, 3)
    assert loaded(place, "--checkpoint", str(place / "plain")).sampler.interpolant.path == "cosine"


def test_published_meaning_of_class_scale_zero():
    """0: the class token is not guided; unset: as the latent."""
    base = ["--checkpoint", "c", "--out", "o", "--cfg-scale", "2.3"]
    for extra, scale in (([], 2.3), (["--cls-cfg-scale", "0"], 1.0), (["--cls-cfg-scale", "1.5"], 1.5)):
        assert guidance_of(resolved(read([*base, *extra]))).scales(0.5) == (2.3, scale)


# Each setting changed: (flags before, flags after).
ODE, GUIDED, SHIFTED = ["--mode", "ode"], ["--cfg-scale", "2"], ["--time-grid", "shifted"]
RECORDED = {
    "checkpoint": ([], ["--checkpoint", "PLACE/other"]),
    "seed": ([], ["--seed", "1"]),
    "labels": ([], ["--labels", "balanced"]),
    "classes": ([], ["--classes", "1"]),
    "mode": ([], ODE),
    "solver": (ODE, [*ODE, "--solver", "dpmpp"]),
    "heun": (ODE, [*ODE, "--heun"]),
    "num_steps": ([], ["--num-steps", "5"]),
    "time_grid": ([], SHIFTED),
    "shift": (SHIFTED, [*SHIFTED, "--shift", "2"]),
    "t_last": ([], ["--t-last", "0.1"]),
    "diffusion": ([], ["--diffusion", "sigma"]),
    "diffusion_scale": ([], ["--diffusion-scale", "2"]),
    "last_step": ([], ["--last-step", "ode"]),
    "rtol": (ODE, [*ODE, "--rtol", "1e-2"]),
    "atol": (ODE, [*ODE, "--atol", "1e-2"]),
    "cfg_scale": ([], GUIDED),
    "cls_cfg_scale": (GUIDED, [*GUIDED, "--cls-cfg-scale", "0"]),
    "guidance_low": (GUIDED, [*GUIDED, "--guidance-low", "0.5"]),
    "guidance_high": (GUIDED, [*GUIDED, "--guidance-high", "0.5"]),
    "cls_guidance_low": (GUIDED, [*GUIDED, "--cls-guidance-low", "0.5"]),
    "cls_guidance_high": (GUIDED, [*GUIDED, "--cls-guidance-high", "0.5"]),
    "guide_checkpoint": (GUIDED, [*GUIDED, "--guide-checkpoint", "PLACE/other"]),
    "best_of": ([], ["--best-of", "2"]),
    "like": (["--like", "PLACE/t.npy"], ["--like", "PLACE/t.npy:1"]),
    "interpolate": (["--like", "PLACE/t.npy"], ["--like", "PLACE/t.npy", "--interpolate", "3"]),
    "dtype": ([], ["--dtype", "bf16"]),
    "tf32": ([], ["--no-tf32"]),
    "vae": ([], ["--vae", "PLACE/vae of another seed"]),
    "vae_dtype": ([], ["--vae-dtype", "bf16"]),
    "vae_tiling": ([], ["--vae-tiling"]),
}
NOT_RECORDED = {
    "out": ["--out", "o"],
    "preset": ["--preset", "paper", "--cfg-scale", "1", "--guidance-high", "1"],
    "num_fid_samples": ["--num-fid-samples", "12"],
    "class_tokens": ["--class-tokens"],
    "png": ["--png"],
    "gallery": ["--gallery", "3"],
    "keep_parts": ["--keep-parts"],
    "per_proc_batch_size": ["--per-proc-batch-size", "3"],
    "device": ["--device", "cpu"],
    "compile": ["--compile"],
    "vae_batch_size": ["--vae-batch-size", "2"],
}


def test_each_setting_that_changes_samples_is_recorded(place, monkeypatch):
    """And no other is, so that a job is continued where it only runs differently. Roles say which is which."""
    monkeypatch.setattr(acceleration, "_can_compile", lambda kind: True)
    write_model(place, "other", CONFIG, seed=5)
    write_vae(place / "vae of another seed", seed=5, scaling_factor=0.5)
    np.save(place / "t.npy", np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32))

    def identity(arguments):
        return loaded(place, *(argument.replace("PLACE", str(place)) for argument in arguments)).identity

    plain = identity([])
    for name, (before, after) in RECORDED.items():
        assert identity(after) != identity(before), name
    for name, after in NOT_RECORDED.items():
        assert identity(after) == plain, name
    known = {field.name: field.metadata["role"] for field in fields(SampleConfig)}
    assert known.keys() == RECORDED.keys() | NOT_RECORDED.keys()
    by_content = {"checkpoint", "guide_checkpoint", "vae", "heun"}  # digests are recorded, and the solver that it means
    assert {name for name, role in known.items() if role == RESULT} == RECORDED.keys() - by_content


@pytest.mark.parametrize("size", [1, 4, 5])
def test_batch_size_changes_no_image(place, size):
    """States of guided SDE samples agree to 1e-5 between one batch and batches of 1, 4 and 5; starts exactly."""
    job = loaded(place, "--cfg-scale", "2")
    _, whole = job.sample(range(0, 11))
    for start in range(0, 11, size):
        stop = min(start + size, 11)
        _, part = job.sample(range(start, stop))
        for a, b in zip(part.state, whole.state, strict=True):
            assert (a - b[start:stop]).abs().max() <= 1e-5


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_number_of_processes_changes_no_image(place, unbroken, tmp_path, world):
    """torchrun with 2 and 3 gloo processes and another batch size: the same file, but for the last bit of arithmetic."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run(
        [*torchrun, "generate.py", *flags(place, tmp_path / "s", "--per-proc-batch-size", "4", "--class-tokens")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["processes"] == world
    for a, b in zip(samples(tmp_path / "s"), samples(unbroken), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    tokens = [np.load(folder / "class_tokens.npy") for folder in (tmp_path / "s", unbroken)]
    assert np.abs(tokens[0] - tokens[1]).max() <= 1e-5
    assert "11/11" in done.stderr, "the bar counts all processes' samples"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_reduced_precision_is_near(place, tmp_path, unbroken, dtype):
    """Network and decoder in reduced precision: a few grey levels on average, not another picture."""
    images, labels = generate(place, tmp_path / "s", "--dtype", dtype, "--vae-dtype", dtype, "--vae-batch-size", "3")
    reference, same = samples(unbroken)
    difference = np.abs(images.astype(int) - reference)
    assert np.array_equal(labels, same) and 0 < difference.mean() < 3


def test_the_network_is_compiled_for_many_images(place, monkeypatch):
    lengthy = []
    monkeypatch.setattr(acceleration, "decide_compile", lambda asked, device, **more: lengthy.append(more["lengthy"]))
    for count in ("999", "1000"):
        loaded(place, "--num-fid-samples", count, "--num-steps", "50")
    assert lengthy == [False, True]


@pytest.mark.slow
def test_compiled_network_is_near(place, tmp_path, unbroken):
    """torch.compile moves float32 rounding only."""
    images, _ = generate(place, tmp_path / "s", "--compile", "--per-proc-batch-size", "4")
    assert np.abs(images.astype(int) - samples(unbroken)[0]).max() <= 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num-fid-samples", "0"], "--num-fid-samples must be at least 1, got 0"),
        (["--best-of", "0"], "--best-of must be at least 1"),
        (["--heun"], "--heun is a solver of --mode ode"),
        (["--heun", "--mode", "ode", "--solver", "dpmpp"], "--heun contradicts --solver dpmpp"),
        (["--interpolate", "5"], "--interpolate needs --like with the two tokens"),
        (["--like", "a.npy", "--best-of", "2"], "--best-of chooses by the generated token"),
        (["--guidance-low", "0.9", "--guidance-high", "0.8"], r"interval \[0.9, 0.8\]"),
        (["--checkpoint", "nowhere"], "no model file at nowhere"),
        (["--vae", "nowhere/vae"], "VAE 'nowhere/vae' is not a local folder"),
        (["--guide-checkpoint", "nowhere", "--cfg-scale", "2"], "no model file at nowhere"),
        (["--like", "nowhere.npy"], "--like nowhere.npy: no such file"),
    ],
)
def test_bad_requests_are_one_sentence(place, tmp_path, more, words):
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=words):
        generate(place, tmp_path / "s", *more)
    assert not (tmp_path / "s").exists()


def test_guidance_needs_label_dropout(place, tmp_path):
    """A network trained with cfg_prob 0 has no trained null class: refused, but for autoguidance."""
    write_model(place, "undropped", CONFIG, cfg_prob=0.0)
    undropped = ["--checkpoint", str(place / "undropped")]
    for more in (["--cfg-scale", "2"], ["--cls-cfg-scale", "2"], ["--labels", "null"]):
        with pytest.raises(ValueError, match=r"was trained without label dropout \(cfg-prob 0\) and has no null class"):
            generate(place, tmp_path / "s", *undropped, *more)
    generate(place, tmp_path / "s", *undropped, "--cfg-scale", "2", "--guide-checkpoint", str(place / "m"))
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["forwards"] == 8


def test_contradicting_models_are_refused(place, tmp_path):
    """A guide of another shape, a VAE of another scale or size, token flags without a token, means that are absent."""
    write_model(place, "wide", replace(CONFIG, class_token_dim=8))
    write_model(place, "none", replace(CONFIG, class_token_dim=0), means=False)
    write_model(place, "rescaled", CONFIG, normalization={"scale": (0.7,), "bias": (0.0,), "order": "bias_scale"})
    write_model(place, "larger", CONFIG, resolution=16)
    write_model(place, "nomeans", CONFIG, means=False)
    np.save(tmp_path / "t.npy", np.ones((1, 6), dtype=np.float32))
    for more, words in (
        (["--guide-checkpoint", str(place / "wide"), "--cfg-scale", "2"], "has class_token_dim 8, the model has 6"),
        (["--guide-checkpoint", str(place / "m")], "--guide-checkpoint does nothing at --cfg-scale 1"),
        (["--checkpoint", str(place / "none"), "--class-tokens"], "--class-tokens needs a model with a class token"),
        (["--checkpoint", str(place / "rescaled")], "normalises latents by .*0.5.*, the model was trained with .*0.7"),
        (["--checkpoint", str(place / "larger")], "decodes 4x4 latents to 8 px, but the model was trained at 16 px"),
        (
            ["--checkpoint", str(place / "nomeans"), "--best-of", "2"],
            "holds no mean class tokens .*--best-of cannot choose",
        ),
        (["--checkpoint", str(place / "nomeans"), "--like", f"{tmp_path}/t.npy"], "say with --classes which label"),
        (["--best-of", "2", "--labels", "null"], "cannot choose among samples of the null class"),
        (["--like", f"{tmp_path}/t.npy", "--interpolate", "3"], "goes between two tokens, --like gives 1"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(place, tmp_path / "s", *more)


def test_an_adaptive_solver_fixes_its_batches(place, tmp_path):
    """dopri5's steps depend on the batch, so batch size and count belong to the settings that must not change."""
    assert loaded(place).identity["batches"] is None
    assert loaded(place, "--mode", "ode", "--solver", "dopri5").identity["batches"] == [32, 11]
    images, _ = generate(place, tmp_path / "s", "--mode", "ode", "--solver", "dopri5")
    sidecar = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert sidecar["nfe"] > 6 and len(images) == 11


def test_the_program_ends_with_one_line(monkeypatch):
    """As a user sees it: exit status 2, one sentence on stderr, no traceback."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "nowhere", "--out", "o", "--cfg-scal", "2"])
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    with pytest.raises(SystemExit) as stop:
        program.run(program.main)
    assert stop.value.code == 2
    assert text.getvalue() == "error: unknown argument '--cfg-scal' (did you mean '--cfg-scale'?); see --help\n"
