"""VAEs between pixels and latents, over diffusers, and the only owner of how a latent is normalised."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import MissingFile, UserError
from models import hub

PUBLISHED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}  # published names => hub ids


@dataclass(frozen=True)
class LatentNormalization:
    """Normalisation of raw VAE latents: (z - bias) * scale (order "bias_scale") or z * scale + bias ("scale_bias").

    scale and bias: one number, or one per channel.
    """

    scale: tuple[float, ...] = (0.18215,)  # SD-VAE: 1 / std of its latents
    bias: tuple[float, ...] = (0.0,)
    order: str = "scale_bias"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "bias", tuple(self.bias))
        if self.order not in ("scale_bias", "bias_scale"):
            raise UserError(f"latent normalisation order {self.order!r} is neither scale_bias nor bias_scale")
        if 0 in self.scale:
            raise UserError("latent normalisation: a scale of 0 cannot be undone")

    def normalize(self, z: Tensor) -> Tensor:
        """(N, C, H, W) raw latents => the network's."""
        scale, bias = self._like(z)
        return z * scale + bias if self.order == "scale_bias" else (z - bias) * scale

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        scale, bias = self._like(x)
        return (x - bias) / scale if self.order == "scale_bias" else x / scale + bias

    def _like(self, z: Tensor) -> tuple[Tensor | float, ...]:
        """scale and bias: numbers, or (C, 1, 1) tensors made once, so that no step copies them to the device."""
        return tuple(
            values[0] if len(values) == 1 else _channels(values, z.dtype, z.device)
            for values in (self.scale, self.bias)
        )


@torch.compiler.assume_constant_result
@cache
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def sample_posterior(moments: Tensor, noise: Tensor, normalization: LatentNormalization) -> Tensor:
    """Draw normalised latents from the VAE's posterior, mean + std * noise, (N, C, H, W) float32.

    Args:
        moments: (N, 2C, H, W), mean and then standard deviation.
        noise: (N, C, H, W) standard normals.
        normalization: of the VAE.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return normalization.normalize(mean + std * noise)


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL. Pixels are uint8 (N, 3, H, W), latents (N, C, H / factor, W / factor)."""

    def __init__(self, vae: nn.Module, name: str) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.name = name
        config = vae.config
        self.latent_channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            self.normalization = LatentNormalization(tuple(1 / s for s in std), tuple(mean), "bias_scale")
        else:
            shift = getattr(config, "shift_factor", None) or 0.0
            self.normalization = LatentNormalization((config.scaling_factor,), (shift,), "bias_scale")

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (N, 3, H, W) => posterior moments (N, 2C, h, w) float32: mean, then standard deviation."""
        dtype = next(self.vae.parameters()).dtype
        posterior = self.vae.encode((pixels.float() / 127.5 - 1).to(dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    @torch.no_grad()
    def decode(self, latent: Tensor, batch: int | None = None) -> Tensor:
        """Normalised latents (N, C, h, w) => uint8 pixels (N, 3, H, W).

        255 (x + 1) / 2 is clamped and truncated, not rounded, as in the published sampler and in ADM's.

        Args:
            latent: on the VAE's device.
            batch: latents decoded at a time, which bounds the memory; None: all at once.
        """
        if batch is not None and batch < len(latent):
            return torch.cat([self.decode(part) for part in latent.split(batch)])
        raw = self.normalization.denormalize(latent.float())
        image = self.vae.decode(raw.to(next(self.vae.parameters()).dtype)).sample.float()
        return (255 * (image + 1) / 2).clamp(0, 255).to(torch.uint8)


class LatentSpace(NamedTuple):
    """All that is needed of a VAE to use moments that it has made before."""

    normalization: LatentNormalization
    factor: int
    latent_channels: int


def latent_space(name: str) -> LatentSpace:
    """The latent space of a VAE that `load_autoencoder` knows by this name; for the published ones no weights are needed."""
    if name in PUBLISHED or name in PUBLISHED.values():
        return LatentSpace(LatentNormalization(order="bias_scale"), 8, 4)
    vae = load_autoencoder(name)
    return LatentSpace(vae.normalization, vae.factor, vae.latent_channels)


def load_autoencoder(name: str) -> Autoencoder:
    """Load a VAE: "ema" or "mse" (sd-vae-ft-*), a hub id, or a local folder in diffusers' format.

    Raises MissingFile, in one sentence with the cause, if the weights are not available.
    """
    from diffusers import AutoencoderKL

    source = PUBLISHED.get(name, name)
    local = Path(source).expanduser()
    if local.exists() and not (local / "config.json").is_file():
        raise MissingFile(f"VAE folder {local} has no config.json; expected AutoencoderKL.save_pretrained's format")
    if not local.exists():
        hub.go_offline_if_unreachable()
    try:
        vae = AutoencoderKL.from_pretrained(local if local.exists() else source)
    except (OSError, ValueError) as error:
        if local.exists():
            raise MissingFile(f"VAE folder {local} cannot be read: {hub.first_line(error)}") from error
        elsewhere = f"`hf download {source} --local-dir vae` and pass --vae vae"
        raise MissingFile(f"VAE {name!r} is not a local folder, and {hub.cause(error, source, elsewhere)}") from error
    return Autoencoder(vae, name)
