"""Compiled regions compute what the eager network computes, and compile once each."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.train_variants import OurStep
from models import philox
from models.acceleration import autocast, compile_encoder, compile_network, compile_region
from models.encoder import VisionEncoder
from models.sit import SiT
from tests.test_sit import TOY, inputs, randomized

pytestmark = pytest.mark.slow
ONE_TEACHER = replace(TOY, align_dims=(12,))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of an earlier test counts or is reused."""
    torch._dynamo.reset()
    counters.clear()


def outputs_and_gradients(network: SiT) -> list[torch.Tensor]:
    network.zero_grad()
    output = network(*inputs(TOY), project=True)
    parts = [output.velocity, output.class_velocity, *output.projections]
    sum(part.float().square().mean() for part in parts).backward()
    return [*(part.detach().float() for part in parts), *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_network_equals_eager(precision):
    """Outputs and every gradient agree: to rounding in float32, to bf16's in bf16. Names of parameters stay. The two
    blocks share a graph, and recomputation needs no other one."""
    eager = randomized(TOY).train()
    compiled = copy.deepcopy(eager)
    compile_network(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    with autocast("cpu", precision):
        expected, got = outputs_and_gradients(eager), outputs_and_gradients(compiled)
        limit = 1e-5 if precision == "fp32" else 2e-2
        for a, b in zip(expected, got, strict=True):
            assert (a - b).abs().max() <= limit * max(float(a.abs().max()), 1e-3)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 1 + 1 + 1 + len(
            TOY.align_dims
        )  # embeddings, a block, the output layer, a projector of each width
        compiled.gradient_checkpointing = True
        for a, b in zip(got, outputs_and_gradients(compiled), strict=True):
            assert (a - b).abs().max() <= limit * max(float(a.abs().max()), 1e-3)
        assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_training_follows_eager_training():
    """Ten optimiser steps end at the same loss; the graphs are those of before the network, embeddings, a block, the output
    layer, a projector and the loss, once each, whatever the step's number."""
    totals = []
    for compiled in (False, True):
        ours = OurStep(ONE_TEACHER, 4, "cpu", compiled=compiled)
        for number in range(10):
            terms = ours.step(number, [(ours.batch, ours.positions)]).terms
        totals.append(ours.step.objective.total(terms))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 6


def test_ddp_accumulation_and_recomputation_need_no_other_graphs(tmp_path):
    """DDP cuts no region; two micro-batches and gradient checkpointing run the same graphs, and the gradients are those of
    the eager network."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    norms = []
    try:
        for compiled in (False, True):
            ours = OurStep(ONE_TEACHER, 4, "cpu", compiled=compiled)
            ours.step.wrapped = nn.parallel.DistributedDataParallel(ours.step.network)
            ours.step.no_sync = ours.step.wrapped.no_sync
            for recompute in (False, True):
                ours.step.network.gradient_checkpointing = recompute
                result = ours.step(int(recompute), [(ours.batch, ours.positions), (ours.batch, ours.positions + 4)])
                norms.append(result.gradient_norms)
    finally:
        torch.distributed.destroy_process_group()
    for eager, got in zip(norms[:2], norms[2:], strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 6


def test_compiled_draws_are_the_eager_ones():
    """Bit for bit where they are uniform, to the last bit of float32 where logarithm and sine take part; one graph draws the
    numbers of every step."""
    index, blocks = torch.tensor([0, 5, 2**31]), philox.block_numbers(103, torch.device("cpu"))

    def both(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            philox.normal(7, 3, step, index, 103, blocks),
            philox.uniform(7, 3, step, index, 5, blocks),
        )

    compiled = compile_region(both)
    for number in (0, 1, 2**32 - 1):
        normals, uniforms = compiled(torch.tensor([number]))
        assert torch.equal(uniforms, philox.uniform(7, 3, number, index, 5))
        assert (normals - philox.normal(7, 3, number, index, 103)).abs().max() <= 1e-6
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_encoder_equals_eager():
    """The compiled blocks of a vision encoder give the same tokens."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=24, depth=2, num_heads=2)
    encoder = VisionEncoder(vit, "toy", 2)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = encoder(pixels)
    compile_encoder(encoder)
    got = encoder(pixels)
    torch.testing.assert_close(got.class_token, expected.class_token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.patch_tokens, expected.patch_tokens, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
