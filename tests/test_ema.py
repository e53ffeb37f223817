"""The average of the weights follows the published rule."""

import pytest
import torch
from torch import nn

from models.ema import EMA


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_hundred_steps_of_the_published_rule():
    """ema <- decay ema + (1 - decay) weights, 100 times, starting at the weights; and the closed form in float64."""
    network = small()
    ema = EMA(network, small(), decay=0.99)
    loop = [p.detach().clone() for p in network.parameters()]
    closed = [0.99**100 * p.detach().double() for p in network.parameters()]
    g = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        ema.update(network)
        for average, total, p in zip(loop, closed, network.parameters()):
            average.mul_(0.99).add_(p.detach(), alpha=1 - 0.99)
            total.add_(0.01 * 0.99 ** (100 - step) * p.detach().double())
    for ours, published, exact in zip(ema.average.parameters(), loop, closed):
        torch.testing.assert_close(ours, published, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=1e-5)


def test_warm_up():
    """At step t the decay is at most (1 + t) / (10 + t)."""
    network, shares = small(), []
    ema = EMA(network, small(), decay=0.9, warmup=True)
    for step in (0, 10, 1000):
        with torch.no_grad():
            ema.average[0].weight.zero_()
            network[0].weight.fill_(1)
        ema.update(network, step)
        shares.append(1 - ema.average[0].weight.mean().item())
    assert shares == pytest.approx([1 / 10, 11 / 20, 0.9])


def test_average_is_frozen_and_apart():
    """The average takes no gradient and shares no memory with the network."""
    network = small()
    ema = EMA(network, small(), decay=0.5)
    assert not any(p.requires_grad for p in ema.average.parameters()) and not ema.average.training
    with torch.no_grad():
        network[0].weight.add_(1)
    assert not torch.equal(network[0].weight, ema.average[0].weight)


def test_distance_is_relative():
    """0 at the start; |w - a| / |w| afterwards."""
    network = small()
    ema = EMA(network, small(), decay=0.5)
    assert ema.distance(network) == 0
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    assert ema.distance(network) == pytest.approx(0.5)


def test_a_decay_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.1"):
        EMA(small(), small(), decay=1.1)
