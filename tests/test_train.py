"""The training program: the recipe's step, what it refuses, numbers that are not finite, several processes."""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from common.lock import FolderLock
from config import UserError, parse
from dataset import PackedDataset, StepSampler, decode_moments
from loss import Objective, alignment, draw
from models.autoencoder import LatentNormalization
from models.checkpoint import load_model
from models.ema import EMA
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig
from tests.tiny import FLAGS, write_dataset, write_encoder, write_vae
from train import TrainConfig
from training.step import TrainStep

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    vae = write_vae(folder / "vae")
    return {
        "vae": vae,
        "encoder": write_encoder(folder / "encoder"),
        "data": write_dataset(folder / "data", vae=vae),
        "two": write_dataset(folder / "two", dims=(16, 8), vae=vae),
        "pixels": write_dataset(folder / "pixels", dims=(), pixels=True, vae=vae),
    }


def flags(data, out, *extra, steps=4, name="run"):
    return [
        *FLAGS,
        "--data-dir",
        str(data),
        "--output-dir",
        str(out),
        "--exp-name",
        name,
        "--max-train-steps",
        str(steps),
        *extra,
    ]


def lines(out, name="run"):
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_twenty_steps_follow_a_plain_restatement_of_the_recipe(tools):
    """From the same weights, times, noises and label drops, 20 steps agree with the published recipe written out anew:
    per-sample loops, torch's own AdamW and clipping, the EMA parameter by parameter. Weights and EMA within 1e-5."""
    torch.manual_seed(0)
    config = SiTConfig(
        depth=2,
        hidden_size=32,
        num_heads=2,
        input_size=4,
        num_classes=3,
        class_token_dim=16,
        align_dims=(16,),
        align_depth=1,
        projector_dim=32,
    )
    network = SiT(config)
    with torch.no_grad():
        for p in network.parameters():  # leave the zero initialisation, where most gradients vanish
            p.add_(torch.randn_like(p) * 0.05)
    plain, average = deepcopy(network), deepcopy(network)
    adam = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
    objective = Objective(Interpolant("linear"), "uniform", 0.03, 0.5, cfg_prob=0.5)
    normalization = LatentNormalization((0.5,))
    ema = EMA(network, SiT(config), decay=0.9)
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


# ------------------------------------------------------------------------------------------------------------- numbers


def spoil(folder: Path, field: str, record: int) -> None:
    """Put a NaN into one record of a dataset."""
    shards = PackedDataset(folder).manifest.shards
    number, row = (0, record) if record < shards[0]["count"] else (1, record - shards[0]["count"])
    file = folder / shards[number]["files"][field]["file"]
    array = np.load(file)
    array[row].reshape(-1)[1] = np.nan
    np.save(file, array)


@pytest.mark.parametrize("field", ["moments", "class_token.0", "patch_tokens.0"])
def test_nan_in_the_data_names_the_record(tmp_path, field):
    """Stop: one sentence with step, process, tensor and record; the former checkpoint stands. Skip: the step is left out,
    weights stay finite, the log counts it."""
    data = write_dataset(tmp_path / "data")
    spoil(data, field, 17)
    present = [int(17 in StepSampler(20, 8, seed=0).indices(step, 0)) for step in range(4)]
    step = present.index(1) + 1
    words = f"step {step}, process 0: {re.escape(field)} of record 17 are not finite in the dataset"
    with pytest.raises(UserError, match=words):
        train.main(flags(data, tmp_path))
    train.main(flags(data, tmp_path, "--on-nonfinite", "skip", name="skip"))
    assert [line["skipped_steps"] for line in lines(tmp_path, "skip")] == present
    assert all(p.isfinite().all() for p in load_model(tmp_path / "skip").network.parameters())


