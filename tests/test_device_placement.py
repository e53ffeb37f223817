"""On tensors that only pretend to be on a GPU every operation finds its operands there; no GPU is needed."""

import pytest
import timm
import torch
from timm.models import vision_transformer
from torch._subclasses import FakeTensorMode

from benchmarks.train_variants import OurStep
from evaluations.metrics import InceptionScore
from models.autoencoder import LatentNormalization
from models.encoder import VisionEncoder
from models.guidance import Guidance, network_velocity
from models.noise import NoiseSource
from models.sit import SiT
from tests.test_speed import SIX_BLOCKS
from training.step import StepResult
from training.tracking import Window

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


@pytest.fixture
def pretended():
    with FakeTensorMode(), torch.no_grad():
        yield


def test_a_training_step_stays_on_the_device(pretended):
    """Draws, targets, forward pass and loss, optimiser, EMA and log window; the backward pass would need a device."""
    ours = OurStep(SIX_BLOCKS, 8, "cuda", precision="bf16")
    terms, loss = ours.step.loss(ours.batch, ours.positions, 2)
    assert loss.is_cuda and all(term.is_cuda and term.shape == (8,) for term in terms)
    for p in ours.step.parameters:
        p.grad = torch.zeros_like(p)
    norms = ours.step.update(0)
    assert norms.is_cuda and ours.step.optimizer.grad_scale.is_cuda  # clipped inside of AdamW
    window = Window(torch.device("cuda"))
    window.add(0, StepResult(terms, torch.linalg.vector_norm(norms), norms), ours.positions)
    assert window.values.is_cuda


def test_an_operand_in_the_wrong_place_is_found(pretended):
    """The test above can fail."""
    ours = OurStep(SIX_BLOCKS, 8, "cuda")
    elsewhere = ours.batch._replace(label=torch.zeros(8, dtype=torch.int64, device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        ours.step.loss(elsewhere, ours.positions)


def test_noise_and_velocity_of_sampling_stay_on_the_device(pretended):
    with torch.device("cuda"):
        network = SiT(SIX_BLOCKS).eval()
    index = torch.arange(4, device="cuda")
    noise = NoiseSource(SIX_BLOCKS, 0, index, 10)
    velocity = network_velocity(network, index % 3, Guidance(2.3, high=0.85), dtype=torch.bfloat16)(noise.start(), 0.5)
    assert velocity.latent.is_cuda and velocity.class_token.is_cuda and noise(1).latent.is_cuda


def test_encoder_metric_and_latents_stay_on_the_device(pretended, monkeypatch):
    monkeypatch.setattr(
        vision_transformer, "calculate_drop_path_rates", lambda rate, depth: [0.0] * depth
    )  # reads values
    with torch.device("cuda"):
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=24, depth=1, num_heads=2)
        encoder = VisionEncoder(vit, "toy", 2)
    assert encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device="cuda")).patch_tokens.is_cuda
    score = InceptionScore(10, 5, device="cuda")
    score.update(torch.zeros(4, 5, dtype=torch.float64, device="cuda"), 3)
    assert score.marginal.is_cuda
    z = torch.zeros(3, 2, 4, 4, device="cuda")
    for normalization in (LatentNormalization(), LatentNormalization((1.0, 2.0), (0.0, 1.0), "bias_scale")):
        assert normalization.denormalize(normalization.normalize(z)).is_cuda
