"""What a packed dataset holds: counts, provenance, figures of its latents and tokens, a contact sheet."""

from pathlib import Path

import numpy as np
import torch

from common.pictures import Cell, Line, write_sheet
from common.reporting import say
from common.units import size_text
from dataset import PackedDataset, decode_moments
from models.autoencoder import LatentNormalization, load_autoencoder
from preprocessing.settings import DescribeConfig

_SAMPLE = 512  # records whose tokens and latents are measured
_WIDTH = 1280  # pixels of the sheet


def describe(settings: DescribeConfig) -> None:
    """Print what a dataset holds and write its contact sheet. Raises UserError where it is damaged."""
    dataset = PackedDataset(settings.data_dir)
    labels = dataset.labels()
    rng = np.random.default_rng(settings.seed)
    chosen = np.sort(rng.permutation(len(dataset))[:_SAMPLE])
    say("\n".join([*_overview(dataset), *_counts(dataset, labels, settings.classes), *_measures(dataset, chosen)]))
    if settings.images:
        sheet = settings.sheet or settings.data_dir / "contact_sheet.png"
        records = np.sort(_spread_over_classes(labels, settings.images, rng))
        draw_sheet(dataset, records, settings.vae or dataset.manifest.vae["name"], sheet)
        say(f"sheet of {len(records)} images: {sheet}")


def _overview(dataset: PackedDataset) -> list[str]:
    manifest, folder = dataset.manifest, dataset.directory
    lines = [f"{folder}: {manifest.count} records, {len(manifest.classes)} classes, {manifest.resolution} pixels"]
    for name, spec in manifest.fields.items():
        size = sum((folder / shard["files"][name]["file"]).stat().st_size for shard in manifest.shards)
        shape = " x ".join(map(str, spec["shape"])) or "one number"
        lines.append(f"  {name}: {shape} {spec['dtype']}, {size_text(size)} in {len(manifest.shards)} files")
    normalization = manifest.vae["normalization"]
    lines.append(f"VAE {manifest.vae['name']}, scale {normalization['scale'][0]:g}, factor {manifest.vae['factor']}")
    lines += [f"encoder {e.name}: {e.dim} wide, {e.grid} x {e.grid} tokens" for e in manifest.encoders]
    source = manifest.source
    if "settings" in source:
        where = source["settings"]["source"]
        lines.append(f"from {source['kind']} {where}: {source['packed']} of {source['images']} images")
        if "extensions" in source:
            lines.append(f"  of these added by --extend: {', '.join(map(str, source['extensions']))}")
        lines.append(f"  {source['enlarged']} enlarged to the crop, {len(source['skipped'])} left out")
        lines += [f"  left out: {name}: {reason}" for name, reason in source["skipped"][:10]]
        lines.append(f"  arithmetic {source['settings']['dtype']}, batches of {source['settings']['batch_size']}")
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in source["versions"].items()))
        rounding = (f"{name} {value:.2g}" for name, value in source["rounding"].items())
        lines.append("  largest rounding errors of storage: " + ", ".join(rounding))
    return lines


def _counts(dataset: PackedDataset, labels: np.ndarray, shown: int) -> list[str]:
    names = dataset.manifest.classes
    counts = np.bincount(labels, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    if len(order) > shown:
        order = np.concatenate([order[: -(-shown // 2)], order[len(order) - shown // 2 :]])
    lines = [f"images per class: {counts.min()} to {counts.max()}, mean {counts.mean():.1f}"]
    return lines + [f"  {label:5d} {names[label]}: {counts[label]}" for label in order.tolist()]


def _measures(dataset: PackedDataset, chosen: np.ndarray) -> list[str]:
    """Figures of a sample: latents as the network sees them (near 1 for a fitting VAE), and lengths of tokens."""
    batch = dataset[chosen]
    mean, std = decode_moments(batch.moments).chunk(2, dim=1)
    latent = LatentNormalization(**dataset.manifest.vae["normalization"]).normalize(mean)
    lines = [
        f"of {len(chosen)} records: latent mean {latent.mean():.3f}, standard deviation {latent.std():.3f}; "
        f"posterior std {std.min():.2g} to {std.max():.2g}"
    ]
    for k, encoder in enumerate(dataset.manifest.encoders):
        for kind, tokens in (("class token", batch.class_token), ("patch tokens", batch.patch_tokens)):
            if k < len(tokens):
                length = tokens[k].float().norm(dim=-1)
                spread = f"{length.min():.2f} to {length.max():.2f}, mean {length.mean():.2f}"
                lines.append(f"  {kind} of {encoder.name}: length {spread}")
    return lines


def _spread_over_classes(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` records of as many different classes as there are, chosen at random."""
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[by_class]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # 0 for the first of each class, then 1, ...
    tie = rng.permutation(len(ordered))
    return by_class[np.lexsort((tie, rank))][:count]


def draw_sheet(dataset: PackedDataset, records: np.ndarray, vae: str, path: Path) -> None:
    """Write a PNG: each record decoded from its mean latent, beside its pixels where they are stored, over its class."""
    batch = dataset[records]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(vae).to(device)
    latent = autoencoder.normalization.normalize(decode_moments(batch.moments.to(device)).chunk(2, dim=1)[0])
    panels = autoencoder.decode(latent, batch=8).permute(0, 2, 3, 1).cpu().numpy()
    if batch.pixels is not None:
        panels = np.concatenate([panels, batch.pixels.numpy()], axis=2)
    names = dataset.manifest.classes
    cells = [Cell(panel, (Line(f"{i} {names[i]}"),)) for panel, i in zip(panels, batch.label.tolist())]
    columns = max(1, _WIDTH // max(96, panels.shape[2]))
    write_sheet(path, [cells[start : start + columns] for start in range(0, len(cells), columns)])
