"""When networks are compiled, and what happens where they cannot be."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from config import parse
from models import acceleration, fusion
from training.dry_run import COMPILE
from training.settings import TrainConfig


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that an earlier test decided or compiled."""
    torch._dynamo.reset()
    for cached in (acceleration._can_compile, acceleration._warn_once):
        cached.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def broken(monkeypatch):
    """Inductor fails, as without a C compiler."""

    def fail(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.\nLong explanation")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)


def test_networks_are_compiled_on_a_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(acceleration, "_can_compile", lambda kind: True)
    for asked, device, decided in [(None, "cuda:1", True), (None, "cpu", False), (True, "cpu", True)]:
        assert acceleration.decide_compile(asked, device) is decided
        assert acceleration.decide_compile(asked, device, lengthy=False) is bool(asked)
    assert acceleration.decide_compile(False, "cuda") is False
    settings = parse(TrainConfig, "", ["--data-dir", "d", "--exp-name", "x"])
    assert settings.compile is None and "auto" in COMPILE[settings.compile]


def test_without_a_compiler_one_message_and_eager(broken, capsys):
    """It is asked once per kind of device, and left alone where compiling was not wanted."""
    assert not acceleration.decide_compile(False, "cpu") and not capsys.readouterr().out
    assert not acceleration.decide_compile(True, "cpu") and not acceleration.decide_compile(True, "cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: torch.compile does not work here (Failed to find C compiler.): it runs uncompiled")


def test_a_region_that_inductor_cannot_compile_runs_eagerly(broken, capsys):
    """Forward and backward are those of the eager module, and all regions together say it once."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4, requires_grad=True)
    expected = module(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    compiled, function = acceleration.compile_region(module), acceleration.compile_region(lambda x: x.sin())
    got = compiled(x)
    assert torch.equal(got, expected) and torch.equal(torch.autograd.grad(got.sum(), x)[0], gradient)
    assert torch.equal(function(x), x.sin())
    assert capsys.readouterr().out.count("warning: torch.compile failed for a part of the network") == 1


def test_a_region_that_dynamo_traces_again_is_no_failure(monkeypatch, capsys):
    """Inductor asks for it where a number that may change between calls has to be a constant, as in packing."""
    answers = [torch._dynamo.exc.TensorifyScalarRestartAnalysis(), lambda *inputs: (torch.full((2,), 7.0),)]

    def compile_fx(*args, **kwargs):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    region = acceleration.compile_region(lambda x, scale: x * 2.0**scale, dynamic=True)
    assert region(torch.ones(2), 1.5).tolist() == [7.0, 7.0] and not answers
    assert "warning" not in capsys.readouterr().out


def test_sums_over_tokens_are_taken_sample_by_sample():
    """The pass finds gradients of biases, leaves other sums alone, and changes no result but its rounding."""

    def sums(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.reshape(6, 20)
        return flat.sum([0], True), flat.sum([1]), x.flatten(0, 1).sum([0]), x[0].sum([0])

    graph = make_fx(sums, tracing_mode="fake")(torch.zeros(2, 3, 4, 5))
    before = len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList))
    fusion.sum_per_sample(graph.graph)
    graph.recompile()
    after = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    assert len(after) == before + 1
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(graph(x), sums(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_float32_without_tf32_is_for_a_block_of_code():
    acceleration.allow_tf32(True)
    with acceleration.without_tf32():
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    acceleration.allow_tf32(False)
