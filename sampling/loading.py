"""The networks of a sampling job, loaded, checked against each other and brought to their precision."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import UserError
from models import acceleration
from models.autoencoder import Autoencoder, LatentNormalization, load_autoencoder
from models.model_file import Model, find_model, load_model


@dataclass(frozen=True)
class Precision:
    """dtype: of the network's arithmetic (its state is float64 in any case). vae_batch_size: latents decoded at once,
    0: all."""

    dtype: str = "fp32"
    tf32: bool = True
    compile: bool = False
    vae_dtype: str = "fp32"
    vae_batch_size: int = 0
    vae_tiling: bool = False

    def on(self, device: torch.device) -> "Precision":
        """With a dtype of "auto" decided: bfloat16 where this GPU computes in it natively, else float32."""
        if self.dtype != "auto":
            return self
        native = acceleration.best_precision(device) == "bf16"
        return dataclasses.replace(self, dtype="bf16" if native else "fp32")


def weights_sha256(module: nn.Module) -> str:
    """Of names and values of all parameters and buffers, in order."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_guided(checkpoint: Path, guide_checkpoint: Path | None, device: torch.device) -> tuple[Model, Model | None]:
    """The model and, for autoguidance, its weaker guide. Raises ValueError when the two do not speak of the same data."""
    model = load_model(checkpoint, device)
    if guide_checkpoint is None:
        return model, None
    guide = load_model(guide_checkpoint, device)
    for name in ("in_channels", "input_size", "num_classes", "class_token_dim"):
        a, b = getattr(model.info.network, name), getattr(guide.info.network, name)
        if a != b:
            raise UserError(f"--guide-checkpoint {find_model(guide_checkpoint)} has {name} {b}, the model has {a}")
    for name in ("path", "normalization"):
        if getattr(model.info, name) != getattr(guide.info, name):
            raise UserError(f"--guide-checkpoint {find_model(guide_checkpoint)} was trained with another {name}")
    return model, guide


def prepare(network: nn.Module, precision: Precision) -> nn.Module:
    """Ready to sample, in place: frozen; for a reduced precision the weights of the matrix products are stored in it, so
    that autocast has nothing to convert at each step; compiled if asked for."""
    network.eval().requires_grad_(False)
    dtype = acceleration.DTYPES[precision.dtype]
    if dtype != torch.float32:
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    if precision.compile:
        acceleration.compile_network(network)
    return network


@dataclass
class Decoder:
    """Latents => uint8 pixels, by the model's VAE."""

    autoencoder: Autoencoder
    batch_size: int

    def __call__(self, latent: Tensor) -> Tensor:
        """(N, C, h, w) => (N, 3, H, W) uint8, on the device."""
        pieces = latent.split(self.batch_size or len(latent))
        return torch.cat([self.autoencoder.decode(piece) for piece in pieces])


def load_decoder(model: Model, location: str | None, precision: Precision, device: torch.device) -> Decoder:
    """The VAE of the model file, from `location` if given. Raises ValueError when it is not the one of training."""
    name = location or model.info.vae
    autoencoder = load_autoencoder(name)
    network, trained = model.info.network, LatentNormalization(**model.info.normalization)
    if autoencoder.latent_channels != network.in_channels:
        raise UserError(
            f"VAE {name} has {autoencoder.latent_channels} latent channels, the model was trained on {network.in_channels}"
        )
    if autoencoder.factor * network.input_size != model.info.resolution:
        raise UserError(
            f"VAE {name} enlarges {autoencoder.factor} times: {network.input_size} latent pixels do not make "
            f"{model.info.resolution}"
        )
    probe = torch.randn(1, network.in_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(autoencoder.normalization.normalize(probe), trained.normalize(probe), rtol=1e-4, atol=1e-5):
        raise UserError(
            f"VAE {name} normalises latents by {dataclasses.asdict(autoencoder.normalization)}, the model was trained "
            f"with {dataclasses.asdict(trained)}"
        )
    autoencoder.normalization = trained
    autoencoder.to(device, acceleration.DTYPES[precision.vae_dtype])
    if precision.vae_tiling:
        autoencoder.vae.enable_tiling()
    return Decoder(autoencoder, precision.vae_batch_size)
