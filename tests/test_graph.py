"""--cuda-graph: replays of the captured step are the steps that would have been taken."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks.train_variants import OurStep
from config import UserError
from loss import LossTerms
from models.sit import preset
from tests.test_speed import SIX_BLOCKS
from tests.tiny import train_flags, write_dataset
from training import graph
from training.step import StepResult
from training.tracking import Window

SPOILT = 6  # step whose batch is not finite


def train_a_while(config, device, *, steps=20, graphed=False, **given):
    """Losses and gradient norms of each step, and what is left: other data, learning rate and EMA decay in each step, two
    micro-batches, and a batch that is not finite. The learning rates are float32 numbers."""
    ours = OurStep(config, 8, device, graph=graphed, **given)
    step, batch, positions = ours.step, ours.batch, ours.positions
    step.learning_rate, step.ema.warmup = (lambda number: 2.0**-12 * (1 - number / 32)), True
    seen, windows = [], Window(torch.device(device))
    for number in range(steps):
        moments = batch.moments.roll(number, 0)
        if number == SPOILT:
            moments = moments * float("nan")
            before = [p.detach().clone() for p in step.parameters]
        halves = [
            (batch._replace(moments=moments[half], label=batch.label[half], **tokens_of(batch, half)), positions[half])
            for half in (slice(0, 4), slice(4, 8))
        ]
        with without_waiting() if graphed and number > graph.WARM_UP and device == "cuda" else nullcontext():
            result = step(number, halves)
            windows.add(number, result, positions)
        seen.append(result)
        if number == SPOILT:
            assert not result.grad_norm.isfinite()
            assert all(torch.equal(p, b) for p, b in zip(step.parameters, before))
    losses = torch.stack([torch.cat([torch.stack(r.terms).flatten(), r.gradient_norms]) for r in seen]).cpu()
    assert losses.isfinite().all(dim=1).sum() == steps - 1 and len(losses.unique(dim=0)) == steps
    return {
        "losses": losses,
        "norms": torch.stack([r.grad_norm for r in seen]).cpu(),
        "window": windows.values.cpu(),
        "weights": [p.detach().cpu() for p in step.parameters],
        "ema": [p.detach().cpu() for p in step.ema.average.parameters()],
        "optimizer": step.optimizer.state_dict(),
    }


@contextmanager
def without_waiting():
    """What would make the host wait for the device is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tokens_of(batch, half):
    pixels = None if batch.pixels is None else batch.pixels[half]
    return {
        "pixels": pixels,
        "class_token": tuple(t[half] for t in batch.class_token),
        "patch_tokens": tuple(t[half] for t in batch.patch_tokens),
    }


