"""Settings and dataset => what will be trained; contradictions between the two are found here, before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError
from loss import Objective
from models.autoencoder import LatentNormalization
from models.encoder import VisionEncoder, load_encoder
from models.interpolant import Interpolant
from models.sit import SiTConfig, preset
from packed.format import Manifest

DEFAULT_ENCODER = "dinov2-vit-b"  # of the paper


@dataclass(frozen=True)
class Plan:
    """fields: what is read of the dataset. cached: numbers of the encoders whose tokens are read. online: the encoders
    that run in the step instead. encoders: names of either. vae: what decodes the previews."""

    manifest: Manifest
    network: SiTConfig
    objective: Objective
    fields: tuple[str, ...]
    cached: tuple[int, ...]
    online: tuple[VisionEncoder, ...]
    encoders: tuple[str, ...]
    normalization: LatentNormalization
    vae: str


def make_plan(settings: Any, manifest: Manifest) -> Plan:
    """Check the settings (TrainConfig) against the dataset and derive the network.

    Raises UserError for a flag that contradicts the dataset, ValueError or FileNotFoundError from the rooms below.
    """
    channels, latent_size = manifest.fields["moments"]["shape"][0] // 2, manifest.fields["moments"]["shape"][1]
    _check_against(settings, manifest)
    free = {name: getattr(settings, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    changes = {name: value for name, value in free.items() if value is not None}
    changes |= {
        "input_size": latent_size,
        "in_channels": channels,
        "num_classes": len(manifest.classes),
        "qk_norm": settings.qk_norm,
        "projector_dim": settings.projector_dim,
        "class_token_dim": 0,
        "align_dims": (),
    }
    if settings.encoder_depth is not None:
        changes["align_depth"] = settings.encoder_depth
    bare = preset(settings.model, **changes)

    names, fields, cached, online, dims = (), ("moments", "label"), (), (), ()
    if settings.class_token or settings.proj_coeff:
        names = settings.enc_type or tuple(e.name for e in manifest.encoders) or (DEFAULT_ENCODER,)
        if not settings.proj_coeff:
            names = names[:1]  # only the class token is used
        packed = [e.name for e in manifest.encoders]
        grid = latent_size // bare.patch_size
        if all(name in packed for name in names):
            cached = tuple(packed.index(name) for name in names)
            dims = tuple(manifest.encoders[k].dim for k in cached)
            if list(cached) != sorted(cached):
                raise UserError(f"--enc-type: name the encoders in the order they were packed in: {' '.join(packed)}")
            needed = (["class_token"] if settings.class_token else []) + (
                ["patch_tokens"] if settings.proj_coeff else []
            )
            fields += tuple(f"{token}.{k}" for token in needed for k in cached)
            _check_grid(manifest, cached, grid, bare.patch_size, aligned=settings.proj_coeff > 0)
        elif "pixels" in manifest.fields:
            online = tuple(load_encoder(name, grid) for name in names)
            dims = tuple(encoder.dim for encoder in online)
            fields += ("pixels",)
        else:
            missing = next(name for name in names if name not in packed)
            held = f"tokens of {', '.join(packed)}" if packed else "neither tokens nor pixels"
            raise UserError(
                f"--enc-type {missing}: dataset {settings.data_dir} holds {held}; pack it again with --enc-type {missing}, "
                "or train plain SiT with --no-class-token --proj-coeff 0"
            )
    network = preset(
        settings.model,
        **changes
        | {
            "class_token_dim": dims[0] if settings.class_token else 0,
            "align_dims": dims if settings.proj_coeff else (),
        },
    )
    return Plan(
        manifest=manifest,
        network=network,
        objective=Objective(
            Interpolant(settings.path_type),
            settings.weighting,
            settings.class_coeff,
            settings.proj_coeff,
            settings.cfg_prob,
        ),
        fields=fields,
        cached=cached,
        online=online,
        encoders=tuple(names),
        normalization=LatentNormalization(**manifest.vae["normalization"]),
        vae=settings.vae or manifest.vae["name"],
    )


def _check_against(settings: Any, manifest: Manifest) -> None:
    if settings.resolution is not None and settings.resolution != manifest.resolution:
        raise UserError(
            f"--resolution {settings.resolution}: dataset {settings.data_dir} was packed at {manifest.resolution} pixels"
        )
    if settings.num_classes is not None and settings.num_classes != len(manifest.classes):
        raise UserError(
            f"--num-classes {settings.num_classes}: dataset {settings.data_dir} has {len(manifest.classes)} classes"
        )
    packed = manifest.vae["name"]
    if settings.vae is not None and settings.vae != packed and not Path(settings.vae).expanduser().is_dir():
        raise UserError(
            f"--vae {settings.vae}: dataset {settings.data_dir} was packed with VAE {packed!r}; leave --vae out, or give "
            "the local folder of that same VAE"
        )


def _check_grid(manifest: Manifest, cached: tuple[int, ...], grid: int, patch_size: int, *, aligned: bool) -> None:
    for k in cached if aligned else ():
        if manifest.encoders[k].grid != grid:
            raise UserError(
                f"--patch-size {patch_size} gives {grid} x {grid} patches, but the tokens of {manifest.encoders[k].name} "
                f"were packed on a {manifest.encoders[k].grid} x {manifest.encoders[k].grid} grid; pack the data again "
                f"with --patch-size {patch_size}"
            )
