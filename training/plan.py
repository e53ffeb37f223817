"""Settings and dataset => what will be trained; contradictions between the two are found here, before anything starts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.typed import build
from config import UserError
from loss import Objective
from models.autoencoder import LatentNormalization
from models.encoder import VisionEncoder, load_encoder
from models.interpolant import Interpolant
from models.local_networks import portable
from models.model_file import ModelInfo
from models.sit import SiTConfig, preset
from packed.format import Manifest, read_class_means
from training.settings import TrainConfig

DEFAULT_ENCODER = "dinov2-vit-b"  # of the paper


@dataclass(frozen=True)
class Plan:
    """What a run trains.

    Attributes:
        fields: read of the dataset.
        cached: numbers of the encoders whose tokens are read.
        online: encoders that run in the step instead, without their weights.
        encoders: names of either.
        vae: decodes the previews.
        notes: further ones for the model file.
    """

    manifest: Manifest
    network: SiTConfig
    objective: Objective
    fields: tuple[str, ...]
    cached: tuple[int, ...]
    online: tuple[VisionEncoder, ...]
    encoders: tuple[str, ...]
    normalization: LatentNormalization
    vae: str
    notes: dict[str, Any] = field(default_factory=dict)

    def class_means(self, data_dir: Path) -> Tensor | None:
        """(classes, E) mean class tokens, for a network that makes class tokens of the dataset's first encoder.

        Raises:
            UserError: the file is missing or damaged.
        """
        if not self.network.class_token_dim or self.cached[:1] != (0,):
            return None
        means = read_class_means(data_dir, self.manifest)
        return None if means is None else torch.from_numpy(means).float()

    def model_info(self, step: int, seed: int) -> ModelInfo:
        """The header of a model file that is written after `step` steps."""
        return ModelInfo(
            network=self.network,
            path=self.objective.interpolant.path,
            resolution=self.manifest.resolution,
            vae=portable(self.vae),
            vae_weights=self.manifest.vae.get("weights", ""),
            normalization=asdict(self.normalization),
            encoders=tuple(map(portable, self.encoders)),
            encoder_weights=tuple(self.manifest.encoders[k].weights for k in self.cached),
            cfg_prob=self.objective.cfg_prob,
            step=step,
            classes=tuple(self.manifest.classes),
            notes={"seed": seed, **self.notes},
        )


def make_plan(settings: TrainConfig, manifest: Manifest) -> Plan:
    """Check the settings against the dataset and derive the network. Weights are neither read nor downloaded.

    Raises:
        UserError: a flag contradicts the dataset, or an encoder is not known.
    """
    for part, key in ((manifest.fields, "moments"), (manifest.fields, "label"), (manifest.vae, "normalization")):
        if key not in part:
            raise UserError(f"dataset {settings.data_dir} has no {key}: it was not packed for training")
    _, latent_size, _ = manifest.fields["moments"]["shape"]
    _check_against(settings, manifest)
    free = {name: getattr(settings, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    changes: dict[str, Any] = {name: value for name, value in free.items() if value is not None}
    changes |= {
        "input_size": latent_size,
        "in_channels": manifest.fields["moments"]["shape"][0] // 2,
        "num_classes": len(manifest.classes),
        "qk_norm": settings.qk_norm,
        "projector_dim": settings.projector_dim,
    }
    if settings.encoder_depth is not None:
        changes["align_depth"] = settings.encoder_depth
    bare = preset(settings.model, **changes, class_token_dim=0, align_dims=())

    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("moments", "label")
    cached: tuple[int, ...] = ()
    online: tuple[VisionEncoder, ...] = ()
    dims: tuple[int, ...] = ()
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
            needed = ["class_token"] * settings.class_token + ["patch_tokens"] * (settings.proj_coeff > 0)
            wanted = [f"{token}.{k}" for token in needed for k in cached]
            for field in wanted:
                if field not in manifest.fields:
                    raise UserError(
                        f"dataset {settings.data_dir} holds no {field}, as encoder {packed[int(field.rpartition('.')[2])]} "
                        "has no class token: train REPA on its patch tokens with --no-class-token, or pack with another "
                        "--enc-type"
                    )
            fields += tuple(wanted)
            if settings.proj_coeff:
                _check_grid(manifest, cached, grid, bare.patch_size)
        elif "pixels" in manifest.fields:
            online = tuple(load_encoder(name, grid, weights=False, class_token=settings.class_token) for name in names)
            dims = tuple(encoder.dim for encoder in online)
            fields += ("pixels",)
        else:
            missing = next(name for name in names if name not in packed)
            held = f"tokens of {', '.join(packed)}" if packed else "neither tokens nor pixels"
            raise UserError(
                f"--enc-type {missing}: dataset {settings.data_dir} holds {held}; pack it again with --enc-type {missing}, "
                "or train plain SiT with --no-class-token --proj-coeff 0"
            )
    token_dim = dims[0] if settings.class_token else 0
    network = preset(
        settings.model, **changes, class_token_dim=token_dim, align_dims=dims if settings.proj_coeff else ()
    )
    objective = Objective(
        Interpolant(settings.path_type),
        settings.weighting,
        settings.class_coeff,
        settings.proj_coeff,
        settings.cfg_prob,
        settings.align_class_token,
    )
    return Plan(
        manifest=manifest,
        network=network,
        objective=objective,
        fields=fields,
        cached=cached,
        online=online,
        encoders=names,
        normalization=build(
            LatentNormalization, manifest.vae["normalization"], f"dataset {settings.data_dir}: its VAE"
        ),
        vae=settings.vae or manifest.vae["name"],
    )


def _check_against(settings: TrainConfig, manifest: Manifest) -> None:
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


def _check_grid(manifest: Manifest, cached: tuple[int, ...], grid: int, patch_size: int) -> None:
    for k in cached:
        if manifest.encoders[k].grid != grid:
            raise UserError(
                f"--patch-size {patch_size} gives {grid} x {grid} patches, but the tokens of {manifest.encoders[k].name} "
                f"were packed on a {manifest.encoders[k].grid} x {manifest.encoders[k].grid} grid; pack the data again "
                f"with --patch-size {patch_size}"
            )
