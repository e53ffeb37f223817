"""One flipped bit at fixed pseudo-random places of every kind of file that the programs read.

Where the file carries a digest or has one beside it, every flip is found: the reader raises UserError. Elsewhere (zip files,
whose directories have bytes without meaning, such as dates) it is found, or what is read is the same.
"""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.arrays import read_npz
from common.files import digests
from config import UserError
from dataset import PackedDataset
from evaluations import coherence
from evaluations.image_sets import open_images
from models.model_file import load_model
from packed.format import read_class_means, read_manifest
from sampling.parts import Parts, write_rows, write_samples
from sampling.tokens import read_tokens
from tests.tiny import train_flags
from tests.toy_model import CONFIG, write_model
from training import checkpoints

COUNT = 6  # samples


@pytest.fixture(scope="module")
def originals(toys, tmp_path_factory):
    """A packed dataset, a run, a model file, finished and unfinished samples, a reference with statistics."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(toys / "packed", folder / "packed")
    train.main(train_flags(folder / "packed", folder, "--no-class-token", "--proj-coeff", "0", steps=1))
    write_model(folder, "m.safetensors", CONFIG)
    rng = np.random.default_rng(0)
    pixels, tokens = rng.integers(0, 256, (COUNT, 8, 8, 3), np.uint8), rng.normal(size=(COUNT, 6)).astype(np.float32)
    labels = np.arange(COUNT) % 3
    parts = Parts(folder / "samples" / "parts")
    parts.folder.mkdir(parents=True)
    for samples in (range(4), range(4, COUNT)):
        parts.write(samples, {"pixels": pixels[samples], "label": labels[samples], "class_token": tokens[samples]})
    write_samples(folder / "samples" / "samples.npz", parts, COUNT, (8, 8, 3))
    write_rows(folder / "samples" / "class_tokens.npy", (COUNT, 6), np.float32, parts.rows(COUNT, "class_token"))
    recorded = digests(folder / "samples", ["samples.npz", "class_tokens.npy"])
    (folder / "samples" / "samples.json").write_text(json.dumps({"n": COUNT, "files": recorded}))
    statistics = {"mu": tokens[0].astype(np.float64), "sigma": np.eye(6)}
    np.savez_compressed(folder / "reference.npz", arr_0=pixels, arr_1=labels, **statistics)
    return folder


def _records(folder: Path):
    """Every record of every field; the labels as they are read at the start."""
    dataset = PackedDataset(folder / "packed")
    batch = dataset[range(len(dataset))]
    return [batch.moments, batch.label, batch.pixels, *batch.class_token, *batch.patch_tokens, dataset.labels()]


def _weights(path: Path):
    model = load_model(path)
    return [asdict(model.info), model.class_means, *model.network.state_dict().values()]


def _training_state(folder: Path):
    checkpoint = folder / "run" / "checkpoints" / "0000001"
    state = checkpoints.load(checkpoint)
    return [state.step, state.settings, *state.model.values(), *state.ema.values(), state.optimizer, state.window]


def _images(path: Path):
    images = open_images([path])
    return [images.read(0, len(images)), images.labels, list((images.statistics or {}).values())]


def _parts(folder: Path):
    parts = Parts(folder / "samples" / "parts")
    return [np.concatenate(list(parts.rows(COUNT, name))) for name in ("pixels", "label", "class_token")]


def _tokens(folder: Path):
    path = folder / "samples" / "class_tokens.npy"
    given = read_tokens([str(path)], load_model(folder / "m.safetensors"))
    assert torch.equal(given, coherence.load_tokens(path, COUNT))
    return [given]


CHECKPOINT = "run/checkpoints/0000001/"
KINDS = {  # kind => files of which one is changed, how they are read, whether every flip is found
    "shard": ("packed/*-0000?.npy", _records, True),
    "dataset.json": ("packed/dataset.json", lambda f: [asdict(read_manifest(f / "packed"))], True),
    "class means": (
        "packed/class_means.npy",
        lambda f: [read_class_means(f / "packed", read_manifest(f / "packed"))],
        True,
    ),
    "ema.safetensors": (f"{CHECKPOINT}ema.safetensors", lambda f: _weights(f / "run"), True),
    "training state": (f"{CHECKPOINT}[mo]*", _training_state, True),
    "state.json": (f"{CHECKPOINT}state.json", _training_state, True),
    "state.json beside a model": (f"{CHECKPOINT}state.json", lambda f: _weights(f / "run"), True),
    "model file": ("m.safetensors", lambda f: _weights(f / "m.safetensors"), True),
    "class tokens": ("samples/class_tokens.npy", _tokens, True),
    "samples.npz": ("samples/samples.npz", lambda f: _images(f / "samples" / "samples.npz"), False),
    "parts": ("samples/parts/part-*.npz", _parts, False),
    "reference": ("reference.npz", lambda f: _images(f / "reference.npz"), False),
    "cached statistics": ("reference.npz", lambda f: list(read_npz(f / "reference.npz").values()), False),
}


def same(a, b) -> bool:
    """Equal bit for bit, at any depth."""
    if isinstance(a, dict | list | tuple):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return type(a) is type(b) and len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def flip_bits(originals: Path, tmp_path: Path, kind: str, tries: int, seed: int) -> None:
    pattern, read, always = KINDS[kind]
    folder = tmp_path / "copy"
    shutil.copytree(originals, folder)
    expected = read(originals)
    files = sorted(folder.glob(pattern))
    rng = random.Random(f"{kind} {seed}")
    for _ in range(tries):
        file = rng.choice(files)
        content = file.read_bytes()
        place = rng.randrange(8 * len(content))
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        where = f"bit {place % 8} of byte {place // 8} of {len(content)} of {file.name}"
        try:
            found = read(folder)
        except UserError as error:
            assert str(folder) in str(error) or "record" in str(error), (where, error)
        else:
            assert same(found, expected), f"{where}: read as if it were right"
            assert not always, f"{where}: not found, though the result is the same"
        file.write_bytes(content)  # a damaged part is deleted by its reader
    assert same(read(folder), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit(originals, tmp_path, kind):
    flip_bits(originals, tmp_path, kind, tries=10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_flipped_bits(originals, tmp_path, kind):
    flip_bits(originals, tmp_path, kind, tries=200, seed=1)
