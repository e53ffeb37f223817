"""On a GPU the parts of the programs compute what they compute on a CPU, compiled or not."""

import pytest
import timm
import torch

from benchmarks.train_variants import OurStep
from evaluations.metrics import InceptionScore, clip_mmd, kernel_distance
from evaluations.neighbours import density_coverage, precision_recall
from evaluations.sliced import Mind
from evaluations.statistics import Moments
from models import acceleration
from models.encoder import VisionEncoder
from tests.test_speed import SIX_BLOCKS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-4), ("bf16", 2e-2)])
def test_a_compiled_step_is_the_eager_one(precision, limit, capsys):
    """Three steps: the loss terms of each sample, the gradient's norm, and the weights; nothing fell back to eager."""
    acceleration.allow_tf32(False)
    found = []
    for compiled in (False, True):
        ours = OurStep(SIX_BLOCKS, 8, "cuda", precision=precision, compiled=compiled)
        results = [ours() for _ in range(3)]
        terms = torch.stack([torch.stack(result.terms[:3]) for result in results])
        norms = torch.stack([result.grad_norm for result in results])
        found.append((terms, norms, torch.cat([p.detach().flatten() for p in ours.step.parameters])))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=limit, atol=limit)
    assert "uncompiled" not in capsys.readouterr().out


def test_an_encoder_gives_the_same_tokens():
    """DINOv2's architecture, narrow: tokens of the CPU within 1e-3 of their spread, pixels resized on the device."""
    acceleration.allow_tf32(False)
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56, depth=2)
    encoder = VisionEncoder(vit, "toy", 4)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = encoder(pixels)
    for here, there in zip(expected[:2], encoder.to("cuda")(pixels.cuda())[:2], strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3 * here.std().item())


def test_metrics_are_the_same():
    """Statistics and distances of one set of features, computed on both."""
    x, y = (torch.randn(500, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = []
    for device in ("cpu", "cuda"):
        a, b = x.to(device), 0.8 * y.to(device)
        moments, score = Moments(32, device), InceptionScore(500, 32, 100, device)
        moments.update(a)
        score.update(a.double().log_softmax(1), 0)
        statistics = moments.statistics()
        found.append(
            [
                torch.from_numpy(statistics.mean),
                torch.from_numpy(statistics.covariance),
                *map(torch.tensor, score.estimate()),
                *map(torch.tensor, kernel_distance(a, b, subsets=5, subset_size=200)),
                *map(torch.tensor, Mind(a, directions=50)(b)),
                torch.tensor(clip_mmd(a, b)),
            ]
        )
        shares = [*precision_recall(a, b)[:2], *density_coverage(a, b)]  # of 500: one neighbour may change sides
        found[-1].append(torch.tensor(shares).round(decimals=2))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9 if here.dtype == torch.float64 else 0.011)
