"""Packing: what writing costs beside decoding and cropping, on one core, and how long a GPU waits for crops.

    python -m benchmarks.packing --images FOLDER               # CPU part: decode + crop, alone and with the rest of packing
    python -m benchmarks.packing --images FOLDER --networks    # and with networks of the published sizes, random weights

Without --images, JPEG files of 500 x 375 smooth noise are made up. --networks needs diffusers.
"""

import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.reporting import run
from config import parse, setting

if TYPE_CHECKING:
    from preprocessing.encode import Encoded, Pending
    from preprocessing.index import Index
    from preprocessing.packing import Totals
    from preprocessing.plan import Plan
    from preprocessing.read import Crops


@dataclass(frozen=True)
class PackingBenchmark:
    images: Path | None = setting(None, "folder of class folders; default: made up", group="what")
    count: int = setting(512, "images to pack; the files are repeated as often as needed", group="what")
    resolution: int = setting(256, "of the crop", group="what")
    networks: bool = setting(False, "also an sd-vae-size VAE and a DINOv2-B-size encoder, random weights", group="what")
    dtype: str = setting("bf16", "arithmetic of those", group="what", choices=("fp32", "bf16", "fp16"))
    batch_size: int = setting(64, "images at a time", group="what")
    compile: bool = setting(False, "torch.compile the networks", group="what")
    num_workers: int | None = setting(
        None, "reading processes with networks; default: as preprocessing.pack", group="how"
    )
    rounds: int = setting(5, "of the CPU part", group="how")
    clock: str = setting("wall", "cpu: time of this process alone, on a busy CPU", group="how", choices=("wall", "cpu"))
    device: str = setting("auto", "cpu, cuda or auto", group="how")
    folder: Path | None = setting(None, "where to write; default: a temporary folder", group="how")
    label: str = setting("run", "names the result files", group="how")


