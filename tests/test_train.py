"""The training program: the recipe's step, micro-batches, the rows of the paper by flags, and the settings."""

import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from config import parse
from dataset import PackedDataset, StepSampler, decode_moments
from loss import Objective, draw
from models.autoencoder import LatentNormalization
from models.ema import EMA
from models.interpolant import Interpolant
from models.model_file import load_model
from models.sit import SiT
from tests.tiny import CONFIG
from tests.tiny import log_lines as lines
from tests.tiny import train_flags as flags
from training.settings import TrainConfig
from training.step import TrainStep

ROOT = Path(__file__).parents[1]


def test_twenty_steps_follow_a_plain_restatement_of_the_recipe(tools):
    """From the same weights, times, noises and label drops, 20 steps agree with the published recipe written out anew:
    per-sample loops, torch's own AdamW and clipping, the EMA parameter by parameter. Weights and EMA within 1e-5."""
    torch.manual_seed(0)
    network = SiT(CONFIG)
    with torch.no_grad():
        for p in network.parameters():  # leave the zero initialisation, where most gradients vanish
            p.add_(torch.randn_like(p) * 0.05)
    plain, average = deepcopy(network), deepcopy(network)
    adam = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
    objective = Objective(Interpolant("linear"), "uniform", 0.03, 0.5, cfg_prob=0.5)
    normalization = LatentNormalization((0.5,))
    ema = EMA(network, SiT(CONFIG), decay=0.9)
    step = TrainStep(
        network,
        objective,
        torch.optim.AdamW(network.parameters(), **adam, fused=True),
        ema,
        normalization,
        seed=3,
        max_grad_norm=0.5,
    )
    optimizer = torch.optim.AdamW(plain.parameters(), **adam, foreach=False, fused=False)
    dataset = PackedDataset(tools["data"])
    sampler = StepSampler(len(dataset), 4, seed=3)
    positions = torch.from_numpy(sampler.positions(0))
    clipped = 0
    for number in range(20):
        batch = dataset[sampler.indices(number, 0)]
        result = step(number, [(batch, positions)])

        draws = draw(3, number, positions, network.config, "uniform")
        total = 0.0
        for i in range(4):
            t, drop = draws.time[i], draws.drop[i]
            moments = decode_moments(batch.moments)[i]
            x = (moments[:4] + moments[4:] * draws.posterior[i]) * 0.5
            c = batch.class_token[0][i].float()
            x_t = (1 - t) * x + t * draws.noise.latent[i]
            c_t = (1 - t) * c + t * draws.noise.class_token[i]
            y = torch.tensor([3]) if drop < 0.5 else batch.label[i : i + 1]
            out = plain(x_t[None], t[None], y, c_t[None], project=True)
            velocity = (out.velocity[0] - (draws.noise.latent[i] - x)).pow(2).mean()
            class_velocity = (out.class_velocity[0] - (draws.noise.class_token[i] - c)).pow(2).mean()
            tokens = torch.cat([batch.class_token[0][i : i + 1], batch.patch_tokens[0][i]]).float()
            cosine = sum(F.cosine_similarity(p, z, dim=0) for p, z in zip(out.projections[0][0], tokens)) / len(tokens)
            total = total + (velocity + 0.03 * class_velocity - 0.5 * cosine) / 4
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), plain.parameters()):
                a.mul_(0.9).add_(p, alpha=0.1)
        clipped += bool(norm > 0.5)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)
        assert objective.total(result.terms).item() == pytest.approx(total.item(), abs=1e-5)
    assert clipped  # the clipping took part
    moved = max((p - q).abs().max().item() for p, q in zip(plain.parameters(), average.parameters()))
    assert moved > 5e-4
    for one, other in ((network, plain), (ema.average, average)):
        for (name, p), q in zip(one.named_parameters(), other.parameters()):
            # a key bias has no gradient but rounding, which AdamW blows up to its full step; all else is far closer
            assert (p - q).abs().max().item() < (1e-5 if "qkv.bias" in name else 1e-6), name


