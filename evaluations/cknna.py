"""CKNNA between a network's layers and an encoder: do its tokens order images as DINOv2 does?

`python -m evaluations.cknna --checkpoint RUN --dataset PACKED` takes noisy latents and class tokens through the network
at several times t and compares, after every block, the mean patch token with the encoder's mean patch token and the
class token with the encoder's class token; also the denoised class token with the clean one (REG, analysis section).
"""

if __name__ == "__main__" and not __package__:  # run as a file: start again as a module of the project
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execv(sys.executable, [sys.executable, "-m", "evaluations.cknna", *sys.argv[1:]])

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.reporting import run
from config import UserError, parse, setting

if TYPE_CHECKING:
    import torch

    from dataset import PackedDataset
    from models.model_file import Model


@dataclass(frozen=True)
class CknnaConfig:
    checkpoint: Path = setting(
        help="model file, checkpoint or run folder (its newest), published .pt, or hub OWNER/NAME[/FILE]", group="input"
    )
    dataset: Path = setting(help="packed dataset, with cached tokens or with pixels", group="input")
    encoder: str | None = setting(
        None, "encoder for a dataset of pixels; default: the first one the model was trained with", group="input"
    )
    num_images: int = setting(10_000, "images, spread evenly over the dataset", group="measurement")
    times: tuple[float, ...] = setting(
        (0.1, 0.3, 0.5, 0.7, 0.9), "t of the noisy input, in (0, 1)", group="measurement"
    )
    layers: tuple[int, ...] = setting((), "blocks to look behind, from 1; default: all", group="measurement")
    neighbours: int = setting(10, "k", group="measurement")
    seed: int = setting(0, "of the noise", group="measurement")
    batch_size: int = setting(64, "images at once", group="machine")
    device: str = setting("auto", "cpu, cuda, or auto", group="machine", choices=("auto", "cpu", "cuda"))
    out: Path = setting(Path("cknna.json"), "results; a plot goes beside as PNG", group="output")


class Alignment(NamedTuple):
    """CKNNA by time (rows) and layer (columns), and of the denoised class token by time; None without a class token."""

    times: list[float]
    layers: list[int]
    patch_tokens: list[list[float]]
    class_token: list[list[float]] | None
    denoised_cknna: list[float] | None
    denoised_cosine: list[float] | None


class Targets(NamedTuple):
    """The encoder's view of the images: class_token (N, E), patch_mean (N, E), float32."""

    class_token: "torch.Tensor"
    patch_mean: "torch.Tensor"


class Side(NamedTuple):
    """One representation of N images, prepared for comparison: the k nearest others of each (N, k), their inner products
    (N, k) float64, and the alignment with itself."""

    nearest: "torch.Tensor"
    kernel: "torch.Tensor"
    own: float


