"""`--assume NAME`: a dataset that nobody has packed yet, so that a run can be planned before the days of packing."""

import math
from typing import Any, NamedTuple

import numpy as np

from models.encoder import load_encoder
from models.sit import PRESETS, preset
from packed.format import EncoderInfo, Manifest
from training.plan import DEFAULT_ENCODER
from training.settings import TrainConfig


class Assumed(NamedTuple):
    """Size of a dataset; resolution in pixels per side, of which the VAE's latents have an eighth."""

    images: int
    classes: int
    resolution: int


ASSUMED = {"imagenet256": Assumed(1_281_167, 1000, 256), "imagenet512": Assumed(1_281_167, 1000, 512)}
_FACTOR, _CHANNELS = 8, 4  # of the Stable Diffusion VAEs


def assumed_manifest(settings: TrainConfig) -> Manifest:
    """The manifest that packing settings.assume for these settings would write.

    It has the moments of the VAE and cached tokens of the encoders, on the patch grid of the network.

    Raises:
        UserError: an encoder is not known.
    """
    assert settings.assume is not None
    images, classes, resolution = ASSUMED[settings.assume]
    side = resolution // _FACTOR
    patch = settings.patch_size or (preset(settings.model).patch_size if settings.model in PRESETS else 2)
    grid = side // patch
    encoders = [
        EncoderInfo(name, load_encoder(name, grid, weights=False, class_token=settings.class_token).dim, grid)
        for name in settings.enc_type or (DEFAULT_ENCODER,)
    ]
    shapes: dict[str, list[int]] = {"moments": [2 * _CHANNELS, side, side]}
    for k, encoder in enumerate(encoders):
        shapes |= {f"class_token.{k}": [encoder.dim], f"patch_tokens.{k}": [grid * grid, encoder.dim]}
    fields: dict[str, dict[str, Any]] = {name: {"dtype": "float16", "shape": shape} for name, shape in shapes.items()}
    fields["label"] = {"dtype": "int64", "shape": []}
    return Manifest(
        count=images,
        shard_size=images,
        resolution=resolution,
        fields=fields,
        classes=[str(c) for c in range(classes)],
        vae={"name": settings.vae or "ema", "normalization": {}, "factor": _FACTOR},
        encoders=encoders,
        shards=[],
    )


def record_bytes(manifest: Manifest) -> int:
    """Bytes of one record on disk, all fields together."""
    return sum(np.dtype(f["dtype"]).itemsize * math.prod(f["shape"]) for f in manifest.fields.values())
