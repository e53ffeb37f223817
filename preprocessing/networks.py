"""VAE and encoders of packing: crops on the CPU => arrays to store, with the next batch on the GPU while one is fetched."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError
from dataset import decode_moments, encode_moments
from models.autoencoder import latent_space, load_autoencoder
from models.encoder import load_encoder
from packed.format import EncoderInfo
from preprocessing.read import Crops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pending(NamedTuple):
    """A batch under way. results: tensors on their way to the CPU. done: CUDA event after them, None on the CPU."""

    crops: Crops
    results: dict[str, Tensor]
    done: torch.cuda.Event | None


class Encoded(NamedTuple):
    """A batch to be written: field => (n, ...) array. error: largest rounding errors of storage, by name."""

    crops: Crops
    arrays: dict[str, np.ndarray]
    error: dict[str, float]


class Networks:
    """Frozen networks in one process."""

    def __init__(self, settings: Any, *, has_moments: bool, device: torch.device) -> None:
        """has_moments: the source brings the moments, and no VAE runs. Raises UserError, or what the loaders raise."""
        self.device, self.dtype, self.pixels = device, DTYPES[settings.dtype], settings.pixels
        space = latent_space(settings.vae) if has_moments else None
        self.vae = None if has_moments else load_autoencoder(settings.vae)
        self.normalization = (space or self.vae).normalization
        self.factor, self.channels = (space or self.vae).factor, (space or self.vae).latent_channels
        unit = self.factor * settings.patch_size
        if settings.resolution % unit:
            raise UserError(
                f"--resolution {settings.resolution}: must be a multiple of {unit} (VAE factor {self.factor} x "
                f"--patch-size {settings.patch_size})"
            )
        self.grid = settings.resolution // unit
        self.names = settings.enc_type if settings.tokens else ()
        self.encoders = [load_encoder(name, self.grid) for name in self.names]
        self.vae_info = {
            "name": settings.vae,
            "factor": self.factor,
            "weights": _digest(self.vae),
            "normalization": {
                "scale": list(self.normalization.scale),
                "bias": list(self.normalization.bias),
                "order": self.normalization.order,
            },
        }
        self.encoder_infos = [
            EncoderInfo(name, encoder.dim, encoder.grid, _digest(encoder))
            for name, encoder in zip(self.names, self.encoders)
        ]
        self._compile = settings.compile

    def fields(self, resolution: int, pixels: bool) -> dict[str, dict[str, Any]]:
        """Manifest.fields of what `finish` gives."""
        size = resolution // self.factor
        shapes = {"moments": ("float16", [2 * self.channels, size, size]), "label": ("int64", [])}
        if pixels:
            shapes["pixels"] = ("uint8", [resolution, resolution, 3])
        for k, encoder in enumerate(self.encoders):
            shapes[f"class_token.{k}"] = ("float16", [encoder.dim])
            shapes[f"patch_tokens.{k}"] = ("float16", [encoder.grid**2, encoder.dim])
        return {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}

    def place(self) -> None:
        """Move to the device; apart from the constructor, so that reading processes can start before CUDA does."""
        for network in (self.vae, *self.encoders):
            if network is not None:
                network.to(self.device)
                if self._compile:
                    network.compile(dynamic=True)

    @torch.no_grad()
    def start(self, crops: Crops) -> Pending:
        """Set a batch going; on a GPU this returns at once."""
        results: dict[str, Tensor] = {}
        if crops.moments is not None:
            results["moments"] = crops.moments
        if len(crops.pixels) and (self.vae is not None or self.encoders):
            pixels = crops.pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                if self.vae is not None:
                    results["moments"] = self.vae.encode(pixels).float()
                for k, encoder in enumerate(self.encoders):
                    tokens = encoder(pixels)
                    for name, value in (("class_token", tokens.class_token), ("patch_tokens", tokens.patch_tokens)):
                        results[f"{name}.{k}"] = value.half()
                        results[f"error {name}.{k}"] = (value.float() - value.half().float()).abs().max()
        done = None
        if self.device.type == "cuda":
            results = {name: value.to("cpu", non_blocking=True) for name, value in results.items()}
            done = torch.cuda.Event()
            done.record()
        return Pending(crops, results, done)

    def finish(self, pending: Pending) -> Encoded:
        """Wait for a batch. Raises UserError naming the image for which a network gave something that cannot be stored."""
        if pending.done is not None:
            pending.done.synchronize()
        crops = pending.crops
        results = {name: value.numpy() for name, value in pending.results.items()}
        error = {
            name.removeprefix("error "): float(value) for name, value in results.items() if name.startswith("error ")
        }
        arrays = {name: value for name, value in results.items() if not name.startswith("error ")}
        if not len(crops.pixels):
            return Encoded(crops, {}, {})
        for name, value in arrays.items():
            _check_finite(name, value, crops.names)
        exact = arrays["moments"]
        arrays["moments"] = encode_moments(exact)
        error |= _moments_error(exact, arrays["moments"])
        arrays["label"] = crops.label.numpy()
        if self.pixels:
            arrays["pixels"] = crops.pixels.numpy()
        return Encoded(crops, arrays, error)


def _check_finite(name: str, values: np.ndarray, images: list[str]) -> None:
    flat = values.reshape(len(values), -1)
    limit = np.finfo(np.float16).max
    bad = np.flatnonzero(~(np.abs(flat) <= limit).all(axis=1))
    if len(bad):
        raise UserError(f"image {images[bad[0]]}: its {name} are not finite or beyond float16; try --dtype fp32")


def _moments_error(exact: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    """Largest absolute error of the mean, largest relative error of the standard deviation."""
    back = decode_moments(torch.from_numpy(stored)).numpy()
    half = exact.shape[1] // 2
    mean = np.abs(back[:, :half] - exact[:, :half]).max()
    std = (np.abs(back[:, half:] - exact[:, half:]) / np.maximum(exact[:, half:], np.finfo(np.float32).tiny)).max()
    return {"mean": float(mean), "std (relative)": float(std)}


def _digest(network: nn.Module | None) -> str:
    """SHA-256 of a network's parameters: tells weights apart that have the same name."""
    if network is None:
        return ""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