def cknna(a: "torch.Tensor", b: "torch.Tensor", k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of a (N, D) and b (N, E), Huh et al. 2024: 1 for equal neighbourhoods.

    Unbiased HSIC of the inner-product kernels of unit vectors, both masked to the pairs (i, j) where j is one of i's k
    nearest in a and in b; over the geometric mean of the same with a alone and b alone. Only masked entries are kept,
    so 10,000 images need no N x N matrix. 0 where the neighbourhoods of a or b carry no signal.

    Raises ValueError when the rows differ, N < 4, or k is not in [2, N - 2].
    """
    return compare(prepare(a, k), prepare(b, k))


def prepare(x: "torch.Tensor", k: int) -> Side:
    """Search the neighbours of x (N, D) once, for any number of comparisons."""
    import torch
    import torch.nn.functional as F

    if len(x) < 4 or not 2 <= k <= len(x) - 2:
        raise UserError(f"CKNNA needs at least 4 images and 2 <= k <= images - 2, got {len(x)} images and k = {k}")
    unit = F.normalize(x.double(), dim=1)
    single, nearest, kernels = unit.float(), [], []
    for start in range(0, len(x), 500):
        rows = slice(start, min(start + 500, len(x)))
        kernel = single[rows] @ single.T
        kernel[torch.arange(len(kernel)), torch.arange(rows.start, rows.stop)] = -torch.inf
        nearest.append(kernel.topk(k, dim=1).indices)
        kernels.append(torch.einsum("nd,nkd->nk", unit[rows], unit[nearest[-1]]))
    side = Side(torch.cat(nearest), torch.cat(kernels), 0.0)
    return side._replace(own=_similarity(side, side))


def compare(a: Side, b: Side) -> float:
    """CKNNA of two prepared sides."""
    if len(a.nearest) != len(b.nearest):
        raise UserError(f"CKNNA compares the same images: got {len(a.nearest)} and {len(b.nearest)} rows")
    own = a.own * b.own
    return _similarity(a, b) / own**0.5 if own > 0 else 0.0


def _similarity(a: Side, b: Side) -> float:
    i, slot, other = (a.nearest[:, :, None] == b.nearest[:, None, :]).nonzero(as_tuple=True)
    return _hsic(a.kernel[i, slot], b.kernel[i, other], i, a.nearest[i, slot], len(a.nearest))


def _hsic(kernel: "torch.Tensor", other: "torch.Tensor", i: "torch.Tensor", j: "torch.Tensor", n: int) -> float:
    """Unbiased HSIC (Song et al. 2012, equation 5) of two n x n kernels with zero diagonal and the entries (i, j)."""
    import torch

    place, mirrored = i * n + j, j * n + i
    order = place.argsort()
    slot = torch.searchsorted(place[order], mirrored).clamp(max=max(len(place) - 1, 0))
    found = order[slot]
    trace = (kernel * other[found])[place[found] == mirrored].sum()
    columns = torch.zeros(n, dtype=kernel.dtype, device=kernel.device).index_add_(0, j, kernel)
    rows = torch.zeros_like(columns).index_add_(0, i, other)
    total = trace + kernel.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * (columns * rows).sum() / (n - 2)
    return (total / (n * (n - 3))).item()


def read_targets(
    data: "PackedDataset", rows: "torch.Tensor", encoder: str | None, batch_size: int, device: "torch.device"
) -> Targets:
    """Encoder tokens of the records `rows` (N,): cached ones, or from the stored pixels.

    Raises ValueError for a dataset that holds neither tokens nor pixels, or pixels and no encoder's name.
    """
    import torch

    from common.reporting import progress

    reader = None
    if "class_token.0" not in data.manifest.fields:
        packed = {info.name: info for info in data.manifest.encoders}
        name = encoder or next(iter(packed), None)
        if "pixels" not in data.manifest.fields or name is None:
            raise UserError(f"{data.directory} has no cached tokens; give --encoder for its pixels")
        from models.encoder import load_encoder

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
                tokens, grid_tokens = reader(batch.pixels.to(device).permute(0, 3, 1, 2))
            classes.append(tokens.float())
            patches.append(grid_tokens.float().mean(1))
            bar.update(len(part))
    return Targets(torch.cat(classes), torch.cat(patches))


def measure(
    model: "Model", data: "PackedDataset", rows: "torch.Tensor", targets: Targets, settings: CknnaConfig
) -> Alignment:
    """CKNNA at every time and layer. The network is conditioned on the images' labels; noise is a function of the seed
    and the record."""
    import torch
    import torch.nn.functional as F

    from common.reporting import progress

    network, config = model.network, model.info.network
    layers = list(settings.layers) or list(range(1, config.depth + 1))
    if min(layers) < 1 or max(layers) > config.depth:
        raise UserError(f"--layers must be in 1 ... {config.depth}, the blocks of this network")
    tokens = config.class_token_dim > 0
    if tokens and targets.class_token.shape[1] != config.class_token_dim:
        raise UserError(
            f"the network takes class tokens of width {config.class_token_dim}, the encoder of {data.directory} gives "
            f"{targets.class_token.shape[1]}"
        )
    caught: dict[int, torch.Tensor] = {}
    hooks = [
        network.blocks[layer - 1].register_forward_hook(lambda _, __, out, layer=layer: caught.update({layer: out}))
        for layer in layers
    ]
    class_target, patch_target = (prepare(target, settings.neighbours) for target in targets)
    patch_scores, class_scores, denoised_scores, cosines = [], [], [], []
    bar = progress(len(settings.times) * len(rows), unit="image", description="CKNNA")
    with torch.inference_mode(), bar:
        for t in settings.times:
            patch = {layer: [] for layer in layers}
            first = {layer: [] for layer in layers}
            denoised = []
            for start in range(0, len(rows), settings.batch_size):
                part = slice(start, start + settings.batch_size)
                denoised.append(_forward(model, data, rows[part], targets.class_token[part], t, settings.seed))
                for layer in layers:
                    patch[layer].append(caught[layer][:, -config.num_patches :].float().mean(1))
                    if tokens:
                        first[layer].append(caught[layer][:, 0].float())
                bar.update(len(rows[part]))
            patch_scores.append(_scores(patch, patch_target, settings.neighbours))
            if tokens:
                guess = torch.cat(denoised)
                class_scores.append(_scores(first, class_target, settings.neighbours))
                denoised_scores.append(compare(prepare(guess, settings.neighbours), class_target))
                cosines.append(F.cosine_similarity(guess, targets.class_token).mean().item())
    for hook in hooks:
        hook.remove()
    if not tokens:
        return Alignment(list(settings.times), layers, patch_scores, None, None, None)
    return Alignment(list(settings.times), layers, patch_scores, class_scores, denoised_scores, cosines)


def _scores(layers: "dict[int, list[torch.Tensor]]", target: Side, k: int) -> list[float]:
    import torch

    return [compare(prepare(torch.cat(parts), k), target) for parts in layers.values()]


def _forward(
    model: "Model", data: "PackedDataset", rows: "torch.Tensor", token: "torch.Tensor", t: float, seed: int
) -> "torch.Tensor | None":
    """One pass at time t; returns the denoised class token (B, E) that its velocity implies."""
    import torch

    from dataset import decode_moments
    from models import philox
    from models.autoencoder import LatentNormalization, sample_posterior
    from models.interpolant import Interpolant
    from models.noise import Stream, as_state, latent_size
    from models.state import State

    config, device = model.info.network, token.device
    moments = decode_moments(data[rows.numpy()].moments.to(device))
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
    label = data[rows.numpy()].label.to(device)
    output = model.network(state.latent, time, label, state.class_token)
    if output.class_velocity is None:
        return None
    return path.denoised(output.class_velocity.float(), state.class_token, time)


def plot(path: Path, alignment: Alignment) -> None:
    """Curves over the layers, one line for each t; with a class token also those of the token and of its estimate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("mean patch token", alignment.patch_tokens)]
    panels += [("class token", alignment.class_token)] if alignment.class_token else []
    denoised = alignment.denoised_cknna is not None
    count = len(panels) + denoised
    figure = Figure(figsize=(4.6 * count, 3.6))
    FigureCanvasAgg(figure)
    for place, (name, scores) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, count, place)
        for number, (t, row) in enumerate(zip(alignment.times, scores, strict=True)):
            shade = 0.15 + 0.7 * number / max(len(alignment.times) - 1, 1)
            axes.plot(
                alignment.layers, row, marker="o", ms=3, lw=1.3, color=(shade, 0.3, 1 - shade), label=f"t = {t:g}"
            )
        axes.set_title(f"{name}, CKNNA by block", fontsize=10)
        axes.set_xlabel("after block")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    if denoised:
        axes = figure.add_subplot(1, count, count)
        axes.plot(alignment.times, alignment.denoised_cknna, marker="o", ms=3, label="CKNNA")
        axes.plot(alignment.times, alignment.denoised_cosine, marker="s", ms=3, label="cosine")
        axes.set_title("denoised class token", fontsize=10)
        axes.set_xlabel("t (0: data, 1: noise)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


EXAMPLES = (
    "python -m evaluations.cknna --checkpoint runs/reg-b2 --dataset data/imagenet256 --out runs/reg-b2/cknna.json",
    "python -m evaluations.cknna --checkpoint runs/mine --dataset data/mine --num-images 1000 --times 0.3 0.7",
)


def main() -> None:
    settings = parse(CknnaConfig, "CKNNA between the layers of a network and its encoder.", examples=EXAMPLES)
    if not settings.times or min(settings.times) <= 0 or max(settings.times) >= 1:
        raise UserError(f"--times must lie between 0 and 1, got {' '.join(map(str, settings.times))}")
    if settings.batch_size < 1 or settings.num_images < 4:
        raise UserError("--batch-size must be at least 1 and --num-images at least 4")
    import numpy as np
    import torch

    from dataset import PackedDataset
    from evaluations.results import check_writable
    from models.model_file import load_model
    from models.obtain import obtain

    check_writable(settings.out)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    checkpoint = obtain(settings.checkpoint)
    model = load_model(checkpoint, device)
    data = PackedDataset(settings.dataset)
    count = min(settings.num_images, len(data))
    rows = torch.from_numpy(np.arange(count) * len(data) // count)
    encoder = settings.encoder or (model.info.encoders[0] if model.info.encoders else None)
    targets = read_targets(data, rows, encoder, settings.batch_size, device)
    alignment = measure(model, data, rows, targets, settings)
    content = {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "step": model.info.step,
        "n": count,
        "dataset": str(settings.dataset),
        "k": settings.neighbours,
        "seed": settings.seed,
        **alignment._asdict(),
    }
    settings.out.write_text(json.dumps(content, indent=1) + "\n")
    plot(settings.out.with_suffix(".png"), alignment)
    for t, row in zip(alignment.times, alignment.patch_tokens, strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        print(f"t = {t:g}: patch tokens reach CKNNA {row[best]:.3f} after block {alignment.layers[best]}")
    print(f"wrote {settings.out} and {settings.out.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
