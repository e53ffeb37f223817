"""CKNNA between every block of a network and an encoder (REG, arXiv 2507.01467, analysis of the layers)."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import replacing
from common.reporting import progress
from config import UserError
from dataset import PackedDataset, decode_moments
from evaluations.kernel_alignment import Side, compare, prepare
from evaluations.settings import CknnaConfig
from models import philox
from models.autoencoder import LatentNormalization, sample_posterior
from models.encoder import load_encoder
from models.interpolant import Interpolant
from models.model_file import Model
from models.noise import Stream, as_state, latent_size
from models.state import State


class Alignment(NamedTuple):
    """CKNNA by time (rows) and layer (columns), and of the denoised class token by time; None without a class token."""

    times: list[float]
    layers: list[int]
    patch_tokens: list[list[float]]
    class_token: list[list[float]] | None = None
    denoised_cknna: list[float] | None = None
    denoised_cosine: list[float] | None = None


class Targets(NamedTuple):
    """The encoder's view of the images: class_token (N, E), patch_mean (N, E), float32."""

    class_token: Tensor
    patch_mean: Tensor


def read_targets(
    data: PackedDataset, rows: Tensor, encoder: str | None, batch_size: int, device: torch.device
) -> Targets:
    """Encoder tokens of the records `rows` (N,): cached ones, or computed from the stored pixels.

    Raises:
        UserError: the dataset holds neither tokens nor pixels, or pixels and `encoder` is not given.
    """
    reader = None
    if "class_token.0" not in data.manifest.fields:
        packed = {info.name: info for info in data.manifest.encoders}
        name = encoder or next(iter(packed), "")
        if "pixels" not in data.manifest.fields or not name:
            raise UserError(f"{data.directory} has no cached tokens; give --encoder for its pixels")
        # 16 x 16 tokens at 256 px, as in training
        grid = packed[name].grid if name in packed else max(data.manifest.resolution // 16, 1)
        reader = load_encoder(name, grid).to(device)
    classes, patches = [], []
    with progress(len(rows), unit="image", description="encoder tokens") as bar:
        for part in rows.split(batch_size):
            batch = data[part.numpy()]
            if reader is None:
                tokens, grid_tokens = batch.class_token[0].to(device), batch.patch_tokens[0].to(device)
            else:
                assert batch.pixels is not None  # checked above
                tokens, grid_tokens = reader(batch.pixels.to(device).permute(0, 3, 1, 2))
            classes.append(tokens.float())
            patches.append(grid_tokens.float().mean(1))
            bar.update(len(part))
    return Targets(torch.cat(classes), torch.cat(patches))


def measure(model: Model, data: PackedDataset, rows: Tensor, targets: Targets, settings: CknnaConfig) -> Alignment:
    """CKNNA at every time and layer.

    The network is conditioned on the labels of the images; the noise is a function of the seed and the record.

    Args:
        model: the network.
        data: the dataset of the images.
        rows: (N,) their records.
        targets: their tokens, see `read_targets`.
        settings: times, layers, neighbours, seed and batch size.
    """
    config, k = model.info.network, settings.neighbours
    layers = list(settings.layers) or list(range(1, config.depth + 1))
    if max(layers) > config.depth:
        raise UserError(f"--layers must be in 1 ... {config.depth}, the blocks of this network")
    tokens = config.class_token_dim > 0
    if tokens and targets.class_token.shape[1] != config.class_token_dim:
        raise UserError(
            f"the network takes class tokens of width {config.class_token_dim}, the encoder of {data.directory} gives "
            f"{targets.class_token.shape[1]}"
        )
    caught: dict[int, Tensor] = {}
    hooks = [
        model.network.blocks[layer - 1].register_forward_hook(
            lambda _, __, out, layer=layer: caught.update({layer: out})
        )
        for layer in layers
    ]
    class_target, patch_target = (prepare(target, k) for target in targets)
    patch_scores, class_scores, denoised_scores, cosines = [], [], [], []
    bar = progress(len(settings.times) * len(rows), unit="image", description="CKNNA")
    with torch.inference_mode(), bar:
        for t in settings.times:
            patch: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            first: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            denoised = []
            for start in range(0, len(rows), settings.batch_size):
                part = slice(start, start + settings.batch_size)
                denoised.append(_forward(model, data, rows[part], targets.class_token[part], t, settings.seed))
                for layer in layers:
                    patch[layer].append(caught[layer][:, -config.num_patches :].float().mean(1))
                    if tokens:
                        first[layer].append(caught[layer][:, 0].float())
                bar.update(len(rows[part]))
            patch_scores.append(_scores(patch, patch_target, k))
            if tokens:
                guess = torch.cat(denoised)
                class_scores.append(_scores(first, class_target, k))
                denoised_scores.append(compare(prepare(guess, k), class_target))
                cosines.append(F.cosine_similarity(guess, targets.class_token).mean().item())
    for hook in hooks:
        hook.remove()
    found = Alignment(list(settings.times), layers, patch_scores)
    return Alignment(*found[:3], class_scores, denoised_scores, cosines) if tokens else found


def _scores(layers: dict[int, list[Tensor]], target: Side, k: int) -> list[float]:
    return [compare(prepare(torch.cat(parts), k), target) for parts in layers.values()]


def _forward(model: Model, data: PackedDataset, rows: Tensor, token: Tensor, t: float, seed: int) -> Tensor:
    """One pass at time t; returns the denoised class token (B, E) that its velocity implies, empty without one."""
    config, device = model.info.network, token.device
    records = data[rows.numpy()]
    moments = decode_moments(records.moments.to(device))
    shape = (len(rows), config.in_channels, config.input_size, config.input_size)
    if tuple(moments.shape[2:]) != shape[2:] or moments.shape[1] != 2 * shape[1]:
        raise UserError(
            f"{data.directory} holds latents of {moments.shape[1] // 2} x {moments.shape[2]} x {moments.shape[3]}, the "
            f"network was trained on {shape[1]} x {shape[2]} x {shape[3]}"
        )
    size = latent_size(config)
    z = philox.normal(seed, Stream.CKNNA, 0, rows.to(device), 2 * size + config.class_token_dim)
    latent = sample_posterior(moments, z[:, :size].view(shape), LatentNormalization(**model.info.normalization))
    time = torch.full((len(rows),), t, device=device)
    path = Interpolant(model.info.path)
    clean = State(latent, token if config.class_token_dim else None)
    state = clean.map(lambda x, e: path.interpolate(x, e, time), as_state(z[:, size:], config))
    output = model.network(state.latent, time, records.label.to(device), state.class_token)
    if output.class_velocity is None:
        return token[:, :0]
    return path.denoised(output.class_velocity.float(), state.class_token, time)


def plot(path: Path, alignment: Alignment) -> None:
    """Draw curves over the layers, one line for each t; with a class token also those of the token and of its estimate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("mean patch token", alignment.patch_tokens)]
    panels += [("class token", alignment.class_token)] if alignment.class_token else []
    denoised = {"CKNNA": alignment.denoised_cknna or [], "cosine": alignment.denoised_cosine or []}
    count = len(panels) + bool(alignment.denoised_cknna)
    figure = Figure(figsize=(4.6 * count, 3.6))
    FigureCanvasAgg(figure)
    every = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axes, (name, scores) in zip(every, panels):
        for number, (t, row) in enumerate(zip(alignment.times, scores)):
            shade = 0.15 + 0.7 * number / max(len(alignment.times) - 1, 1)
            colour = (shade, 0.3, 1 - shade)
            axes.plot(alignment.layers, row, marker="o", ms=3, lw=1.3, color=colour, label=f"t = {t:g}")
        axes.set(title=f"{name}, CKNNA by block", xlabel="after block", ylim=(0, None))
    if count > len(panels):
        for (name, values), marker in zip(denoised.items(), "os"):
            every[-1].plot(alignment.times, values, marker=marker, ms=3, label=name)
        every[-1].set(title="denoised class token", xlabel="t (0: data, 1: noise)")
    for axes in every:
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
