"""A trained network's weights for one of other classes, resolution or parts: what fits is copied, the rest is fresh."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.class_names import spelled
from config import UserError
from models import autoencoder, encoder
from models.autoencoder import LatentNormalization
from models.model_file import ModelInfo
from models.sit import SiT, SiTConfig

_BODY = {  # of the config: what has to be the same => the flag of train.py
    "depth": "--depth",
    "hidden_size": "--hidden-size",
    "num_heads": "--num-heads",
    "patch_size": "--patch-size",
    "qk_norm": "--qk-norm",
    "mlp_ratio": "",
    "in_channels": "",
}
_PARTS = {  # what may be on one side alone => the names of its parameters
    "class token": ("class_token_embedder.", "final_layer.class_token_linear."),
    "projectors": ("projectors.",),
}
_LABELS = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Target:
    """What the weights are wanted for, as the packed dataset and the settings say.

    network: its config. path: interpolant. classes: names. vae, normalization, factor: of the latents. vae_weights,
    encoder_weights: SHA-256, "" where not known. encoders: names, of the class token first.
    """

    network: SiTConfig
    path: str
    classes: tuple[str, ...]
    vae: str
    vae_weights: str
    factor: int
    normalization: LatentNormalization
    encoders: tuple[str, ...]
    encoder_weights: tuple[str, ...]


def check(info: ModelInfo, target: Target, name: str) -> list[str]:
    """Refuse weights whose inputs and outputs mean something else than those of the target.

    Args:
        info: of the source.
        target: what the weights are wanted for.
        name: of the source, for messages.

    Returns:
        What could not be compared, in sentences.

    Raises:
        UserError: size, interpolant, latents or class token differ; says how, and what to do.
    """
    ours, theirs = target.network, info.network
    for key, flag in _BODY.items():
        wanted, found = getattr(ours, key), getattr(theirs, key)
        if wanted != found:
            to_do = f"give {_as_flag(flag, found)}" if flag else "it cannot be used for this dataset"
            raise UserError(f"--init-from {name} has {key} {found}, this run has {wanted}: {to_do}")
    if info.path != target.path:
        raise UserError(f"--init-from {name} was trained with --path-type {info.path}, this run has {target.path}")
    doubts = _check_vae(info, target, name)
    if ours.class_token_dim and theirs.class_token_dim:
        doubts += _check_encoder(info, target, name)
    return doubts


def _as_flag(flag: str, value: object) -> str:
    return f"--{'' if value else 'no-'}{flag[2:]}" if isinstance(value, bool) else f"{flag} {value}"


def _check_vae(info: ModelInfo, target: Target, name: str) -> list[str]:
    """The latents: by the digests of both VAEs, or else their names; the normalisation in any case."""
    other = f"--init-from {name} reads latents of VAE {info.vae}, the dataset holds those of {target.vae}"
    advice = "pack the images with the model's VAE (--vae)"
    size, factor = info.network.input_size, info.resolution / info.network.input_size
    if factor != target.factor:
        raise UserError(f"{other}: {info.resolution} px are {size} latent pixels there; {advice}")
    probe = torch.randn(1, info.network.in_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    theirs = LatentNormalization(**info.normalization).normalize(probe)
    if not torch.allclose(theirs, target.normalization.normalize(probe), rtol=1e-4, atol=1e-5):
        raise UserError(f"{other}, normalised in another way; {advice}")
    names = [autoencoder.PUBLISHED.get(vae, vae) for vae in (info.vae, target.vae)]
    known = bool(info.vae_weights and target.vae_weights)
    if set(names) <= set(autoencoder.PUBLISHED.values()):  # one encoder; only their decoders differ
        return []
    if not known and names[0] == names[1]:
        return []
    if not known:
        return [f"{other}: whether the two are the same cannot be compared"]
    if info.vae_weights != target.vae_weights:
        raise UserError(f"{other}: their weights differ; {advice}")
    return []


def _check_encoder(info: ModelInfo, target: Target, name: str) -> list[str]:
    """The class token: of the same encoder, by digest, or else by name."""
    ours, theirs = target.encoders[0], info.encoders[0] if info.encoders else ""
    other = (
        f"--init-from {name} makes class tokens of {theirs or 'an encoder that it does not name'}, this run of {ours}"
    )
    advice = "pack the images with its encoder (--enc-type), or train without (--no-class-token)"
    digests = [w[0] if w else "" for w in (info.encoder_weights, target.encoder_weights)]
    if all(digests):
        same = digests[0] == digests[1]
    else:
        public = [encoder.PUBLISHED.get(one, one) for one in (theirs, ours)]
        same = public[0] == public[1]
        doubtful = not all(one.startswith(("vit_", "hf-hub:")) for one in public)
        if not same and doubtful and info.network.class_token_dim == target.network.class_token_dim:
            return [f"{other}: whether the two are the same cannot be compared"]
    if not same or info.network.class_token_dim != target.network.class_token_dim:
        raise UserError(f"{other}: {advice}")
    return []


def transfer(weights: dict[str, Tensor], info: ModelInfo, network: SiT, target: Target) -> list[str]:
    """Copy a source's weights into a freshly initialised network, in place; call `check` first.

    Rows of the label table are matched by class name; the null class is the null class. Position embeddings of another
    grid are resampled.

    Args:
        weights: state dict of the source.
        info: of the source.
        network: the target's, whose fresh weights stay where the source has none.
        target: what the network is for.

    Returns:
        What was copied, resampled, left fresh or left out, in words for the user.
    """
    fresh, said = network.state_dict(), []
    wanted = dict(fresh)
    rows, labels = class_rows(info.classes, target.classes), fresh[_LABELS].clone()
    for label, row in rows.items():
        labels[label] = weights[_LABELS][row]
    labels[-1] = weights[_LABELS][-1]
    wanted[_LABELS] = labels
    said.append(
        f"{len(rows)} of {len(target.classes)} classes by name, {len(target.classes) - len(rows)} fresh"
        + ("" if info.classes else " (it names no classes)")
    )
    wanted["pos_embed"] = _positions(weights["pos_embed"], info.network, network.config)
    if info.network.input_size != network.config.input_size:
        grids = [config.input_size // config.patch_size for config in (info.network, network.config)]
        said.append(f"positions resampled from {grids[0]} x {grids[0]} to {grids[1]} x {grids[1]}")
    same_heads = _same_heads(info, target)
    for name, tensor in weights.items():
        if name in (_LABELS, "pos_embed") or name not in fresh or (name.startswith("projectors.") and not same_heads):
            continue
        wanted[name] = tensor
    for part, prefixes in _PARTS.items():
        there = any(name.startswith(prefixes) for name in weights)
        here = any(name.startswith(prefixes) for name in fresh)
        if here and not (there and (same_heads or part != "projectors")):
            said.append(f"{part} fresh")
        elif there and not here:
            said.append(f"{part} left out")
    network.load_state_dict(wanted)
    return said


def class_rows(source: Sequence[str], target: Sequence[str]) -> dict[int, int]:
    """Label of the target => label of the source of the same name, or of one that differs in case, "_" and "-" alone."""
    exact = {name: row for row, name in enumerate(source)}
    plain: dict[str, list[int]] = {}
    for row, name in enumerate(source):
        plain.setdefault(_plain(name), []).append(row)
    found = {}
    for label, name in enumerate(target):
        alike = plain.get(_plain(name), [])
        if name in exact:
            found[label] = exact[name]
        elif len(alike) == 1:
            found[label] = alike[0]
    return found


def _plain(name: str) -> str:
    return " ".join(spelled(name).casefold().replace("_", " ").replace("-", " ").split())


def _same_heads(info: ModelInfo, target: Target) -> bool:
    """Whether the projectors of the source fit: aligned with the same encoders, after the same block, of the same shape."""
    shape = ("align_dims", "align_depth", "projector_dim")
    if any(getattr(info.network, key) != getattr(target.network, key) for key in shape):
        return False
    if all(info.encoder_weights) and all(target.encoder_weights) and info.encoder_weights and target.encoder_weights:
        return info.encoder_weights == target.encoder_weights
    return info.encoders == target.encoders


def _positions(table: Tensor, source: SiTConfig, target: SiTConfig) -> Tensor:
    """(1, T, D) position embedding for the target's tokens; the class token's is zero where the source has none."""
    from timm.layers import resample_abs_pos_embed

    prefix, patches = table.split([source.num_tokens - source.num_patches, source.num_patches], dim=1)
    if target.num_patches != source.num_patches:
        side = target.input_size // target.patch_size
        patches = resample_abs_pos_embed(patches, [side, side], num_prefix_tokens=0)
    if not target.class_token_dim:
        return patches
    return torch.cat([prefix if prefix.shape[1] else torch.zeros_like(patches[:, :1]), patches], dim=1)
