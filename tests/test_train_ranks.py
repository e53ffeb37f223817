"""Training on several ranks and nodes, started by torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from dataset import StepSampler
from tests.tiny import log_lines as lines
from tests.tiny import spoil, write_dataset
from tests.tiny import train_flags as flags

ROOT = Path(__file__).parents[1]


def torchrun(*command, nodes=None):
    prefix = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [*prefix, *command], {"cwd": ROOT, "env": environment, "text": True}


def test_two_processes_agree(tools, tmp_path):
    """A signal to one stops both after the same step; drifted weights and the bad record of one are named with its rank;
    errors are reported once."""
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
        str(tools["encoder"]),
    )
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    done = subprocess.run(command, **options, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    for rank in (0, 1):
        assert re.search(rf"signal rank {rank}: status 143, saved \['0000005'\]", said), said
        assert f"measured rank {rank}: status 143, saved ['0000004'], [False, True, False, False]" in said, said
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
def test_a_mistake_is_reported_once(tools, tmp_path):
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
    said = re.findall(r"error(?: \(rank 1\))?: batch size 9 must be divisible by 2 processes", done.stderr)
    assert len(said) == 1, done.stderr
