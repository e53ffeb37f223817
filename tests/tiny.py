"""Toy sizes for tests: a packed dataset of random numbers, a VAE, an encoder, published weights, the flags of a tiny run."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dataset import encode_moments
from models.autoencoder import LatentNormalization
from models.published import to_published
from models.sit import SiT, SiTConfig
from packed.format import EncoderInfo, Manifest, read_manifest, write_manifest
from packed.writer import write_shard

SIZE = 4  # latent; 8 pixels
CONFIG = SiTConfig(  # of the network that FLAGS and `write_dataset` give
    depth=2,
    hidden_size=32,
    num_heads=2,
    input_size=SIZE,
    num_classes=3,
    class_token_dim=16,
    align_dims=(16,),
    align_depth=1,
    projector_dim=32,
)
FLAGS = (
    "--model",
    "SiT-S/2",
    "--depth",
    "2",
    "--hidden-size",
    "32",
    "--num-heads",
    "2",
    "--encoder-depth",
    "1",
    "--projector-dim",
    "32",
    "--batch-size",
    "8",
    "--mixed-precision",
    "fp32",
    "--num-workers",
    "0",
    "--sampling-steps",
    "0",
    "--log-every",
    "1",
)


def train_flags(data: Path, out: Path, *extra: str, steps: int = 4, name: str = "run") -> list[str]:
    """Flags of a tiny run on a packed dataset."""
    own = ["--data-dir", str(data), "--output-dir", str(out), "--exp-name", name, "--max-train-steps", str(steps)]
    return [*FLAGS, *own, *extra]


def log_lines(out: Path, name: str = "run") -> list[dict]:
    """The lines of metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def write_vae(folder: Path, seed: int = 0, **config: float) -> Path:
    """An AutoencoderKL, 8 x 8 pixels to 4 x 4 x 4 latents, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        **config,
    ).save_pretrained(folder)
    return folder


def write_encoder(folder: Path, dim: int = 16) -> Path:
    """A timm ViT on 8 x 8 pixels in patches of 4, with random weights."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(1)
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": dim, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    vit.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 8, 8), num_classes=0)
    save_for_hf(vit, folder, model_args=arguments)
    return folder


def write_dataset(
    folder: Path, *, count: int = 20, dims: tuple[int, ...] = (16,), pixels: bool = False, vae: str | Path = "toy-vae"
) -> Path:
    """Random records in two shards and three classes; one encoder of each width in `dims`, on a 2 x 2 grid."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(count, 8, SIZE, SIZE)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:]) * 0.1
    arrays = {"moments": encode_moments(moments), "label": rng.integers(0, 3, count)}
    for k, dim in enumerate(dims):
        arrays[f"class_token.{k}"] = rng.normal(size=(count, dim)).astype(np.float16)
        arrays[f"patch_tokens.{k}"] = rng.normal(size=(count, 4, dim)).astype(np.float16)
    if pixels:
        arrays["pixels"] = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    first = count - count // 3
    shards = [
        write_shard(folder, 0, {name: array[:first] for name, array in arrays.items()}),
        write_shard(folder, 1, {name: array[first:] for name, array in arrays.items()}),
    ]
    means = None
    if dims:
        means = "class_means.npy"
        labels, tokens = arrays["label"], arrays["class_token.0"].astype(np.float32)
        np.save(folder / means, np.stack([tokens[labels == c].mean(0) for c in range(3)]))
    write_manifest(
        folder,
        Manifest(
            count=count,
            shard_size=first,
            resolution=8,
            fields={n: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for n, a in arrays.items()},
            classes=["ash", "birch", "cedar"],
            vae={"name": str(vae), "normalization": asdict(LatentNormalization((1.0,))), "factor": 2},
            encoders=[EncoderInfo(f"toy-{dim}", dim, 2) for dim in dims],
            shards=shards,
            class_means=means,
        ),
    )
    return folder


def spoil(folder: Path, field: str, record: int) -> None:
    """Put a NaN into one record of a dataset, with the checksums of then: as if it had been packed so."""
    manifest = read_manifest(folder)
    first = manifest.shards[0]["count"]
    number, row = (0, record) if record < first else (1, record - first)
    arrays = {name: np.load(folder / manifest.shards[number]["files"][name]["file"]) for name in manifest.fields}
    arrays[field][row].reshape(-1)[1] = np.nan
    manifest.shards[number] = write_shard(folder, number, arrays)
    write_manifest(folder, manifest)


PUBLISHED_ARGS = argparse.Namespace(resolution=8, path_type="linear", enc_type="dinov2-vit-b", encoder_depth=1)


def published_weights(**changes) -> dict[str, torch.Tensor]:
    """A REG network in published names, of a width whose number of heads is known without args."""
    torch.manual_seed(0)
    shape = {
        "depth": 3,
        "hidden_size": 384,
        "num_heads": 6,
        "input_size": 4,
        "num_classes": 5,
        "class_token_dim": 6,
        "align_dims": (6,),
        "align_depth": 1,
        "projector_dim": 16,
        **changes,
    }
    network = SiT(SiTConfig(**shape))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05)
    return to_published(network.state_dict())


def sit_weights() -> dict[str, torch.Tensor]:
    """As the original SiT saves: a bare state dict whose output also predicts a variance."""
    state = published_weights(class_token_dim=0, align_dims=())
    for name, shape in (("weight", (32, 384)), ("bias", (32,))):
        state[f"final_layer.linear.{name}"] = 0.05 * torch.randn(shape)
    return state