def test_gradients_that_are_not_finite_name_the_parameter(tools, tmp_path, monkeypatch):
    """With finite losses the parameter is named; the step changed neither weights nor optimiser."""
    original = TrainStep.update

    def update(self):
        if calls.append(1) or len(calls) == 3:
            dict(self.network.named_parameters())["blocks.1.mlp.fc1.weight"].grad[0, 0] = float("inf")
        return original(self)

    calls: list[int] = []
    monkeypatch.setattr(TrainStep, "update", update)
    with pytest.raises(UserError, match=r"step 3, process 0: the gradient of blocks.1.mlp.fc1.weight is not finite"):
        train.main(flags(tools["data"], tmp_path, "--checkpointing-steps", "2"))
    calls.clear()
    train.main(flags(tools["data"], tmp_path, "--checkpointing-steps", "1", "--on-nonfinite", "skip", name="skip"))
    a, b = (load_model(tmp_path / "skip/checkpoints" / name).network for name in ("0000002", "0000003"))
    states = [
        torch.load(tmp_path / "skip/checkpoints" / name / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        for name in ("0000002", "0000003")
    ]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert all(p.isfinite().all() for p in (*a.parameters(), *b.parameters()))


def test_a_non_finite_ema_is_never_written(tools, tmp_path, monkeypatch):
    """However it came about: the save refuses and names it, the checkpoint before stands."""
    original = TrainStep.__call__

    def call(self, step, batches):
        if step == 3:
            self.ema.average.final_layer.linear.weight[0, 0] = float("nan")
        return original(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", call)
    with pytest.raises(UserError, match=r"step 4: the EMA weights final_layer.linear.weight are not finite"):
        train.main(flags(tools["data"], tmp_path, "--checkpointing-steps", "1", steps=6))
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())][-1] == "0000003"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cosine_is_taken_in_float32(dtype):
    """Under autocast, with tokens so small that their squares vanish in half precision, the alignment is float64's."""
    g = torch.Generator().manual_seed(0)
    tiny = torch.randn(2, 5, 16, generator=g, dtype=torch.float64) * 1e-4
    other = torch.randn(2, 5, 16, generator=g, dtype=torch.float64) * 1e-4
    tiny, other = tiny.to(dtype), other.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        ours = alignment([tiny], [other])
    exact = -F.cosine_similarity(tiny.double(), other.double(), dim=-1).mean(1)
    assert ours.dtype == torch.float32 and torch.allclose(ours.double(), exact, atol=1e-6)
    assert exact.abs().max() > 0.02


# --------------------------------------------------------------------------------------------------------- bad settings


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
    """A second run in the same folder is refused and told who has it; afterwards it may."""
    lock = FolderLock(tmp_path / "run", "run.lock", "")
    with pytest.raises(
        UserError, match=rf"run is in use by process {os.getpid()} on .*; wait for it, or choose another"
    ):
        train.main(flags(tools["data"], tmp_path))
    lock.close()
    train.main(flags(tools["data"], tmp_path, steps=1))


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


def test_recipes_are_read():
    """Every recipe parses as settings of train.py, beside the flags it leaves to the user."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) > 5
    for recipe in recipes:
        settings = parse(TrainConfig, "", ["--config", str(recipe), "--data-dir", "d", "--exp-name", "x"])
        train.check_values(settings)
        assert recipe.read_text().startswith("#")


# ----------------------------------------------------------------------------------------------------- several processes


def torchrun(*command, nodes=None):
    prefix = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [*prefix, *command], {"cwd": ROOT, "env": environment, "text": True}


def test_two_processes_agree(tools, tmp_path):
    """A signal to one stops both after the same step; drifted weights and the bad record of one are named with its rank;
    errors are told once."""
    bad = write_dataset(tmp_path / "bad", vae=tools["vae"])
    first = StepSampler(20, 8, seed=0).indices(0, 0)
    spoil(bad, "moments", int(first[6]))  # the second process's half of the first batch
    command, options = torchrun(
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "tests.two",
        str(tools["data"]),
        str(bad),
        str(tmp_path),
    )
    done = subprocess.run(command, **options, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    for rank in (0, 1):
        assert re.search(rf"signal rank {rank}: status 143, saved \['0000005'\]", said), said
        assert f"drift rank {rank}: step 4: parameter blocks.1.mlp.fc1.bias differs between processes 0 and 1" in said
        assert f"nan rank {rank}: step 1, process 1: moments of record {first[6]} are not finite" in said
        assert f"indivisible rank {rank}: batch size 9 must be divisible by 2 processes" in said


@pytest.mark.slow
def test_two_nodes(tools, tmp_path):
    """Two launchers of one process each, as on two machines, make one run of two processes."""
    started = []
    for node in (0, 1):
        command, options = torchrun(
            "--nnodes",
            "2",
            "--node_rank",
            str(node),
            "--nproc_per_node",
            "1",
            "--master_addr",
            "localhost",
            "--master_port",
            "29533",
            "train.py",
            *flags(tools["data"], tmp_path),
        )
        started.append(subprocess.Popen(command, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    train.main(flags(tools["data"], tmp_path, name="alone"))
    for a, b in zip(lines(tmp_path), lines(tmp_path, "alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_mistake_is_told_once(tools, tmp_path):
    """Two processes find the same wrong flag: one line on stderr, and the launcher's own report."""
    command, options = torchrun(
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "train.py",
        *flags(tools["data"], tmp_path, "--batch-size", "9"),
    )
    done = subprocess.run(command, **options, capture_output=True)
    assert done.returncode != 0
    assert done.stderr.count("error: batch size 9 must be divisible by 2 processes") == 1
