"""Reading records: the published reader and ours on the same records, in turn, on one core; start-up at full size.

    python -m benchmarks.data --published PATH

The published format (an uncompressed PNG and a npy for each image) and ours, with pixels and with cached tokens, are written
to a temporary folder and read shuffled: the published one through torch's DataLoader, as it does, ours through
`dataset.read_ahead` with as many threads as the other has processes, and through DataLoader too. In the first epoch each
record is compared with its CRC-32; the rows without "first epoch" are of later ones.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from common.reporting import run
from config import parse, setting

RESOLUTION, LATENT, TOKENS, WIDTH = 256, 32, 256, 768  # ImageNet 256, SD-VAE, DINOv2-B
IMAGENET = 1_281_167


@dataclass(frozen=True)
class DataBenchmark:
    published: Path | None = setting(None, "clone of the published code at 021ea2e to run beside ours", group="what")
    images: Path | None = setting(None, "folder of class folders of images to use; default: made up", group="what")
    records: int = setting(
        512, "records to read: 0.2 MiB each in the published format, 0.6 in both of ours", group="what"
    )
    batch_size: int = setting(32, "records a batch (published: 256 on 8 GPUs)", group="what")
    workers: tuple[int, ...] = setting((0, 2), "numbers of reading processes or threads", group="what")
    cold: bool = setting(True, "also read with the files dropped from the page cache before each batch", group="what")
    full_size: bool = setting(
        True, "also start up on a dataset of ImageNet's size (files without content)", group="what"
    )
    rounds: int = setting(
        9, "turns of each variant: 16 batches and 0.2 s at least; 1 batch of a cold cache", group="how"
    )
    one_core: bool = setting(True, "keep all processes on one core", group="how")
    clock: str = setting("wall", "cpu: time of this process alone, on a busy CPU", group="how", choices=("wall", "cpu"))
    folder: Path | None = setting(None, "where to write the records; default: a temporary folder", group="how")
    label: str = setting("run", "names the result files", group="how")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DataBenchmark, (__doc__ or "").splitlines()[0], argv)
    import torch

    from benchmarks import harness, published

    if settings.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    record: dict[str, Any] = {"published": published.check(settings.published) if settings.published else None}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        write_ours(folder, settings.records, settings.images)
        if settings.published:
            write_published(folder / "published", folder / "pixels", settings.records)
        for workers in settings.workers:
            rows += _compare(folder, settings, workers, cold=False)
        if settings.cold:
            rows += _compare(folder, settings, 0, cold=True)
        if settings.full_size:
            rows.append(_full_size(folder / "full"))
    named = {k: v for k, v in asdict(settings).items() if k not in ("published", "folder", "label")}
    shown = {k: v if isinstance(v, Path) else str(v) for k, v in named.items()}
    print(harness.write("data", settings.label, {**shown, **record}, rows))


def write_ours(folder: Path, count: int, images: Path | None = None) -> None:
    """Two packed datasets of the same records, `pixels` and `tokens`, in shards of 256; tokens and moments are random."""
    import numpy as np

    from dataset import encode_moments
    from packed.format import EncoderInfo, Manifest, write_manifest
    from packed.writer import ShardWriter

    rng = np.random.default_rng(0)
    crops = _crops(images, rng)
    encoders = {"pixels": [], "tokens": [EncoderInfo("random", WIDTH, 16)]}
    for kind in ("pixels", "tokens"):
        (folder / kind).mkdir()
        shards = []
        for number, start in enumerate(range(0, count, 256)):
            n = min(256, count - start)
            arrays = {
                "moments": encode_moments(rng.random((n, 8, LATENT, LATENT), np.float32)),
                "label": rng.integers(0, 1000, n),
            }
            if kind == "pixels":
                arrays["pixels"] = crops[np.arange(start, start + n) % len(crops)]
            else:
                arrays["class_token.0"] = rng.random((n, WIDTH), np.float32).astype(np.float16)
                arrays["patch_tokens.0"] = rng.random((n, TOKENS, WIDTH), np.float32).astype(np.float16)
            writer = ShardWriter(folder / kind, number)
            writer.append(arrays)
            shards.append(writer.finish())
        fields = {name: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for name, a in arrays.items()}
        classes = [str(i) for i in range(1000)]
        write_manifest(folder / kind, Manifest(count, 256, RESOLUTION, fields, classes, {}, encoders[kind], shards))


def _crops(images: Path | None, rng: Any) -> Any:
    """Up to 64 crops, (n, 256, 256, 3) uint8: of the given images, or smooth noise, which PNG treats like photographs."""
    import numpy as np
    from PIL import Image

    from preprocessing.read import crop_file

    if images is not None:
        files = sorted(path for path in images.glob("*/*") if path.is_file())[:64]
        return np.stack([crop_file(path.read_bytes(), RESOLUTION, 10**8)[0] for path in files])
    coarse = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(64)]
    smooth = np.stack([np.asarray(image.resize((RESOLUTION, RESOLUTION))) for image in coarse]).astype(np.int16)
    return np.clip(smooth + rng.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)


def write_published(folder: Path, ours: Path, count: int) -> None:
    """The records of `ours` in the published layout: PNG without compression, moments as npy, labels in JSON."""
    import numpy as np
    from PIL import Image

    from dataset import PackedDataset, decode_moments

    dataset, labels = PackedDataset(ours), []
    for i in range(count):
        batch = dataset[[i]]
        assert batch.pixels is not None
        group = f"{i // 1000:05d}"
        names = f"{group}/img{i:08d}.png", f"{group}/img-mean-std-{i:08d}.npy"
        for below, name in zip(("imagenet_256_vae", "vae-sd"), names):
            (folder / below / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(batch.pixels[0].numpy()).save(folder / "imagenet_256_vae" / names[0], compress_level=0)
        np.save(folder / "vae-sd" / names[1], decode_moments(batch.moments)[0].numpy())
        labels.append([names[1], int(batch.label[0])])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")


def _compare(folder: Path, settings: DataBenchmark, workers: int, *, cold: bool) -> list[dict[str, Any]]:
    """Rows of samples/s: the published reader, a bare gather from the memory maps, ours."""
    from benchmarks import harness

    readers: dict[str, Callable[[], Any]] = {}
    if settings.published:
        readers["published"] = _published_reader(settings.published, settings, folder / "published", workers)
    for kind in ("pixels", "tokens"):
        if workers == 0 and not cold:
            readers[f"bare gather, {kind}"] = _bare(folder / kind, settings.batch_size)
        readers[f"ours, first epoch, {kind}"] = _our_first_epoch(folder / kind, settings.batch_size, workers)
        readers[f"ours, {kind}"] = _our_reader(folder / kind, settings.batch_size, workers)
        if not cold:
            readers[f"ours by DataLoader, {kind}"] = _our_loader(folder / kind, settings.batch_size, workers)
    if cold:
        files = {name: [p for p in (folder / name.split(", ")[-1]).rglob("*") if p.is_file()] for name in readers}
        readers = {name: _chilled(read, files[name]) for name, read in readers.items()}
    timed = harness.alternate(
        readers,
        rounds=settings.rounds,
        warmup=6,
        repeats=1 if cold else 16,
        turn=0 if cold else 0.2,
        clock="wall" if workers or cold else settings.clock,
    )
    each = {name: harness.spread([s / settings.batch_size for s in t.values]) for name, t in timed.items()}
    rows = []
    for name, seconds in each.items():
        row: dict[str, Any] = {"reader": name, "workers": workers, "page cache": "cold" if cold else "warm"}
        row["samples/s"] = harness.spread([1 / s for s in seconds.values])
        if settings.published:
            row["times the published"] = harness.ratio(each["published"], seconds)
        rows.append(row)
    return rows


def _published_reader(published_code: Path, settings: DataBenchmark, folder: Path, workers: int) -> Callable[[], Any]:
    from torch.utils.data import DataLoader

    from benchmarks import published

    dataset = published.module(published_code, "dataset.py").CustomDataset(str(folder))
    loader = DataLoader(dataset, batch_size=settings.batch_size, shuffle=True, num_workers=workers, drop_last=True)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    stream = endless()
    return lambda: next(stream)


def _our_reader(folder: Path, size: int, threads: int) -> Callable[[], Any]:
    from dataset import PackedDataset, StepSampler, read_ahead

    dataset = PackedDataset(folder)
    dataset[range(len(dataset))]  # the first epoch
    stream = read_ahead(dataset, StepSampler(len(dataset), size, seed=0), threads=threads)
    return lambda: next(stream)


def _our_first_epoch(folder: Path, size: int, threads: int) -> Callable[[], Any]:
    """The dataset is opened anew for each epoch."""
    from dataset import PackedDataset, StepSampler, read_ahead

    def endless() -> Iterator[Any]:
        while True:
            dataset = PackedDataset(folder)
            order = StepSampler(len(dataset), size, seed=0)
            yield from read_ahead(dataset, islice(order, len(dataset) // size), threads=threads)

    stream = endless()
    return lambda: next(stream)


def _our_loader(folder: Path, size: int, workers: int) -> Callable[[], Any]:
    from torch.utils.data import DataLoader

    from dataset import PackedDataset, StepSampler

    dataset = PackedDataset(folder)
    stream = iter(
        DataLoader(dataset, batch_size=None, sampler=StepSampler(len(dataset), size, seed=0), num_workers=workers)
    )
    return lambda: next(stream)


def _bare(folder: Path, size: int) -> Callable[[], Any]:
    """Indexing each memory map with the rows of one shard: what reading costs at least."""
    import numpy as np

    from dataset import PackedDataset

    dataset = PackedDataset(folder)
    shards = [
        [dataset.records(number, name) for name in dataset.fields] for number in range(len(dataset.manifest.shards))
    ]
    rng = np.random.default_rng(0)

    def read() -> list[np.ndarray]:
        fields = shards[int(rng.integers(len(shards)))]
        rows = rng.integers(0, len(fields[0]), size)
        return [records[rows] for records in fields]

    return read


def _chilled(read: Callable[[], Any], files: list[Path]) -> Callable[[], Any]:
    """Reading after the files were dropped from the page cache (clean pages can be, by anybody)."""

    def cold() -> Any:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return read()

    return cold


def _full_size(folder: Path) -> dict[str, Any]:
    """Start-up on as many records as ImageNet has: files of the right size without content on the disk."""
    import torch

    from common.files import sha256
    from dataset import PackedDataset, StepSampler
    from packed.format import EncoderInfo, Field, Manifest, write_manifest

    folder.mkdir()
    import numpy as np

    specs = {
        "moments": ("float16", (8, LATENT, LATENT)),
        "label": ("int64", ()),
        "class_token.0": ("float16", (WIDTH,)),
        "patch_tokens.0": ("float16", (TOKENS, WIDTH)),
    }
    shards = []
    for number, start in enumerate(range(0, IMAGENET, 2048)):
        count = min(2048, IMAGENET - start)
        entry: dict[str, Any] = {"count": count, "files": {}}
        for name, (dtype, shape) in specs.items():
            file = folder / f"{name}-{number:05d}.npy"
            header = Field(np.dtype(dtype), shape).header(count)
            file.write_bytes(header)
            os.truncate(file, len(header) + count * np.dtype(dtype).itemsize * int(np.prod(shape)))
            entry["files"][name] = {"file": file.name, "sha256": sha256(file) if name == "label" else "0" * 64}
        shards.append(entry)
    fields = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in specs.items()}
    classes = [str(i) for i in range(1000)]
    encoders = [EncoderInfo("random", WIDTH, 16)]
    write_manifest(folder, Manifest(IMAGENET, 2048, RESOLUTION, fields, classes, {}, encoders, shards))
    before, began = _private_memory(), time.perf_counter()
    dataset = PackedDataset(folder)
    opened = time.perf_counter()
    sampler = StepSampler(len(dataset), 256, seed=0)
    first = sampler.indices(0, 0)
    ordered, memory = time.perf_counter(), _private_memory()
    dataset[first]
    read = time.perf_counter()
    for step in range(1, 9):
        dataset[sampler.indices(step, 0)]
    after = _private_memory()
    torch.set_num_threads(1)
    return {
        "reader": f"ours, start-up of {IMAGENET} records",
        "seconds to open": opened - began,
        "to shuffle": ordered - opened,
        "first batch": read - ordered,
        "MiB opened and shuffled": memory - before,
        "MiB after 8 batches more": after - memory,
    }


def _private_memory() -> float:
    """MiB of this process that are its own: without mapped files, which are page cache."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 2**10


if __name__ == "__main__":
    run(main)