class NoNetworks:
    """In the place of preprocessing.encode.Networks: zeros for moments, at no cost."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")

    def start(self, crops: "Crops") -> "Pending":
        from preprocessing.encode import Pending

        return Pending(crops, {}, {}, None)

    def finish(self, pending: "Pending") -> "Encoded":
        import numpy as np

        from preprocessing.encode import Encoded

        crops = pending.crops
        size = crops.pixels.shape[1] // 8
        moments = np.zeros((len(crops.pixels), 8, size, size), np.float16)
        arrays = {"moments": moments, "label": crops.label.numpy(), "pixels": crops.pixels.numpy()}
        return Encoded(crops, arrays, {})


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(PackingBenchmark, (__doc__ or "").splitlines()[0], argv)
    import torch

    from benchmarks import harness
    from preprocessing.sources import list_source

    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        images = settings.images or write_images(folder / "images")
        index = repeat(list_source(images, allow_one_class=True), settings.count)
        rows += _cpu_part(index, folder, settings)
        if settings.networks:
            rows.append(_with_networks(index, folder, settings, torch.device(device)))
    shown = {k: str(v) for k, v in asdict(settings).items() if k not in ("folder", "label", "images", "device")}
    shown["images"] = settings.images.name if settings.images else "made up"
    print(harness.write("packing", settings.label, shown, rows, device=device))


def write_images(folder: Path, count: int = 64) -> Path:
    """JPEG files of ImageNet's usual size."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "noise").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((500, 375))
        pixels = np.clip(np.asarray(coarse).astype(np.int16) + rng.integers(-8, 9, (375, 500, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "noise" / f"{i:03d}.jpg", quality=90)
    return folder


def repeat(index: "Index", count: int) -> "Index":
    """The index of `count` images: those of `index`, over and over."""
    import numpy as np

    which = np.arange(count) % len(index)
    index.names = [index.names[i] for i in which]
    index.labels, index.places = index.labels[which], index.places[which]
    return index


def _cpu_part(index: "Index", folder: Path, settings: PackingBenchmark) -> list[dict[str, Any]]:
    """Decode + crop alone, and in the whole of packing with the time of its networks left out, on one core."""
    import torch

    from benchmarks import harness
    from preprocessing.read import CropDataset, Reader, Request

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    dataset = CropDataset(Reader(index.kind, index.root, index.files), settings.resolution, 10**8)

    def alone() -> None:
        for start in range(0, len(index), settings.batch_size):
            dataset[Request(0, index.items(start, start + settings.batch_size), False)]

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            pack(Path(out), index, NoNetworks(), settings, num_workers=0)

    timed = harness.alternate({"alone": alone, "whole": whole}, rounds=settings.rounds, clock=settings.clock)
    os.sched_setaffinity(0, cores)
    cost = harness.ratio(timed["whole"], timed["alone"])
    speed = {name: harness.spread([len(index) / s for s in seconds.values]) for name, seconds in timed.items()}
    return [
        {"what": "decode + crop", "images/s": speed["alone"], "times decode + crop": 1.0},
        {"what": "decode + crop + write", "images/s": speed["whole"], "times decode + crop": cost, "peak GiB": _peak()},
    ]


def _with_networks(index: "Index", folder: Path, settings: PackingBenchmark, device: Any) -> dict[str, Any]:
    """The whole of packing with networks of the published sizes; the first batches, compilation included, are apart."""
    import timm
    import torch
    from diffusers import AutoencoderKL

    from models import encoder
    from models.acceleration import autocast
    from preprocessing.encode import Networks
    from preprocessing.settings import PackConfig

    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    vae.save_pretrained(folder / "vae")
    grid = settings.resolution // 16
    vit = timm.create_model("vit_base_patch14_dinov2", img_size=14 * grid, num_classes=0)
    named = encoder.VisionEncoder(vit, "vit_base_patch14_dinov2", grid)
    chosen = PackConfig(
        folder,
        vae=str(folder / "vae"),
        tokens=False,
        resolution=settings.resolution,
        dtype=settings.dtype,
        compile=settings.compile,
    )
    networks = Networks(chosen, has_moments=False, device=device)
    networks.compile(settings.compile, images=0)
    networks.encoders = [named.to(device)]
    if settings.compile:
        named.compile(dynamic=True)
    first = time.monotonic()
    pixels = torch.zeros(
        settings.batch_size, 3, settings.resolution, settings.resolution, dtype=torch.uint8, device=device
    )
    assert networks.vae is not None
    with torch.no_grad(), autocast(device, settings.dtype):
        networks.vae.encode(pixels)
        named(pixels)
    first = time.monotonic() - first
    with tempfile.TemporaryDirectory(dir=folder) as out:
        totals = pack(Path(out), index, networks, settings, num_workers=settings.num_workers)
    row = {
        "what": f"whole, with networks in {settings.dtype}",
        "images/s": totals.images / totals.seconds,
        "GPU waits for crops": totals.waiting / totals.seconds,
        "first batch s": first,
        "peak GiB": _peak(),
    }
    if device.type == "cuda":
        row["GPU peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def pack(out: Path, index: "Index", networks: Any, settings: PackingBenchmark, num_workers: int | None) -> "Totals":
    """The real packing of all shards into `out`."""
    from common.processes import Processes
    from preprocessing.packing import pack_shards
    from preprocessing.settings import PackConfig

    plan = _plan(index, settings)
    chosen = PackConfig(out, source=Path(index.root), num_workers=num_workers)
    return pack_shards(index, plan, list(range(plan.shards)), networks, chosen, Processes(networks.device.type))


def _plan(index: "Index", settings: PackingBenchmark) -> "Plan":
    from preprocessing.plan import Plan

    chosen = {"resolution": settings.resolution, "shard_size": 2048, "batch_size": settings.batch_size}
    return Plan(chosen, "", len(index), {}, {}, [], {})


def _peak() -> float:
    """GiB of the largest process so far, this one or a reading one, networks included."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) / 2**20


if __name__ == "__main__":
    run(main)
