"""VAE and encoders of packing: crops on the CPU => arrays to store, with the next batch on the GPU while one is fetched."""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.provenance import weights_sha256
from config import UserError
from dataset import decode_moments, encode_moments
from models import acceleration
from models.autoencoder import Autoencoder, latent_space, load_autoencoder
from models.encoder import load_encoder
from models.local_networks import remember
from packed.format import EncoderInfo
from preprocessing.read import Crops
from preprocessing.settings import PackConfig

COMPILED_FROM = 50_000  # images of a dataset: for fewer, compiling takes longer than it saves


class Pending(NamedTuple):
    """A batch under way. results, errors: tensors on their way to the CPU. done: CUDA event after them, None on the CPU."""

    crops: Crops
    results: dict[str, Tensor]
    errors: dict[str, Tensor]
    done: torch.cuda.Event | None


class Encoded(NamedTuple):
    """A batch to be written: field => (n, ...) array. errors: largest rounding errors of storage, by name."""

    crops: Crops
    arrays: dict[str, np.ndarray]
    errors: dict[str, float]


class Networks:
    """Frozen networks in one process."""

    def __init__(self, settings: PackConfig, *, has_moments: bool, device: torch.device) -> None:
        """Load the networks that the settings name.

        Args:
            settings: of the program.
            has_moments: the source brings the moments, and no VAE runs.
            device: where they run.

        Raises:
            UserError: the resolution does not fit them, or what the loaders raise.
        """
        self.device, self.dtype, self.pixels = device, settings.dtype, settings.pixels
        space = latent_space(settings.vae) if has_moments else load_autoencoder(settings.vae)
        self.factor, self.channels = space.factor, space.latent_channels
        unit = self.factor * settings.patch_size
        if settings.resolution % unit:
            raise UserError(
                f"--resolution {settings.resolution}: must be a multiple of {unit} (VAE factor {self.factor} x "
                f"--patch-size {settings.patch_size})"
            )
        self.vae = space if isinstance(space, Autoencoder) else None
        names = settings.enc_type if settings.tokens else ()
        self.encoders = [load_encoder(name, settings.resolution // unit, class_token=False) for name in names]
        normalization = asdict(space.normalization)
        self.vae_info = {
            "name": settings.vae,
            "factor": self.factor,
            "weights": weights_sha256(self.vae, by_name=True) if self.vae else "",
            "normalization": {**normalization, "scale": [*normalization["scale"]], "bias": [*normalization["bias"]]},
        }
        self.encoder_infos = [
            EncoderInfo(name, encoder.dim, encoder.grid, weights_sha256(encoder, by_name=True))
            for name, encoder in zip(names, self.encoders)
        ]
        remember(settings.vae, str(self.vae_info["weights"]))
        for info in self.encoder_infos:
            remember(info.name, info.weights)
        networks: list[nn.Module] = [*self.encoders, *([self.vae] if self.vae else [])]
        for network in networks:
            network.to(device)

    def compile(self, asked: bool | None, images: int) -> None:
        """torch.compile them, as `decide_compile` says for a dataset of so many images."""
        if acceleration.decide_compile(asked, self.device, lengthy=images >= COMPILED_FROM):
            for encoder in self.encoders:
                acceleration.compile_encoder(encoder, dynamic=True)  # batches differ in size where images are left out
            if self.vae is not None:
                acceleration.compile_region(self.vae.vae.encoder, dynamic=True)

    def fields(self, resolution: int) -> dict[str, dict[str, Any]]:
        """Manifest.fields of what `finish` gives."""
        size = resolution // self.factor
        shapes: dict[str, tuple[str, list[int]]] = {
            "moments": ("float16", [2 * self.channels, size, size]),
            "label": ("int64", []),
        }
        if self.pixels:
            shapes["pixels"] = ("uint8", [resolution, resolution, 3])
        for k, encoder in enumerate(self.encoders):
            if encoder.has_class_token:
                shapes[f"class_token.{k}"] = ("float16", [encoder.dim])
            shapes[f"patch_tokens.{k}"] = ("float16", [encoder.grid**2, encoder.dim])
        return {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}

    @torch.no_grad()
    def start(self, crops: Crops) -> Pending:
        """Set a batch going; on a GPU this returns at once."""
        results: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}
        if crops.moments is not None:
            results["moments"] = crops.moments
        if len(crops.pixels) and (self.vae is not None or self.encoders):
            pixels = crops.pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            with acceleration.autocast(self.device, self.dtype):
                if self.vae is not None:
                    results["moments"] = self.vae.encode(pixels).float()
                for k, encoder in enumerate(self.encoders):
                    tokens = encoder(pixels)._asdict()
                    if not encoder.has_class_token:
                        del tokens["class_token"]
                    for name, value in tokens.items():
                        results[f"{name}.{k}"] = value.half()
                        errors[f"{name}.{k}"] = (value.float() - value.half().float()).abs().max()
        done = None
        if self.device.type == "cuda":
            results, errors = (
                {name: value.to("cpu", non_blocking=True) for name, value in tensors.items()}
                for tensors in (results, errors)
            )
            done = torch.cuda.Event()
            done.record()
        return Pending(crops, results, errors, done)

    def finish(self, pending: Pending) -> Encoded:
        """Wait for a batch. Raises UserError naming the image for which a network gave something that cannot be stored."""
        if pending.done is not None:
            pending.done.synchronize()
        crops = pending.crops
        if not len(crops.pixels):
            return Encoded(crops, {}, {})
        arrays = {name: value.numpy() for name, value in pending.results.items()}
        for name, value in arrays.items():
            _check_finite(name, value, crops.names)
        exact = arrays["moments"]
        arrays["moments"] = encode_moments(exact)
        errors = {name: float(value) for name, value in pending.errors.items()}
        errors |= _moments_error(exact, arrays["moments"])
        arrays["label"] = crops.label.numpy()
        if self.pixels:
            arrays["pixels"] = crops.pixels.numpy()
        return Encoded(crops, arrays, errors)


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
