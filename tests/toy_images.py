"""Toys of evaluation: images, sets of them, networks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluations.features import Extractor, Features
from evaluations.image_sets import open_images


def pixels(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth random images, so that networks see something."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)


def read_all(path: Path, **arguments) -> np.ndarray:
    images = open_images([path], **arguments)
    return images.read(0, len(images))


def averages(dim: int = 12) -> Extractor:
    """Extractor without a network: pooled colours of a coarse grid."""

    def compute(x: torch.Tensor) -> Features:
        return Features(torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :dim])

    return Extractor("colours", "0", compute, torch.device("cpu"))


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save_vit(folder: Path, classes: int = 5, channels: int = 3) -> Path:
    """A small random ViT with a class token, in timm's own folder format."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=classes,
        in_chans=channels,
    )
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else None
    arguments = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    network.pretrained_cfg["input_size"] = (channels, 16, 16)
    network.pretrained_cfg["mean"] = network.pretrained_cfg["mean"][:channels]
    network.pretrained_cfg["std"] = network.pretrained_cfg["std"][:channels]
    save_for_hf(network, folder, model_args=arguments, safe_serialization=True)
    return folder


def write_mixed(folder: Path, sizes=((16, 16), (40, 24), (16, 16), (8, 12))) -> list[Image.Image]:
    """Images of several (width, height), in the order of their names."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return images
