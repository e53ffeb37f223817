"""Losses, gradients and weights that are not finite are found, named and kept off the disk."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from config import UserError
from dataset import StepSampler
from loss import alignment
from models.model_file import load_model
from tests.tiny import log_lines as lines
from tests.tiny import spoil, write_dataset
from tests.tiny import train_flags as flags
from training.step import TrainStep

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("field", ["moments", "class_token.0", "patch_tokens.0"])
def test_nan_in_the_data_names_the_record(tmp_path, field):
    """Stop: one sentence with step, process, tensor and record; the former checkpoint stays. Skip: the step is left out,
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

    def update(self, step):
        if calls.append(1) or len(calls) == 3:
            dict(self.network.named_parameters())["blocks.1.mlp.fc1.weight"].grad[0, 0] = float("inf")
        return original(self, step)

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
    """However it came about: the save refuses and names it, the checkpoint before stays."""
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
