"""Random numbers are functions of (seed, purpose, step, index), and are what they always were."""

import time

import pytest
import torch

from models import philox
from models.sit import SiT, preset


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    """The three known answers of Philox4x32-10 that Random123 ships."""
    out = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in out) == words


def test_numbers_never_change():
    """Pinned: a change here changes every training and every sample made before."""
    z = philox.normal(7, 3, 11, torch.tensor([0, 123456]), 5)
    expected = [
        [-0.09059668332338333, 0.729530394077301, -3.0710034370422363, 2.1299819946289062, -0.14162175357341766],
        [-0.6262704730033875, 1.168079137802124, 0.0647507756948471, -1.5299570560455322, -1.6183141469955444],
    ]
    assert z.tolist() == expected
    u = philox.uniform(7, 3, 11, torch.tensor([2**32 - 1]), 2)
    assert u.tolist() == [[0.28400845115538687, 0.98283051175531]]


def test_rows_do_not_depend_on_the_batch():
    """A sample's numbers are the same alone, in any batch, in any order, and for several steps at once."""
    index = torch.tensor([5, 0, 99, 2**31])
    together = philox.normal(1, 2, 3, index, 103)
    for i, row in zip(index, together, strict=True):
        assert torch.equal(philox.normal(1, 2, 3, i[None], 103)[0], row)
    several = philox.normals(1, 2, range(2, 5), index, 103)
    assert several.shape == (3, 4, 103) and torch.equal(several[1], together)


def test_every_coordinate_matters():
    """Another seed, purpose, step or index gives other numbers; a longer row begins with the shorter one."""
    index = torch.arange(3)
    base = philox.normal(0, 0, 0, index, 8)
    others = [
        philox.normal(1, 0, 0, index, 8),
        philox.normal(2**32, 0, 0, index, 8),
        philox.normal(0, 1, 0, index, 8),
        philox.normal(0, 0, 1, index, 8),
        philox.normal(0, 0, 0, index + 3, 8),
    ]
    for other in others:
        assert not torch.isclose(base, other).any()
    assert torch.equal(philox.normal(0, 0, 0, index, 21)[:, :8], base)


def test_distribution():
    """Moments of a million numbers, within four standard errors, and no correlation between samples, steps or neighbours."""
    z = philox.normals(0, 5, range(4), torch.arange(256), 1024).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for a, b in ((z[0], z[1]), (z[:, 0], z[:, 1]), (z[..., :-1], z[..., 1:])):
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5
    u = philox.uniform(0, 6, 0, torch.arange(256), 1024)
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5


def test_steps_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*32\)"):
        philox.normal(0, 0, -1, torch.arange(1), 1)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers():
    """But for the last bit of float32, where the double-precision sines of the two differ."""
    index = torch.arange(64)
    here, there = (philox.normals(9, 17, range(3), index.to(device), 4864).cpu() for device in ("cpu", "cuda"))
    assert (here - there).abs().max() <= 1e-6 and (here == there).float().mean() > 0.999
    assert torch.equal(philox.uniform(9, 18, 0, index, 5), philox.uniform(9, 18, 0, index.cuda(), 5).cpu())


@pytest.mark.slow
def test_noise_is_cheap_beside_the_network():
    """Noise of one step of B/2 at batch 64 costs at most 2 % of its forward pass (measured at batch 4, times 16)."""
    network = SiT(preset("SiT-B/2")).eval()
    x, token = torch.randn(4, 4, 32, 32), torch.randn(4, 768)
    with torch.no_grad():
        network(x, torch.ones(4), torch.zeros(4, dtype=torch.long), token)
        start = time.perf_counter()
        network(x, torch.ones(4), torch.zeros(4, dtype=torch.long), token)
        forward = 16 * (time.perf_counter() - start)
    start = time.perf_counter()
    for step in range(5):
        philox.normal(0, 17, step, torch.arange(64), 4 * 32 * 32 + 768)
    noise = (time.perf_counter() - start) / 5
    assert noise <= 0.02 * forward, f"noise {noise * 1e3:.1f} ms, forward {forward * 1e3:.0f} ms"