def test_accumulated_micro_batches_are_one_step(tools, tmp_path):
    """4 micro-batches of 2 give the weights and losses of one batch of 8."""
    train.main(flags(tools["data"], tmp_path, name="one"))
    train.main(flags(tools["data"], tmp_path, "--gradient-accumulation-steps", "4", name="four"))
    for a, b in zip(lines(tmp_path, "one"), lines(tmp_path, "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )


ROWS = {  # rows of the paper's ablation: flags => (class token, projectors)
    "REG": ((), 16, (16,)),
    "REPA": (("--no-class-token",), 0, (16,)),
    "token only": (("--proj-coeff", "0"), 16, ()),
    "SiT": (("--no-class-token", "--proj-coeff", "0"), 0, ()),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_paper_by_flags(tools, tmp_path, row):
    """Each row trains the network it names; the loss falls; a term that is off is 0; the model file needs no flag."""
    extra, token, aligned = ROWS[row]
    train.main(flags(tools["data"], tmp_path, *extra, "--learning-rate", "3e-3", "--log-every", "10", steps=40))
    first, *_, last = lines(tmp_path)
    assert last["loss"] < first["loss"]
    assert (last["class_velocity"] == 0) == (not token) and (last["alignment"] == 0) == (not aligned)
    expected = last["velocity"] + 0.03 * last["class_velocity"] + (0.5 if aligned else 0) * last["alignment"]
    assert last["loss"] == pytest.approx(expected)
    model = load_model(tmp_path / "run")
    assert (model.info.network.class_token_dim, model.info.network.align_dims) == (token, aligned)
    assert model.info.step == 40 and model.info.classes == ("ash", "birch", "cedar")
    assert (model.class_means is not None) == bool(token)


def test_two_encoders_and_other_paths(tools, tmp_path):
    """Alignment with both encoders, class token of the first; cosine path, lognormal times, qk_norm, checkpointing."""
    train.main(
        flags(
            tools["two"],
            tmp_path,
            "--path-type",
            "cosine",
            "--weighting",
            "lognormal",
            "--qk-norm",
            "--gradient-checkpointing",
        )
    )
    info = load_model(tmp_path / "run").info
    assert info.network.align_dims == (16, 8) and info.network.class_token_dim == 16 and info.path == "cosine"
    train.main(flags(tools["two"], tmp_path, "--enc-type", "toy-8", name="second"))
    info = load_model(tmp_path / "second").info
    assert info.network.align_dims == (8,) and info.network.class_token_dim == 8 and info.encoders == ("toy-8",)


def test_gradient_checkpointing_changes_nothing(tools, tmp_path):
    """Recomputing blocks gives the same losses."""
    train.main(flags(tools["data"], tmp_path, name="kept"))
    train.main(flags(tools["data"], tmp_path, "--gradient-checkpointing", name="recomputed"))
    for a, b in zip(lines(tmp_path, "kept"), lines(tmp_path, "recomputed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


def test_every_setting_is_read():
    """Each field of TrainConfig is read somewhere in the program."""
    source = "".join(p.read_text() for p in [ROOT / "train.py", *(ROOT / "training").glob("*.py")])
    for field in fields(TrainConfig):
        by_name = field.name in (
            "depth",
            "hidden_size",
            "num_heads",
            "patch_size",
        )  # read in a loop of training/plan.py
        assert by_name or re.search(rf"\b(settings|s)\.{field.name}\b", source), field.name


def test_help_is_quick_and_complete():
    """--help names every flag and imports no torch."""
    code = "import sys, train\ntry:\n    train.main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert done.stdout.count("\n  ", done.stdout.index("examples:")) == 2


@pytest.mark.parametrize("name", ["finetune-b2", "finetune-xl2"])
def test_recipes_of_fine_tuning_fit_24_gigabytes(name, capsys):
    """By counted memory, as their heads say."""
    recipe = ROOT / "recipes" / f"{name}.yaml"
    train.main(["--config", str(recipe), "--dry-run", "--assume", "imagenet256", "--gpu", "RTX4090"])
    said = capsys.readouterr().out
    needed = re.search(r"for tensors: ([\d.]+ GiB) fit$", said, re.MULTILINE)
    assert needed and needed[1] in recipe.read_text()


def test_recipes_are_read():
    """Every recipe parses as settings of train.py, beside the flags it leaves to the user."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) > 5
    for recipe in recipes:
        settings = parse(TrainConfig, "", ["--config", str(recipe), "--data-dir", "d", "--exp-name", "x"])
        train.check_values(settings)
        assert recipe.read_text().startswith("#")
