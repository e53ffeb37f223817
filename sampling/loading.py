"""The networks of a sampling job: loaded, checked against each other, in the precision that was asked for."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from config import UserError
from models import acceleration
from models.autoencoder import Autoencoder, LatentNormalization, load_autoencoder
from models.local_networks import open_network
from models.model_file import Model, load_model


def load_guided(checkpoint: Path, guide_checkpoint: Path | None, device: torch.device) -> tuple[Model, Model | None]:
    """The model and, for autoguidance, its weaker guide. Raises UserError where the two were trained on different data."""
    model = load_model(checkpoint, device)
    if guide_checkpoint is None:
        return model, None
    guide = load_model(guide_checkpoint, device)
    for name in ("in_channels", "input_size", "num_classes", "class_token_dim"):
        a, b = getattr(model.info.network, name), getattr(guide.info.network, name)
        if a != b:
            raise UserError(f"--guide-checkpoint {guide.path} has {name} {b}, the model has {a}")
    for name in ("path", "normalization"):
        if getattr(model.info, name) != getattr(guide.info, name):
            raise UserError(f"--guide-checkpoint {guide.path} was trained with another {name}")
    return model, guide


def decided_dtype(dtype: str, device: torch.device) -> str:
    """The precision that "auto" means: bf16 where this GPU computes in it natively, else fp32. Others mean themselves."""
    if dtype != "auto":
        return dtype
    return "bf16" if acceleration.best_precision(device) == "bf16" else "fp32"


def prepare(network: nn.Module, dtype: str, *, compiled: bool = False) -> nn.Module:
    """Make a network ready to sample, in place: frozen, in eval mode, compiled if asked for.

    For a reduced precision the weights of the matrix products are stored in it, so that autocast has nothing to convert at
    each step.
    """
    network.eval().requires_grad_(False)
    if dtype != "fp32":
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(acceleration.DTYPES[dtype])
    if compiled:
        acceleration.compile_network(network)
    return network


def load_decoder(
    model: Model, location: str | None, device: torch.device | str, dtype: str = "fp32", *, tiling: bool = False
) -> Autoencoder:
    """The VAE of a model, on the device.

    Args:
        model: whose latents are decoded.
        location: where the VAE is, as `load_autoencoder` reads it; None: as `open_network` finds it.
        device: to decode on.
        dtype: precision of its weights.
        tiling: decode in tiles.

    Raises:
        UserError: it is not the VAE that the model was trained with.
    """
    info, name = model.info, location or model.info.vae
    if location is None:
        autoencoder = open_network(info.vae, info.vae_weights, model.path, load_autoencoder, "--vae", shared="vae")
    else:
        autoencoder = load_autoencoder(location)
    network, trained = info.network, LatentNormalization(**info.normalization)
    if autoencoder.latent_channels != network.in_channels:
        raise UserError(
            f"VAE {name} has {autoencoder.latent_channels} latent channels, the model was trained on {network.in_channels}"
        )
    pixels = autoencoder.factor * network.input_size
    if pixels != info.resolution:
        size = network.input_size
        raise UserError(
            f"VAE {name} decodes {size}x{size} latents to {pixels} px, but the model was trained at {info.resolution} px"
        )
    probe = torch.randn(1, network.in_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(autoencoder.normalization.normalize(probe), trained.normalize(probe), rtol=1e-4, atol=1e-5):
        raise UserError(
            f"VAE {name} normalises latents by {dataclasses.asdict(autoencoder.normalization)}, the model was trained "
            f"with {dataclasses.asdict(trained)}"
        )
    autoencoder.normalization = trained
    autoencoder.to(device, acceleration.DTYPES[dtype])
    if tiling:
        autoencoder.vae.enable_tiling()
    return autoencoder
