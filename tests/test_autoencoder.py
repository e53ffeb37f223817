"""VAEs: normalisation has an inverse, moments are mean and std, missing weights are one sentence."""

import pytest
import torch

from models.autoencoder import LatentNormalization, latent_space, load_autoencoder, sample_posterior
from tests.tiny import write_vae


@pytest.mark.parametrize("order", ["scale_bias", "bias_scale"])
def test_normalisation_has_an_inverse(order):
    """denormalize undoes normalize, for one scale and for one of each channel."""
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for scale, bias in (((0.5,), (1.0,)), ((0.5, 2.0, 3.0), (1.0, -1.0, 0.0))):
        normalization = LatentNormalization(scale, bias, order)
        assert torch.allclose(normalization.denormalize(normalization.normalize(z)), z)
    expected = (z[:, 1] * 2 - 1) if order == "scale_bias" else (z[:, 1] + 1) * 2
    assert torch.allclose(normalization.normalize(z)[:, 1], expected)


def test_bad_normalisation_is_refused():
    with pytest.raises(ValueError, match="neither"):
        LatentNormalization(order="x")
    with pytest.raises(ValueError, match="scale of 0"):
        LatentNormalization((0.0,))


def test_posterior_sample():
    """The sample is mean + std noise, then normalised, in float32."""
    moments = torch.cat([torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 0.5)], 1).half()
    x = sample_posterior(moments, torch.full((1, 2, 1, 1), 2.0), LatentNormalization((0.25,), (1.0,)))
    assert x.dtype == torch.float32 and torch.equal(x, torch.full((1, 2, 1, 1), 2.0))


def test_encode_gives_mean_and_std(tmp_path):
    """Moments are diffusers' mean and std of pixels in [-1, 1]; what decode gives is truncated, not rounded."""
    vae = load_autoencoder(str(write_vae(tmp_path / "vae")))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    moments = vae.encode(pixels)
    posterior = vae.vae.encode(pixels.double().float() / 127.5 - 1).latent_dist
    assert vae.factor == 2 and moments.shape == (2, 8, 4, 4)
    assert torch.allclose(moments, torch.cat([posterior.mean, posterior.std], 1), atol=1e-5)
    latent = vae.normalization.normalize(moments[:, :4])
    image = vae.vae.decode(moments[:, :4]).sample
    expected = (255 * (image.clamp(-1, 1) + 1) / 2).floor()
    assert ((vae.decode(latent).float() - expected).abs() > 0).float().mean() < 0.01  # the latent was scaled and back


def test_per_channel_normalisation_is_read_from_the_config(tmp_path):
    """A VAE whose config has latents_mean and latents_std is normalised by them, channel by channel."""
    import json

    folder = write_vae(tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config |= {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 0.5, 2.0, 2.0]}
    (folder / "config.json").write_text(json.dumps(config))
    z = torch.ones(1, 4, 1, 1)
    assert load_autoencoder(str(folder)).normalization.normalize(z).flatten().tolist() == [0.0, -2.0, -1.0, -1.5]


def test_latents_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    """A batch bounds what the VAE sees at once; the pixels are those of one call."""
    vae = load_autoencoder(str(write_vae(tmp_path / "vae")))
    latent = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, seen, original = vae.decode(latent), [], vae.vae.decode

    def decode(z):
        seen.append(len(z))
        return original(z)

    monkeypatch.setattr(vae.vae, "decode", decode)
    parts = vae.decode(latent, batch=2)
    assert seen == [2, 2, 1] and parts.shape == whole.shape
    assert (parts.int() - whole.int()).abs().max() <= 1


def test_published_latent_space_needs_no_weights():
    """What the published moments need to be used is known without the network."""
    space = latent_space("ema")
    assert (space.factor, space.latent_channels, space.normalization.bias) == (8, 4, (0.0,))
    assert space.normalization.scale == LatentNormalization().scale


def test_missing_vae_is_one_sentence(tmp_path, monkeypatch):
    """A folder without a network, a half-copied one, and absent weights: each message says what to do."""
    from huggingface_hub import constants

    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no config\.json"):
        load_autoencoder(str(tmp_path / "empty"))
    folder = write_vae(tmp_path / "vae")
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="vae cannot be read"):
        load_autoencoder(str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("models.hub.go_offline_if_unreachable", lambda: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="hf download"):
        load_autoencoder("nobody/no-such-vae")
