"""Compiled regions compute what the eager network computes, and compile once each."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch._dynamo.utils import counters

from benchmarks.train_variants import OurStep
from models.acceleration import autocast, compile_encoder, compile_network
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
        assert graphs == 1 + 1 + len(TOY.align_dims)  # a block, the output layer, a projector of each width
        compiled.gradient_checkpointing = True
        for a, b in zip(got, outputs_and_gradients(compiled), strict=True):
            assert (a - b).abs().max() <= limit * max(float(a.abs().max()), 1e-3)
        assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_training_follows_eager_training():
    """Ten optimiser steps end at the same loss."""
    totals = []
    for compiled in (False, True):
        ours = OurStep(ONE_TEACHER, 4, "cpu", compiled=compiled)
        for number in range(10):
            terms = ours.step(number, [(ours.batch, ours.positions)]).terms
        totals.append(ours.step.objective.total(terms))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-5)


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
