"""Say what a packed dataset holds, and draw a sheet of its images, decoded from the latents that training will see.

python -m preprocessing.describe --data-dir data/imagenet256
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:  # run as a script: start again as a module, with the packages in reach
    root = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.execv(sys.executable, [sys.executable, "-m", "preprocessing.describe", *sys.argv[1:]])

from common.reporting import run
from config import UserError, parse, setting

if TYPE_CHECKING:
    import numpy as np

    from dataset import PackedDataset

_SAMPLE = 512  # records whose tokens and latents are measured


@dataclass(frozen=True)
class DescribeConfig:
    data_dir: Path = setting(help="packed dataset", group="input", also=("dataset", "data", "out"))
    vae: str | None = setting(
        None, "decodes the sheet: ema, mse, hub id or folder; default: the dataset's", group="input"
    )
    sheet: Path | None = setting(None, "PNG to write; default: contact_sheet.png in the dataset", group="output")
    images: int = setting(40, "images on the sheet; 0: no sheet, and no VAE is loaded", group="output")
    classes: int = setting(10, "classes to list: the largest and the smallest ones", group="output")
    seed: int = setting(0, "of the choice of images", group="input")


EXAMPLES = (
    "python -m preprocessing.describe --data-dir data/imagenet256",
    "python -m preprocessing.describe --data-dir data/mine --images 100 --sheet sheet.png",
)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DescribeConfig, "Describe a packed dataset.", argv, examples=EXAMPLES)
    if settings.images < 0 or settings.classes < 0:
        raise UserError("--images and --classes cannot be negative")
    import numpy as np

    from dataset import PackedDataset

    dataset = PackedDataset(settings.data_dir)
    labels = dataset.labels()
    rng = np.random.default_rng(settings.seed)
    chosen = np.sort(rng.permutation(len(dataset))[:_SAMPLE])
    lines = [*_overview(dataset), *_counts(dataset, labels, settings.classes), *_measures(dataset, chosen)]
    sys.stdout.write("\n".join(lines) + "\n")
    if settings.images:
        sheet = settings.sheet or settings.data_dir / "contact_sheet.png"
        records = np.sort(_spread_over_classes(labels, settings.images, rng))
        draw_sheet(dataset, records, settings.vae or dataset.manifest.vae["name"], sheet)
        sys.stdout.write(f"sheet of {len(records)} images: {sheet}\n")


def _overview(dataset: "PackedDataset") -> list[str]:
    from preprocessing.messages import size_text

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


def _counts(dataset: "PackedDataset", labels: "np.ndarray", shown: int) -> list[str]:
    import numpy as np

    names = dataset.manifest.classes
    counts = np.bincount(labels, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    lines = [f"images a class: {counts.min()} to {counts.max()}, mean {counts.mean():.1f}"]
    listed = (
        order if len(order) <= shown else np.concatenate([order[: -(-shown // 2)], order[len(order) - shown // 2 :]])
    )
    return lines + [f"  {label:5d} {names[label]}: {counts[label]}" for label in listed.tolist()]


def _measures(dataset: "PackedDataset", chosen: "np.ndarray") -> list[str]:
    """Figures of a sample: latents as the network sees them (near 1 for a fitting VAE), and lengths of tokens."""
    from dataset import decode_moments
    from models.autoencoder import LatentNormalization

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


def _spread_over_classes(labels: "np.ndarray", count: int, rng: Any) -> "np.ndarray":
    """`count` records of as many different classes as there are, chosen at random."""
    import numpy as np

    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[by_class]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # 0 for the first of each class, then 1, ...
    tie = rng.permutation(len(ordered))
    return by_class[np.lexsort((tie, rank))][:count]


def draw_sheet(dataset: "PackedDataset", records: "np.ndarray", vae: str, path: Path) -> None:
    """Write a PNG: each record decoded from its mean latent, beside its pixels where they are stored, over its class."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    from dataset import decode_moments
    from models.autoencoder import load_autoencoder

    batch = dataset[records]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = load_autoencoder(vae).to(device)
    mean = decode_moments(batch.moments).chunk(2, dim=1)[0]
    latent = autoencoder.normalization.normalize(mean)
    decoded = torch.cat([autoencoder.decode(part.to(device)).cpu() for part in latent.split(8)])
    panels = decoded.permute(0, 2, 3, 1).numpy()
    if batch.pixels is not None:
        panels = np.concatenate([panels, batch.pixels.numpy()], axis=2)
    zoom = max(1, 96 // panels.shape[1])
    panels = panels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = panels.shape[1] + 14, panels.shape[2] + 4
    columns = min(len(panels), max(1, 1280 // width))
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (panel, label) in enumerate(zip(panels, batch.label.tolist())):
        left, top = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(panel), (left, top))
        text = f"{label} {dataset.manifest.classes[label]}".encode("ascii", "replace").decode()
        draw.text((left + 1, top + height - 13), text[: width // 6], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    run(main)
