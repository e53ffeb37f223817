"""Frozen encoders: the published input path, names, grids, and clear words for what cannot serve."""

import pytest
import torch
import torch.nn.functional as F

from models.encoder import PUBLISHED, load_encoder
from tests.tiny import write_encoder


def test_tokens(tmp_path):
    """Pixels of any size give the class token and grid x grid patch tokens of timm's own forward_features."""
    encoder = load_encoder(str(write_encoder(tmp_path / "enc")), 2)
    pixels = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    tokens = encoder(pixels)
    assert tokens.class_token.shape == (3, 16) and tokens.patch_tokens.shape == (3, 4, 16)
    x = F.interpolate((pixels / 255 - 0.5) / 0.5, size=(8, 8), mode="bicubic")
    expected = encoder.vit.forward_features(x)
    assert torch.allclose(tokens.class_token, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patch_tokens, expected[:, 1:], atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_grid_follows_the_latent(tmp_path):
    """Another grid resamples the position embedding; the token count follows."""
    encoder = load_encoder(str(write_encoder(tmp_path / "enc")), 4)
    assert encoder.input_size == 16
    assert encoder(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).patch_tokens.shape == (1, 16, 16)


def test_published_names_are_timm_networks():
    """Every published DINOv2 name maps onto a network that timm knows, with a patch of 14."""
    import timm

    assert PUBLISHED["dinov2-vit-b"] == "vit_base_patch14_dinov2.lvd142m" and len(PUBLISHED) == 8
    for name in PUBLISHED.values():
        assert name in timm.list_pretrained("*dinov2*")


def test_register_tokens_are_left_out(tmp_path):
    """Tokens between class token and patches (registers) are neither."""
    import timm
    from timm.models import save_for_hf

    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "reg_tokens": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_for_hf(vit, tmp_path / "enc", model_args=arguments)
    encoder = load_encoder(str(tmp_path / "enc"), 2)
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = encoder.vit.forward_features(encoder.preprocess(pixels))
    tokens = encoder(pixels)
    assert torch.equal(tokens.patch_tokens, expected[:, 4:]) and torch.equal(tokens.class_token, expected[:, 0])


def test_checkpoint_file(tmp_path):
    """NAME=FILE loads a named architecture from a local checkpoint file."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    encoder = load_encoder(f"test_vit={tmp_path / 'vit.safetensors'}", vit.patch_embed.grid_size[0])
    assert torch.equal(encoder.vit.cls_token, vit.cls_token) and torch.equal(encoder.vit.pos_embed, vit.pos_embed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_network", "cannot be loaded"),
        ("resnet18", "does not give a token for each patch"),
        ("some/folder", "does not exist"),
        ("test_vit=nowhere.safetensors", "no checkpoint file"),
    ],
)
def test_networks_that_cannot_serve(name, message):
    """A wrong name, a network without patch tokens or a missing file is one sentence."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_encoder(name, 2)


def test_missing_weights_are_one_sentence(tmp_path, monkeypatch):
    """Weights that are neither cached nor to be downloaded: the message has the command that gets them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("models.hub.go_offline_if_unreachable", lambda: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download timm/vit_small_patch14_dinov2"):
        load_encoder("dinov2-vit-s", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(str(tmp_path / "empty"), 2)
    (tmp_path / "empty" / "config.json").write_text('{"latent_channels": 4}')
    with pytest.raises(ValueError, match="names no architecture"):
        load_encoder(str(tmp_path / "empty"), 2)
