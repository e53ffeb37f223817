"""The networks of the paper at their real size, with random weights, on real ImageNet images: the whole path fits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
IMAGES = ROOT.parent / "shared" / "data" / "imagenet-samples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGES.is_dir(), reason="the ImageNet samples are not on this machine"),
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """sd-vae-ft's architecture in diffusers' format and a DINOv2 ViT-B/14 checkpoint in the published format."""
    import timm
    from diffusers import AutoencoderKL

    out = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    vae.save_pretrained(out / "vae")
    torch.save(timm.create_model("vit_base_patch14_dinov2.lvd142m", num_classes=0).state_dict(), out / "dinov2.pth")
    yield out
    shutil.rmtree(out)  # half a gigabyte


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight images of four classes."""
    out = tmp_path_factory.mktemp("images")
    for folder in sorted(IMAGES.iterdir())[:8]:
        label = out / f"class{len(list(out.glob('*/*'))) % 4}"
        label.mkdir(exist_ok=True)
        shutil.copy(next(folder.iterdir()), label)
    return out


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["tokens", "pixels"])
def test_pack_and_train_one_step_at_256_pixels(networks, images, tmp_path, mode):
    """DINOv2-B/14 at 224, sd-vae at 256 px and SiT-B/2: packed, trained, saved; cached tokens and online encoder."""
    encoder = f"dinov2-vit-b={networks / 'dinov2.pth'}"
    flags = ["--tokens", "--no-pixels"] if mode == "tokens" else ["--no-tokens", "--pixels"]
    call(
        "preprocessing/pack.py",
        "--source",
        images,
        "--out",
        tmp_path / "data",
        "--vae",
        networks / "vae",
        "--enc-type",
        encoder,
        "--batch-size",
        4,
        "--num-workers",
        1,
        *flags,
    )
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert manifest["count"] == 8 and manifest["fields"]["moments"]["shape"] == [8, 32, 32]
    if mode == "tokens":
        assert manifest["fields"]["patch_tokens.0"]["shape"] == [256, 768]
        tokens = np.load(next((tmp_path / "data").glob("class_token.0-*.npy")))
        assert tokens.shape == (8, 768) and 0.1 < tokens.astype(np.float32).std() < 10
    call(
        "train.py",
        "--data-dir",
        tmp_path / "data",
        "--output-dir",
        tmp_path,
        "--exp-name",
        "run",
        "--model",
        "SiT-B/2",
        "--enc-type",
        encoder,
        "--batch-size",
        4,
        "--max-train-steps",
        1,
        "--sampling-steps",
        0,
        "--mixed-precision",
        "fp32",
        "--num-workers",
        0,
        "--log-every",
        1,
    )
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # The network starts at 0, so its losses start at the mean square of the targets, noise - data.
    assert line["step"] == 1 and 1 < line["velocity"] < 10 and 1 < line["class_velocity"] < 10
    assert abs(line["alignment"]) < 0.2  # random projections of random tokens
    assert next((tmp_path / "run" / "checkpoints").glob("0000001/ema.safetensors")).stat().st_size > 500e6