def assert_equal(one, two):
    """Bit for bit, and what a checkpoint holds of the optimiser too."""
    for name in ("losses", "norms", "window", "weights", "ema"):
        torch.testing.assert_close(
            one[name], two[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(one["optimizer"]["state"], two["optimizer"]["state"], rtol=0, atol=0)
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]


class Later:
    """In place of a CUDA graph, for a CPU: what was handed to `capture` runs at each replay, and not before."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        monkeypatch.setattr(graph, "capture", self.capture)
        monkeypatch.setattr(graph, "beside", lambda stream, function: function())
        monkeypatch.setattr(graph.GraphedStep, "_stay_near", lambda step: None)
        monkeypatch.setattr(torch.cuda, "Stream", object)

    def capture(self, function):
        self.captures += 1
        kept = StepResult(LossTerms(*torch.zeros(4, 8)), torch.zeros(()), torch.zeros(0))

        def replay():
            self.replays += 1
            result = function()
            kept.gradient_norms.resize_(result.gradient_norms.shape)
            for target, source in zip((*kept.terms, *kept[1:]), (*result.terms, *result[1:])):
                target.copy_(source)

        return replay, kept


def test_replays_are_the_steps_that_would_have_been_taken(monkeypatch):
    """Whatever differs between steps is read from tensors that every replay sees: batch, number, learning rate, decay of the
    EMA. Results are not overwritten by the next replay."""
    later = Later(monkeypatch)
    steps = 12
    graphed = train_a_while(SIX_BLOCKS, "cpu", steps=steps, graphed=True)
    assert (later.captures, later.replays) == (1, steps - graph.WARM_UP)
    assert_equal(graphed, train_a_while(SIX_BLOCKS, "cpu", steps=steps))


def test_a_batch_of_another_shape_is_an_error(monkeypatch):
    """It would be broadcast into the captured one."""
    Later(monkeypatch)
    ours = OurStep(SIX_BLOCKS, 8, "cpu", graph=True)
    for _ in range(graph.WARM_UP + 1):
        ours()
    with pytest.raises(ValueError, match="batches of one shape"):
        ours(ours.batch._replace(label=ours.batch.label[:1]))


@pytest.mark.parametrize(
    ("precision", "world", "device", "words"),
    [
        ("fp32", 1, "cpu", "--cuda-graph needs a GPU, and this run is on the CPU: leave --cuda-graph out"),
        ("bf16", 2, "cuda", "the step of one process, and there are 2: start one, or leave --cuda-graph out"),
        ("fp16", 1, "cuda", "the loss scaler of --mixed-precision fp16: give --mixed-precision bf16 or fp32, or"),
    ],
)
def test_refused_before_anything_is_loaded(precision, world, device, words):
    with pytest.raises(UserError, match=words):
        graph.check(precision, world, torch.device(device))
    graph.check("bf16", 1, torch.device("cuda"))
    with pytest.raises(ValueError, match="gradient scaler"):
        OurStep(SIX_BLOCKS, 8, "cpu", precision="fp16", graph=True)


def test_flag_of_the_program(tmp_path, capsys, monkeypatch):
    """On a CPU it is refused before the folder is made; the dry run says what a graph keeps, and refuses the same."""
    flags = train_flags(write_dataset(tmp_path / "data"), tmp_path, "--cuda-graph")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="--cuda-graph needs a GPU"):
        train.main(flags)
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--dry-run"])
    assert (
        "CUDA graph   on: captured after 3 steps; the memory of a step then stays reserved" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="loss scaler"):
        train.main([*flags, "--dry-run", "--mixed-precision", "fp16"])


# ---------------------------------------------------------------------------------------------------------------- GPU

S_BLOCKS = replace(preset("SiT-S/2"), depth=4, align_depth=2)
B_BLOCKS = replace(preset("SiT-B/2"), depth=2, align_depth=1)


@pytest.fixture
def deterministic(monkeypatch):
    """Without it two runs of the same step may differ in the last bits: attention's backward pass adds in any order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "given"),
    [
        (SIX_BLOCKS, {"precision": "fp32"}),
        (SIX_BLOCKS, {"precision": "bf16", "gradient_checkpointing": True}),
        (preset("SiT-S/2"), {"precision": "bf16"}),
        (B_BLOCKS, {"precision": "bf16", "encoder": "dinov2-vit-b", "steps": 8}),
    ],
    ids=["fp32", "recompute", "S/2", "encoder"],
)
def test_a_graph_changes_nothing_on_the_gpu(deterministic, config, given):
    """Losses, gradient norms, weights, EMA and optimiser are those of ordinary steps, bit for bit; replays never wait."""
    assert_equal(train_a_while(config, "cuda", graphed=True, **given), train_a_while(config, "cuda", **given))


@pytest.mark.gpu
def test_too_little_memory_for_a_graph_is_one_sentence():
    x = torch.ones(3, device="cuda")
    with pytest.raises(UserError, match="memory does not suffice for the CUDA graph of a step"):
        graph.capture(lambda: (x + 1, torch.empty(2**45, device="cuda")))


@pytest.mark.gpu
def test_runs_with_a_graph_resume_on_the_gpu(deterministic, tmp_path):
    """train.py: in one go, resumed in the midst, and without a graph: the same weights, EMA and log."""
    data = write_dataset(tmp_path / "data")
    more = (
        "--no-compile",
        "--num-workers",
        "2",
        "--learning-rate",
        str(2.0**-13),
        "--ema-warmup",
        "--gradient-accumulation-steps",
        "2",
    )
    starts = {
        "whole": [(10, True)],
        "resumed": [(5, True), (10, True)],
        "plain": [(10, False)],
        "left": [(6, True), (10, False)],
    }
    found = {}
    for name, parts in starts.items():
        for steps, graphed in parts:
            train.main(train_flags(data, tmp_path, *more, *["--cuda-graph"] * graphed, steps=steps, name=name))
        run = tmp_path / name
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        newest = run / "checkpoints" / "0000010"
        found[name] = [torch.tensor(losses), *(load_file(newest / f) for f in ("model.safetensors", "ema.safetensors"))]
    for name in ("resumed", "plain", "left"):
        torch.testing.assert_close(found[name], found["whole"], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_graph_changes_nothing_of_a_compiled_step_on_the_gpu(deterministic, precision):
    given = {"precision": precision, "compiled": True}
    assert_equal(train_a_while(S_BLOCKS, "cuda", graphed=True, **given), train_a_while(S_BLOCKS, "cuda", **given))
