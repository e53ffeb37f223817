"""A packed dataset made of another one by a rule: `python -m study.derive PACKED OUT`. No image is read."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.files import sha256
from common.processes import Processes
from common.provenance import weights_sha256
from common.reporting import progress, run, say
from config import UserError
from dataset import PackedDataset
from packed.format import EncoderInfo, write_manifest
from packed.writer import write_shard
from study.lite import GRID, load_teacher

TOKENS = ("class_token.0", "patch_tokens.0")


def derive(
    source: Path,
    out: Path,
    *,
    one_class: bool = False,
    token: str = "encoder",
    scale: float = 1.0,
    encoder: Path | None = None,
) -> None:
    """Write the records of a dataset with changed labels or class tokens, in the same order.

    Args:
        source: packed dataset with the tokens of one encoder.
        out: folder to write.
        one_class: give all records one label, as a folder of unsorted images has.
        token: "encoder" keeps the class token; "mean" replaces it by the mean of the patch tokens, "empty" by zeros, a slot
            in the sequence that carries nothing but its noise.
        scale: factor of the class token; 0 divides all tokens by their root mean square.
        encoder: folder of another encoder, whose tokens of the stored pixels take the place of all; pixels are left out.

    Raises:
        UserError: another encoder is to read pixels that the dataset does not hold.
    """
    data = PackedDataset(source)
    manifest = data.manifest
    arrays = {
        name: np.concatenate([data.records(k, name) for k in range(len(manifest.shards))]) for name in manifest.fields
    }
    if encoder is not None:
        if "pixels" not in arrays:
            raise UserError(f"{source} holds no pixels, which --encoder reads: pack it with --pixels")
        device, pixels = Processes().device, torch.from_numpy(arrays.pop("pixels")).permute(0, 3, 1, 2)
        teacher = load_teacher(str(encoder), GRID).to(device)
        parts = []
        with progress(len(pixels), unit="image", description=f"tokens of {encoder.name}") as bar:
            for part in pixels.split(100):
                parts.append(teacher(part.to(device)))
                bar.update(len(part))
        for name, read in zip(TOKENS, zip(*parts)):
            arrays[name] = torch.cat(read).cpu().numpy()
        arrays["patch_tokens.0"] = arrays["patch_tokens.0"].astype(np.float16)
    tokens = arrays["patch_tokens.0"].astype(np.float32).mean(1) if token == "mean" else arrays["class_token.0"]
    tokens = tokens.astype(np.float32)
    if token == "empty":
        tokens = np.zeros_like(tokens)
    else:
        tokens *= scale or 1 / np.sqrt(np.mean(tokens**2))
    classes = ["image"] if one_class else manifest.classes
    if one_class:
        arrays["label"] = np.zeros_like(arrays["label"])
    arrays["class_token.0"] = tokens.astype(np.float16)
    encoders, fields = manifest.encoders, {name: manifest.fields[name] for name in arrays}
    if encoder is not None:
        encoders = [EncoderInfo(str(encoder), tokens.shape[1], GRID, weights_sha256(teacher))]
        fields |= {name: {"dtype": "float16", "shape": list(arrays[name].shape[1:])} for name in TOKENS}
    out.mkdir(parents=True, exist_ok=True)
    shard = write_shard(out, 0, arrays)
    means, files = out / "class_means.npy", {}
    labels = arrays["label"]
    np.save(means, np.stack([tokens[labels == c].mean(0) for c in range(len(classes))]))
    files[means.name] = sha256(means)
    count = manifest.count
    manifest = replace(manifest, encoders=encoders, fields=fields)
    content = replace(manifest, classes=classes, shards=[shard], shard_size=count, class_means=means.name, files=files)
    write_manifest(out, content)
    say(f"{out}: {count:,} records of {source}, {len(classes)} classes, class token {token} x {scale:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="PACKED")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--one-class", action="store_true", help="all records get one label")
    parser.add_argument("--token", choices=("encoder", "mean", "empty"), default="encoder", help="mean: of the patches")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the class token; 0: to unit RMS")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="tokens of this network, from the stored pixels")
    settings = parser.parse_args()
    derive(
        settings.source,
        settings.out,
        one_class=settings.one_class,
        token=settings.token,
        scale=settings.scale,
        encoder=settings.encoder,
    )


if __name__ == "__main__":
    run(main)
