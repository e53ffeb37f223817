"""Networks that people name: encoders of timm, published checkpoints."""

import pytest
import torch

import convert
import train
from config import MissingFile, UserError
from models.encoder import load_encoder
from models.model_file import find_model, load_model, read_info
from preprocessing import pack
from tests import toy_model
from tests.packs import flags
from tests.tiny import PUBLISHED_ARGS, published_weights, sit_weights, train_flags, write_vae
from tests.toy_model import write_model

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def write_encoder(folder, architecture, **arguments):
    """The folder of a random network of a timm architecture at 8 x 8 pixels."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=0, **TINY, **arguments)
    network.pretrained_cfg.update(input_size=(3, 8, 8), num_classes=0)
    save_for_hf(network, folder, model_args={**TINY, **arguments})
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [("vit_small_patch16_dinov3", 5), ("eva02_tiny_patch14_224", 1), ("beit_base_patch16_224", 1)],
)
def test_timm_classes_that_do_not_say_that_they_have_a_class_token(tmp_path, architecture, prefix):
    """DINOv3, EVA-02 and BEiT lack the attribute has_class_token and have the token; registers are left out."""
    encoder = load_encoder(write_encoder(tmp_path / "encoder", architecture), 3)
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    tokens, expected = encoder(pixels), encoder.vit.forward_features(encoder.preprocess(pixels))
    assert encoder.has_class_token and expected.shape == (2, prefix + 9, 16)
    assert torch.equal(tokens.class_token, expected[:, 0]) and torch.equal(tokens.patch_tokens, expected[:, prefix:])


def test_an_encoder_without_class_token_serves_repa_alone(toys, tmp_path):
    """SigLIP and others: packed, aligned with by --no-class-token, refused by REG; the reason given is the true one."""
    name = write_encoder(tmp_path / "siglip", "vit_base_patch16_siglip_224")
    with pytest.raises(UserError, match=r"siglip' \(VisionTransformer\) has no class token, which REG needs: name one"):
        load_encoder(name, 2)
    with pytest.raises(UserError, match=r"'resnet18' \(ResNet\) does not give a token for each patch"):
        load_encoder("resnet18", 2, class_token=False)
    pack.main(flags(toys, tmp_path / "packed", "--enc-type", name))
    run = train_flags(tmp_path / "packed", tmp_path, "--patch-size", "2", steps=1)
    with pytest.raises(
        UserError, match=r"holds no class_token.0, as encoder .*siglip has no class token: train REPA on"
    ):
        train.main(run)
    train.main([*run, "--no-class-token"])
    network = read_info(find_model(tmp_path / "run")).network
    assert network.align_dims == (16,) and not network.class_token_dim


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_dinov3",
        "eva02_large_patch14_448",
        "beitv2_large_patch16_224",
        "deit_base_distilled_patch16_384",
    ]
    + [
        "deit3_huge_patch14_224",
        "vit_large_patch14_clip_336",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_radio_v3",
    ]
    + ["vit_base_r50_s16_224", "vit_relpos_base_patch16_cls_224", "cait_s24_224"],
)
def test_every_family_with_a_class_token_loads(name):
    """On the meta device, at the grid of 256 px."""
    encoder = load_encoder(name, 16, weights=False)
    tokens = encoder.vit.forward_features(torch.zeros(1, 3, encoder.input_size, encoder.input_size, device="meta"))
    assert encoder.has_class_token and tokens.shape == (1, tokens.shape[1], encoder.dim) and tokens.shape[1] > 256


def test_a_sit_without_learn_sigma_is_not_guessed(tmp_path):
    """Its tensors have the shapes of a plain SiT of REPA, and its t runs the other way: --family says which it is."""
    state = published_weights(class_token_dim=0, align_dims=())
    source, out = tmp_path / "sit.pt", tmp_path / "m.safetensors"
    torch.save(state, source)
    run = ["--source", str(source), "--out", str(out)]
    with pytest.raises(
        UserError, match=r"sit.pt: it may be of REPA or of the original SiT .* --family repa or --family sit"
    ):
        convert.main(run)
    assert not list(tmp_path.glob("m.safetensors*"))  # a refused conversion leaves nothing
    last = {}
    for family in ("repa", "sit"):
        convert.main([*run, "--family", family])
        last[family] = load_model(out).network.state_dict()["final_layer.linear.weight"]
    assert torch.equal(last["repa"], -last["sit"]) and torch.equal(last["repa"], state["final_layer.linear.weight"])
    torch.save({"ema": state, "args": PUBLISHED_ARGS, "steps": 1}, source)  # args of REPA: no question
    convert.main(run)
    assert torch.equal(load_model(out).network.state_dict()["final_layer.linear.weight"], last["repa"])
    before = out.read_bytes()
    for weights, family in ((sit_weights(), "repa"), (published_weights(), "sit")):
        torch.save(weights, source)
        with pytest.raises(UserError, match=f"--family {family} contradicts the file"):
            convert.main([*run, "--family", family])
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [{"ema": {"a": torch.ones(1)}}, {"pos_embed": torch.ones(1)}, {"x_embedder.proj.weight": torch.ones(8, 4, 2, 2)}]
    + [{"x_embedder.proj.weight": 5}, {"ema": {}}, {}, [1], torch.ones(2)],
)
def test_files_that_are_no_sit(tmp_path, content):
    """One sentence that names the file, and no output."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt"):
        convert.main(["--source", str(tmp_path / "other.pt"), "--out", str(tmp_path / "m.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


@pytest.mark.usefixtures("caches")
def test_a_relative_path_in_a_model_file_means_nothing_elsewhere(tmp_path, monkeypatch):
    """`pack --vae toys/vae` wrote that path into model files; from another folder it looks like a name on the hub."""
    from sampling.loading import load_decoder

    write_model(tmp_path, "m", toy_model.CONFIG, vae="toys/vae")
    write_vae(tmp_path / "toys" / "vae", scaling_factor=0.5)
    model = load_model(tmp_path / "m")
    with pytest.raises(
        MissingFile, match=r"VAE 'toys/vae' is not a local .*; --vae gives the folder that .*m means by"
    ):
        load_decoder(model, None, "cpu")
    assert load_decoder(model, str(tmp_path / "toys" / "vae"), "cpu").latent_channels == 4
    monkeypatch.chdir(tmp_path)
    assert load_decoder(model, None, "cpu").latent_channels == 4
