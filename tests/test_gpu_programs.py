"""The programs on a GPU, from end to end, as far as they need no VAE."""

import pytest
import torch

import train
from tests.tiny import log_lines, train_flags, write_dataset


@pytest.mark.gpu
def test_a_run_is_resumed(tmp_path):
    """train.py as it comes, compiled, and the same run stopped after two of four steps and resumed without compilation: one
    loss curve, by one GPU."""
    data = write_dataset(tmp_path / "data")
    train.main(train_flags(data, tmp_path))
    for steps in (2, 4):
        train.main(train_flags(data, tmp_path, "--no-compile", "--accept-changes", steps=steps, name="stopped"))
    whole, parts = (log_lines(tmp_path, name) for name in ("run", "stopped"))
    assert [line["step"] for line in whole] == [line["step"] for line in parts] == [1, 2, 3, 4]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert torch.cuda.max_memory_allocated() > 0
