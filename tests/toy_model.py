"""A model file of random weights with its VAE, and generate.py on it in this process; for the tests of sampling."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.processes import Processes
from generate import read
from models.model_file import ModelInfo, save_model
from models.sit import SiT, SiTConfig
from sampling import run
from sampling.job import load
from tests.tiny import write_vae

ROOT = Path(__file__).parents[1]
CONFIG = SiTConfig(
    depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5, class_token_dim=6, align_dims=(), align_depth=1
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small VAE (8 x 8 pixels from 4 x 4 latents) and a model file `m` of random weights."""
    folder = tmp_path_factory.mktemp("models")
    write_vae(folder / "vae", scaling_factor=0.5)
    write_model(folder, "m", CONFIG)
    return folder


@pytest.fixture(scope="module")
def unbroken(place, tmp_path_factory):
    """Samples of one process in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "s"
    generate(place, out, "--class-tokens")
    return out


def write_model(folder, name, config, seed=0, means=True, **changes):
    torch.manual_seed(seed)
    network = SiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    info = ModelInfo(config, "linear", 8, str(folder / "vae"), {"scale": (0.5,), "bias": (0.0,), "order": "bias_scale"})
    tokens = torch.randn(config.num_classes, max(config.class_token_dim, 1)) if means else None
    save_model(folder / name, network.state_dict(), replace(info, **changes), tokens)


def flags(place, out, *more):
    return ["--checkpoint", str(place / "m"), "--out", str(out), "--num-fid-samples", "11", "--num-steps", "4", *more]


def generate(place, out, *more):
    """Run in this process; the images and labels."""
    run.generate(read(flags(place, out, *more)))
    return samples(out)


def samples(out):
    with np.load(out / "samples.npz", allow_pickle=False) as stream:
        return stream["arr_0"], stream["arr_1"]


def loaded(place, *more):
    """A job ready to sample, in this process."""
    return load(read(flags(place, place / "unused", *more)), Processes("cpu"))
