"""The kernel behind the norms of compiled blocks gives the gradients that autograd gives."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import train
from config import UserError
from models import acceleration
from models.acceleration import autocast, compile_region
from models.adaptive_norm import AdaptiveNorm
from models.sit import SiTBlock, preset
from tests.test_architecture import ROOT
from tests.test_sit import TOY, inputs, randomized
from tests.tiny import train_flags, write_dataset

norm_kernel = pytest.importorskip("models.norm_kernel", reason="needs Triton", exc_type=ImportError)


def test_flag_of_the_program(tmp_path, capsys):
    """It is refused where nothing is compiled or there is no GPU, before the folder is made, and so by the dry run."""
    flags = train_flags(write_dataset(tmp_path / "data"), tmp_path, "--norm-kernel")
    message = "^--norm-kernel needs a compiled network on a GPU: leave --norm-kernel out$"
    with pytest.raises(UserError, match=message):
        acceleration.check_norm_kernel(8, "fp32", torch.device("cpu"), True)
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=message):
            train.main([*flags, "--no-compile", *more])
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--dry-run"])
    assert "; Triton kernels for the norms" in capsys.readouterr().out


@pytest.mark.slow
def test_gradients_are_those_of_autograd():
    """Under Triton's interpreter, which has to be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = "from tests.test_norm_kernel import compare_all; compare_all()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stderr[-4000:]


def compare_all() -> None:
    """The norm, with a branch to add and without, and a network. Three programs for each sample, the last one with fewer
    tokens."""
    norm_kernel.PROGRAMS, norm_kernel.FEWEST = 6, 2
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for gated in (True, False):
            compare_norms(dtype, limit, gated)
    compare_networks()


def compare_networks() -> None:
    """Of five blocks, those that are neither aligned nor the last leave an addition to the next one: all outputs and
    gradients are the same; and without gradients, the outputs."""
    config = replace(TOY, depth=5, align_depth=3)
    plain = randomized(config).train()
    other = copy.deepcopy(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceleration, "compile_region", lambda region: region)
        acceleration.take_norm_kernel(other)
    found = []
    for network in (plain, other):
        output = network(*inputs(config), project=True)
        parts = [output.velocity, output.class_velocity, *output.projections]
        gradients = torch.autograd.grad([part.square().mean() for part in parts], list(network.parameters()))
        found.append([*(part.detach() for part in parts), *gradients])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(float(a.abs().max()), 1e-3)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs(config)).velocity, plain(*inputs(config)).velocity)


def compare_norms(dtype: torch.dtype, limit: float, gated: bool) -> None:
    """Gradients of x, shift, scale, gate and branch; and the sum of the branch's gradient, which is that of its bias. The
    residual stream is float32, what autocast makes is not. The limit is relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    x, d_total = torch.randn(2, 2, 8, 24, generator=generator)
    branch, d_output = torch.randn(2, 2, 8, 24, generator=generator).to(dtype)
    modulation = torch.randn(2, 1, 72, generator=generator).to(dtype)
    leaves = [leaf.requires_grad_() for leaf in ([x, modulation, branch] if gated else [x, modulation])]
    shift, scale, gate = modulation.chunk(3, dim=-1)
    norm = AdaptiveNorm(24)
    total, output = norm(x, shift, scale, *((gate, branch) if gated else ()))
    expected = torch.autograd.grad([total, output], leaves, [d_total, d_output.float()])
    if not gated:
        gate = branch = None
    got_total, got_output = norm_kernel._AdaptiveNorm.apply(
        x, shift, scale, gate, branch, x, None, None, norm.eps, dtype, gated
    )
    for a, b in ((got_total, total), (got_output, output)):
        assert (a - b).abs().max() <= limit * b.abs().max()
    assert got_output.dtype == dtype
    got = torch.autograd.grad([got_total, got_output], leaves, [d_total, d_output])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= limit * b.abs().max()
    mean, rstd = got_total.mean(-1, keepdim=True), (got_total.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    _, d_branch, sums = norm_kernel.backward(d_total, d_output, x, scale, gate, branch, None, None, mean, rstd)
    assert sums.shape == (2, 3, 4 if gated else 2, 24)
    if gated:
        torch.testing.assert_close(sums[:, :, 3].sum(1), d_branch.float().sum(1))


def reference_forward(x, shift, scale, gate, branch, first_gate, first_branch, eps, dtype, keep):
    """What the kernels compute, in torch's operations."""
    value = x if first_gate is None else x + first_gate * first_branch
    value = value if gate is None else value + gate * branch
    normalised, mean, rstd = torch.native_layer_norm(value, x.shape[-1:], None, None, eps)
    output = normalised * (1 + scale) + shift
    return value if keep else None, output if dtype == torch.float32 else output.to(dtype), mean, rstd


def reference(d_total, d_output, x, scale, gate, branch, first_gate, first_branch, mean, rstd):
    value = x if first_gate is None else x + first_gate * first_branch
    normalised = ((value if gate is None else value + gate * branch) - mean) * rstd
    d_normalised = d_output * (1 + scale)
    centred = d_normalised - d_normalised.mean(-1, keepdim=True)
    d_x = d_total + rstd * (centred - normalised * (d_normalised * normalised).mean(-1, keepdim=True))
    sums = [d_output, d_output * normalised] + ([] if gate is None else [d_x * branch, d_x * gate])
    return (
        d_x,
        None if gate is None else (d_x * gate).to(branch.dtype),
        torch.stack([s.sum(1) for s in sums], 1)[:, None],
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_compiled_network_with_the_kernel_keeps_all_gradients(monkeypatch, precision, limit):
    """Traced as for Inductor, but on the CPU and with torch's operations in the kernel's place: outputs and gradients are
    those of the eager network, to rounding; blocks have three kinds of graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    monkeypatch.setattr(acceleration, "_inductor", backend)
    monkeypatch.setattr(norm_kernel, "forward", reference_forward)
    monkeypatch.setattr(norm_kernel, "backward", reference)
    config = replace(TOY, depth=5, align_depth=3)
    eager = randomized(config).train()
    compiled = copy.deepcopy(eager)
    acceleration.compile_network(compiled, norm_kernel=True)
    found = []
    for network in (eager, compiled):
        with autocast("cpu", precision):
            output = network(*inputs(config), project=True)
        parts = [part.float() for part in (output.velocity, output.class_velocity, *output.projections)]
        gradients = torch.autograd.grad([part.square().mean() for part in parts], list(network.parameters()))
        found.append([*(part.detach() for part in parts), *gradients])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= limit * max(float(a.abs().max()), 1e-3)
    assert len(graphs) == 3 + 1 + 1 + len(TOY.align_dims)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_a_compiled_block_with_the_kernel_equals_the_eager_one(precision, limit):
    """Output and all gradients, relative to the largest value of each; the kernels are found to run here."""
    torch.manual_seed(0)
    config = preset("SiT-B/2")
    acceleration.check_norm_kernel(config.hidden_size, precision, torch.device("cuda"), True)
    eager = SiTBlock(config).cuda()
    compiled = copy.deepcopy(eager)
    compiled.norm1.kernel = compiled.norm2.kernel = norm_kernel.adaptive_norm
    compile_region(compiled)
    x = torch.randn(4, config.num_tokens, config.hidden_size, device="cuda", requires_grad=True)
    c = torch.randn(4, config.hidden_size, device="cuda", requires_grad=True)
    found = []
    for block in (eager, compiled):
        with autocast("cuda", precision):
            output = block(x, c)
        found.append([output, *torch.autograd.grad(output, [x, c, *block.parameters()], torch.ones_like(x))])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= limit * a.abs().max()
