"""Resume continues a run bit for bit, and on another number of processes with the same data and noise."""

import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import train
from models.acceleration import decide_compile
from tests.tiny import FLAGS, write_dataset, write_encoder

ROOT = Path(__file__).parents[1]
TIMING = {"images_per_second", "data_wait", "mfu", "peak_memory_gib", "hours_left"}
STEPS = 8
BORDER = (4, 5, 6)  # 20 records, 8 per step: two epochs end with step 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cached = write_dataset(folder / "cached", dims=(16, 8))
    pixels = write_dataset(folder / "pixels", dims=(), pixels=True)
    encoder = write_encoder(folder / "encoder")
    return {
        "cached": ("--data-dir", str(cached)),
        "pixels": ("--data-dir", str(pixels), "--enc-type", str(encoder)),
    }


def flags(out, name, *extra):
    """Save every step and log every third, so that most checkpoints lie inside a log window."""
    return [
        *FLAGS,
        "--output-dir",
        str(out),
        "--exp-name",
        name,
        "--max-train-steps",
        str(STEPS),
        "--log-every",
        "3",
        "--checkpointing-steps",
        "1",
        "--keep-last",
        "0",
        *extra,
    ]


def cut(out: Path, source: str, name: str, step: int) -> None:
    """What a kill -9 during step + 1 leaves of a run: its checkpoints up to `step`, its log and more."""
    shutil.copytree(out / source, out / name)
    for checkpoint in (out / name / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def log_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_same(one: Path, other: Path, step: int = STEPS) -> None:
    """Weights, EMA, optimiser, scaler, log window and logged values are bit for bit the same."""
    a, b = (run / "checkpoints" / f"{step:07d}" for run in (one, other))
    for file in ("model.safetensors", "ema.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    states = [torch.load(c / "optimizer.pt", weights_only=True) for c in (a, b)]
    assert flat(states[0]) == flat(states[1])
    assert log_lines(one) == log_lines(other)


def flat(tree, path=()):
    """Nested state => {path: value}, tensors as bytes."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, (*path, key)).items()}
    return {path: tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree}


_number = count()


def launch(tmp_path: Path, processes: int, runs: list[list[str]], **environment: str) -> None:
    """Run training with `processes` gloo processes."""
    file = tmp_path / f"runs-{next(_number)}.json"
    file.write_text(json.dumps(runs))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "tests.many",
        str(file),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"processes: {processes}" in done.stdout  # and not two runs of one process each


MORE = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("cached", "2"), ("pixels", "1"))]


@pytest.mark.parametrize(("kind", "accumulation"), [("cached", "1"), ("pixels", "2"), *MORE])
def test_resume_is_bit_exact(data, tmp_path, kind, accumulation):
    """8 steps unbroken equal k steps, a kill, and the rest; k before, on and after the border of an epoch."""
    extra = (*data[kind], "--gradient-accumulation-steps", accumulation)
    train.main(flags(tmp_path, "whole", *extra))
    for k in BORDER:
        cut(tmp_path, "whole", f"cut{k}", k)
        train.main(flags(tmp_path, f"cut{k}", *extra))
        assert_same(tmp_path / "whole", tmp_path / f"cut{k}")
    steps = [line["step"] for line in log_lines(tmp_path / "whole")]
    assert steps == [3, 6, 8]


def test_resume_in_half_precision_keeps_the_scaler(data, tmp_path):
    """fp16: the loss scale and its count of good steps continue; the run after the kill equals the unbroken one."""
    extra = (*data["cached"], "--mixed-precision", "fp16")
    train.main(flags(tmp_path, "whole", *extra))
    saved = torch.load(tmp_path / "whole/checkpoints/0000004/optimizer.pt", weights_only=True)["scaler"]
    assert saved["_growth_tracker"] == 4 and saved["scale"] == 65536
    cut(tmp_path, "whole", "cut", 4)
    train.main(flags(tmp_path, "cut", *extra))
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_exactly(data, tmp_path):
    """With accumulation and recomputation, compiled anew after the kill; two processes agree. Each start
    makes seven graphs, however many blocks, micro-batches and steps there are: before the network, embeddings, block, output
    layer, two projectors, loss."""
    assert decide_compile(True, "cpu")  # its trial is not counted
    extra = (*data["cached"], "--compile", "--gradient-checkpointing")
    for name in ("whole", "cut"):
        torch._dynamo.reset()
        counters.clear()
        train.main(flags(tmp_path, name, *extra, "--gradient-accumulation-steps", "2"))
        assert counters["stats"]["unique_graphs"] == 7
        if name == "whole":
            cut(tmp_path, "whole", "cut", 5)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    launch(tmp_path, 2, [flags(tmp_path, "two", *extra)])
    assert_close(tmp_path / "whole", tmp_path / "two")


def test_two_processes_resume_bit_exactly_and_agree_with_one(data, tmp_path):
    """The same for 2 processes; and a run of 2 continued by 1 sees the same data and noise: losses within 1e-5."""
    cached = (*data["cached"], "--gradient-accumulation-steps", "2")
    launch(tmp_path, 2, [flags(tmp_path, "whole", *cached)])
    cut(tmp_path, "whole", "cut5", 5)
    cut(tmp_path, "whole", "one", 4)
    launch(tmp_path, 2, [flags(tmp_path, "cut5", *cached)])
    assert_same(tmp_path / "whole", tmp_path / "cut5")
    train.main(flags(tmp_path, "one", *cached))
    assert_close(tmp_path / "whole", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_with_the_encoder_in_the_step(data, tmp_path):
    """The same with pixels, and without accumulation; and one process from the first step on agrees."""
    launch(tmp_path, 2, [flags(tmp_path, "pixels", *data["pixels"]), flags(tmp_path, "cached", *data["cached"])])
    for name, k in (("pixels", 4), ("cached", 6)):
        cut(tmp_path, name, f"{name}-cut", k)
    launch(tmp_path, 2, [flags(tmp_path, f"{name}-cut", *data[name]) for name in ("pixels", "cached")])
    for name in ("pixels", "cached"):
        assert_same(tmp_path / name, tmp_path / f"{name}-cut")
        train.main(flags(tmp_path, f"{name}-alone", *data[name]))
        assert_close(tmp_path / name, tmp_path / f"{name}-alone")


@pytest.mark.slow
def test_two_processes_continue_on_four(data, tmp_path):
    """A run of 2 continued by 4, and by 4 with another split into micro-batches: losses within 1e-5."""
    launch(tmp_path, 2, [flags(tmp_path, "whole", *data["cached"])])
    cut(tmp_path, "whole", "four", 4)
    cut(tmp_path, "whole", "eight", 5)
    launch(
        tmp_path,
        4,
        [
            flags(tmp_path, "four", *data["cached"]),
            flags(tmp_path, "eight", *data["cached"], "--gradient-accumulation-steps", "2"),
        ],
    )
    assert_close(tmp_path / "whole", tmp_path / "four")
    assert_close(tmp_path / "whole", tmp_path / "eight")


def assert_close(one: Path, other: Path) -> None:
    a, b = log_lines(one), log_lines(other)
    assert [line["step"] for line in a] == [line["step"] for line in b] and len(a) == 3
    for left, right in zip(a, b):
        for key, value in left.items():
            if value is not None:
                assert right[key] == pytest.approx(value, abs=1e-5, rel=1e-5), (left["step"], key)
