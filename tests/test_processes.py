"""Two gloo ranks: what they exchange, and that an error of any of them is reported once."""

import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import processes

ROOT = Path(__file__).parents[1]


def torchrun(case):
    """Two ranks of tests/ranks.py: status, lines on stdout, errors and first lines of tracebacks, stderr."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.ranks", case]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    # torch marks what a rank prints by its number; without it the launcher speaks
    errors = re.findall(r"^(?:error.*|\[rank\d\]: (?:Traceback|\w+Error:).*)", done.stderr, re.MULTILINE)
    return done.returncode, done.stdout.splitlines(), errors, done.stderr


def test_what_two_ranks_exchange():
    status, lines, errors, stderr = torchrun("together")
    assert status == 0 and not errors, stderr
    rank0 = ["of rank 0", [(0, 2), (1, 2)], [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], 0, "done"]
    rank1 = ["of rank 0", [(0, 2), (1, 2)], [[1.0, 1.0], [1.0, 1.0]], 1, None]
    assert lines == [f"True {[rank0, rank1]}"]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("alone", "error (rank 1): the disk of this machine is full"),
        ("all_ranks", r"error( \(rank 1\))?: --width 0 must be at least 1"),
        ("first", "error: no file here"),
    ],
)
def test_an_error_is_reported_once(case, line):
    """By its rank where it is alone; what breaks on the rank that waits for it is silent."""
    status, lines, errors, stderr = torchrun(case)
    pattern = line if case == "all_ranks" else re.escape(line)
    assert status != 0 and not lines and len(errors) == 1 and re.fullmatch(pattern, errors[0]), stderr


def test_a_bug_of_one_rank_keeps_its_traceback():
    """And is the only one: the other rank's closed connection is its consequence."""
    status, _, errors, stderr = torchrun("bug")
    assert status != 0 and "in bug" in stderr
    expected = ["[rank1]: Traceback (most recent call last):", "[rank1]: AssertionError: a bug of rank 1"]
    assert errors == expected, stderr


def test_a_process_alone_exchanges_with_itself():
    """Without a launcher no group is needed."""
    assert processes.share(3) == 3 and processes.gather(3) == [3] and processes.on_first(lambda: 3) == 3
    assert processes.in_turn(lambda: None) is None
    assert (processes.rank(), processes.world()) == (0, 1)


def test_the_patience_of_a_group(monkeypatch):
    """gloo's and NCCL's own 10 minutes are less than a download or the encoding of a shard takes."""
    from training import launch

    given = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: None)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda backend, *, timeout: given.append(timeout))
    processes.Processes("cpu")
    launch.Processes("fp32")
    assert given == [processes.PATIENCE, launch._PATIENCE] and min(given) > 3 * datetime.timedelta(minutes=10)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device; use --device cpu"):
        processes.Processes("cuda")
