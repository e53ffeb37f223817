"""Shared by the tests of packing: images, archives, commands on tiny networks, and what they wrote."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import UserError
from dataset import PackedDataset
from evaluations.image_sets import open_images
from preprocessing.read import CropDataset, Reader, Request
from preprocessing.sources import list_source
from tests import killable

SHARED = Path(__file__).parents[2] / "shared"
ROOT = Path(__file__).parents[1]
LIMIT = 10**6  # pixels


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode if mode != "CMYK" else "CMYK")


def encoded(image, kind="PNG", **arguments):
    stream = io.BytesIO()
    image.save(stream, kind, **arguments)
    return stream.getvalue()


SMALL = {f"{folder}/{i}.png": encoded(noise(8 + i, 9)) for folder in ("bee", "ant", "cat") for i in range(3)}
IMAGES = {
    f"{folder}/{i}.png": encoded(noise(8 + i, 9 + len(folder))) for folder in ("ant", "bees", "c") for i in range(5)
}


def write_folder(root, images=SMALL):
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path, images=SMALL, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_tar_of_tars(path):
    inner = {}
    for folder in ("bee", "ant", "cat"):
        members = {n.split("/")[1]: d for n, d in SMALL.items() if n.startswith(folder)}
        inner[f"{folder}.tar"] = write_tar(path.with_name("inner.tar"), members).read_bytes()
    path.with_name("inner.tar").unlink()
    return write_tar(path, inner)


def write_table(folder, kind, names=("ant", "bee", "cat")):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    ordered = sorted(SMALL.items())
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": name} for name, data in ordered],
            "label": [("ant", "bee", "cat").index(name.split("/")[0]) for name, _ in ordered],
        }
    )
    features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(table.slice(0, 5), folder / "train-00000.parquet", row_group_size=2)
        parquet.write_table(table.slice(5), folder / "train-00001.parquet", row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(folder / "data-00000.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    return folder


def write_published(root, images="imagenet_256_vae", count=4):
    rng = np.random.default_rng(0)
    labels = {"vae-sd": [], images: []}
    for i in range(count):
        crop, latent = f"00000/img{i:08d}.png", f"00000/img-mean-std-{i:08d}.npy"
        write_folder(root / images, {crop: encoded(noise(16, 16 + 0 * i))})
        (root / "vae-sd" / "00000").mkdir(parents=True, exist_ok=True)
        np.save(root / "vae-sd" / latent, np.abs(rng.normal(size=(8, 2, 2))).astype(np.float32))
        labels["vae-sd"].append([latent, i % 2])
        labels[images].append([crop, i % 2])
    for folder, pairs in labels.items():
        (root / folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return root


def crops(index, size=8):
    dataset = CropDataset(Reader(index.kind, index.root, index.files), size, LIMIT)
    return dataset[Request(0, index.items(0, len(index)), True)]


def flags(toys, out, *more, source=None):
    return [
        "--source",
        str(source or toys / "images"),
        "--out",
        str(out),
        "--vae",
        str(toys / "vae"),
        "--enc-type",
        str(toys / "encoder"),
        "--resolution",
        "8",
        "--shard-size",
        "6",
        "--batch-size",
        "4",
        "--num-workers",
        "0",
        "--pixels",
        *more,
    ]


def content(folder):
    """File => bytes, without the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def records(folder):
    """Everything a dataset holds, in order: field => array, without what depends on the division into shards."""
    dataset = PackedDataset(folder)
    shards = range(len(dataset.manifest.shards))
    return {name: np.concatenate([dataset.records(k, name) for k in shards]) for name in dataset.manifest.fields}


def killed(arguments, log, when):
    """Run a packing in a process and kill -9 it. when: seconds, or the number of a write to the disk (fsync or rename).
    Returns whether it was killed before it was done."""
    process = killable.start(killable.run_packing, arguments, str(log), when if isinstance(when, int) else None)
    process.join(when if isinstance(when, float) else 120)
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its reading processes would end by themselves, in seconds
    assert process.exitcode in (0, -signal.SIGKILL), Path(log).read_text()
    return process.exitcode != 0


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def torchrun(world, arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(_torchrun(world, arguments), cwd=ROOT, env=environment, capture_output=True, text=True)


def _torchrun(world, arguments):
    program = str(Path(sys.executable).with_name("torchrun"))
    return [
        program,
        f"--nproc_per_node={world}",
        "--master_port",
        str(random.randint(20000, 60000)),
        "preprocessing/pack.py",
        *arguments,
    ]


def both_refuse(path, words):
    """Packing and evaluation refuse a source with the same words."""
    for read in (list_source, lambda source: open_images([source])):
        with pytest.raises(UserError, match=words):
            read(path)
