"""The packed dataset: what was written is read back, damage is found at once, the order of training is a function."""

import itertools
import json
import os
import pickle
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.files import fingerprint, read_sealed, write_sealed
from dataset import PackedDataset, StepSampler, decode_moments, encode_moments, read_ahead
from packed import memory
from packed.format import Field, Manifest, read_manifest, write_manifest
from packed.writer import ShardWriter, write_shard
from tests.tiny import write_dataset


def test_moments_survive_storage():
    """Mean and std come back to 11 bits, stds far below float16's smallest normal number included."""
    rng = np.random.default_rng(0)
    std = np.exp(rng.uniform(np.log(1e-6), np.log(60), (4, 4, 3, 3)))
    exact = np.concatenate([rng.normal(0, 10, std.shape), std], axis=1).astype(np.float32)
    back = decode_moments(torch.from_numpy(encode_moments(exact))).numpy()
    assert np.abs(back - exact)[:, :4].max() <= 50 * 2.0**-11
    assert (np.abs(back - exact)[:, 4:] / exact[:, 4:]).max() <= 2.0**-11
    least = np.full((1, 2, 1, 1), np.exp(-15), np.float32)  # what the SD-VAE clamps to
    assert decode_moments(torch.from_numpy(encode_moments(least)))[0, 1] == pytest.approx(np.exp(-15), rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_moments_that_do_not_fit_are_refused(value):
    """A value that float16 cannot hold is an error, not an infinity."""
    moments = np.ones((3, 2, 1, 1), np.float32)
    moments[2, 0] = value
    with pytest.raises(ValueError, match="record 2"):
        encode_moments(moments)


def test_round_trip(tmp_path):
    """Any records, in any order and twice, come back as they were written, across shards."""
    rng = np.random.default_rng(0)
    arrays = {
        "moments": rng.normal(size=(20, 8, 4, 4)).astype(np.float16),
        "label": rng.integers(0, 3, 20),
        "pixels": rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
    }
    shards = [write_shard(tmp_path, k, {n: a[s] for n, a in arrays.items()}) for k, s in enumerate(_slices(7, 9, 20))]
    write_manifest(tmp_path, _manifest(arrays, shards, 20))
    dataset = PackedDataset(tmp_path)
    for indices in ([0], [19, 0, 7, 6, 8, 8, 9], list(range(20)), rng.permutation(20)):
        batch = dataset[indices]
        for name in arrays:
            assert np.array_equal(getattr(batch, name).numpy(), arrays[name][indices]), name
        assert batch.index.tolist() == list(indices) and batch.class_token == ()
    assert np.array_equal(dataset.labels(), arrays["label"])
    assert PackedDataset(tmp_path, ("moments", "label"))[[3]].pixels is None
    with pytest.raises(IndexError, match="20"):
        dataset[[20]]


def test_appended_shard_equals_one_written_at_once(tmp_path):
    """A shard written batch by batch has the bytes, checksums and entry of one written in one go."""
    arrays = {"label": np.arange(9), "pixels": np.arange(108, dtype=np.uint8).reshape(9, 2, 2, 3)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = write_shard(tmp_path / "a", 3, arrays)
    writer = ShardWriter(tmp_path / "b", 3)
    for part in _slices(4, 5, 9):
        writer.append({name: array[part] for name, array in arrays.items()})
    assert writer.finish() == whole
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert np.array_equal(np.load(tmp_path / "b" / "pixels-00003.npy"), arrays["pixels"])


def test_header_room():
    """The header of a file has the same length for every count: it is written before the count is known."""
    lengths = {len(Field(np.dtype("float16"), (256, 768)).header(count)) for count in (0, 1, 10**6, 10**12)}
    assert len(lengths) == 1 and lengths.pop() % 64 == 0


def test_unequal_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        write_shard(tmp_path, 0, {"label": np.zeros(2), "pixels": np.zeros((3, 1))})


def test_workers_read_the_same(tmp_path):
    """Worker processes give the batches that the process itself gives, and a pickled dataset carries no data."""
    dataset = PackedDataset(write_dataset(tmp_path / "data"))
    dataset[[0]]
    assert len(pickle.dumps(dataset)) < 8000

    def batches(workers):
        loader = DataLoader(dataset, batch_size=None, sampler=StepSampler(20, 6, seed=1), num_workers=workers)
        stream = iter(loader)
        return [next(stream) for _ in range(5)]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.moments, b.moments)
        assert torch.equal(a.patch_tokens[0], b.patch_tokens[0])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "moments-00001.npy").unlink(), r"moments-00001\.npy is missing"),
        (lambda f: _cut(f / "class_token.0-00000.npy"), r"class_token\.0-00000\.npy is truncated"),
        (
            lambda f: _replace(f / "dataset.json", '"count": 20', '"count": 21'),
            "its checksum does not match",
        ),
        (lambda f: _cut(f / "dataset.json"), r"dataset\.json is damaged"),
        (lambda f: (f / "dataset.json").unlink(), "not a packed dataset"),
        (lambda f: (f / "dataset.json").write_text('"text"'), r"dataset\.json is damaged"),
    ],
    ids=["missing", "truncated", "edited manifest", "truncated manifest", "no manifest", "no object"],
)
def test_damage_is_found_at_the_start(tmp_path, harm, message):
    """A missing or truncated file, or an edited manifest, is named before any batch is read."""
    folder = write_dataset(tmp_path / "data")
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PackedDataset(folder)


def test_wrong_header_is_named(tmp_path):
    """A file of the right length that holds something else is named when it is first read."""
    folder = write_dataset(tmp_path / "data")
    path = folder / "label-00000.npy"
    labels = np.load(path)
    np.save(path, labels.view(np.float64))
    with pytest.raises(ValueError, match=r"label-00000\.npy does not hold 14 records of int64"):
        PackedDataset(folder)[[0]]


def test_shards_must_add_up(tmp_path):
    folder = write_dataset(tmp_path / "data")
    manifest = read_manifest(folder)
    manifest.count += 1
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match="add up"):
        PackedDataset(folder)
    with pytest.raises(ValueError, match="schema"):
        write_sealed(folder / "dataset.json", {**asdict(manifest), "schema": 99})
        read_manifest(folder)


def test_absent_field_is_named(tmp_path):
    with pytest.raises(ValueError, match="no field 'pixels'"):
        PackedDataset(write_dataset(tmp_path / "data"), ("pixels",))


def test_json_checks_itself(tmp_path):
    """JSON files are read back, in any order of keys, and any change of a character is found."""
    path = tmp_path / "x.json"
    write_sealed(path, {"b": [1, 2.5], "a": "text"})
    assert read_sealed(path, "") == {"a": "text", "b": [1, 2.5]}
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # laid out differently, the same content
    assert read_sealed(path, "")["a"] == "text"
    for old, new in (("text", "test"), ("2.5", "2.6"), ('"a"', '"c"')):
        path.write_text(json.dumps(content).replace(old, new))
        with pytest.raises(ValueError, match=r"x\.json"):
            read_sealed(path, "")


def test_every_record_once_an_epoch():
    """Each epoch holds every record once, whatever the batch size, and epochs differ."""
    sampler = StepSampler(10, 4, seed=3)
    row = np.concatenate([sampler.indices(step, 0) for step in range(10)])
    epochs = row.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert not np.array_equal(epochs[0], StepSampler(10, 10, seed=4).indices(0, 0))


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_order_does_not_depend_on_processes(world, micro):
    """Processes and micro-batches share out one global batch."""
    whole = StepSampler(23, 8, seed=0)
    for step in range(7):
        parts = [
            StepSampler(23, 8, seed=0, rank=rank, world=world, micro=micro).indices(step, m)
            for rank in range(world)
            for m in range(micro)
        ]
        assert np.array_equal(np.concatenate(parts), whole.indices(step, 0))


def test_sampler_resumes():
    """Starting at step s gives what an unbroken run gives from there."""
    unbroken, resumed = iter(StepSampler(11, 4, seed=5)), iter(StepSampler(11, 4, seed=5, start_step=6))
    for _ in range(6):
        next(unbroken)
    for _ in range(5):
        assert np.array_equal(next(unbroken), next(resumed))


def test_uneven_batch_is_refused():
    with pytest.raises(ValueError, match="10 must be divisible by 4 processes"):
        StepSampler(20, 10, seed=0, world=4)
    with pytest.raises(ValueError, match="empty"):
        StepSampler(0, 1, seed=0)


def _slices(*ends):
    return [slice(start, end) for start, end in zip((0, *ends), ends)]


def _manifest(arrays, shards, count):
    fields = {n: {"dtype": str(a.dtype), "shape": list(a.shape[1:])} for n, a in arrays.items()}
    return Manifest(count, 7, 32, fields, ["a", "b", "c"], {}, [], shards)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_reading_ahead_keeps_order_and_content(tmp_path):
    """Batches read ahead by threads are those of the order, all of them, also where the order ends."""
    dataset = PackedDataset(write_dataset(tmp_path / "data"))
    order = [np.array([i % 20, (3 * i) % 20]) for i in range(30)]
    for threads in (0, 1, 3):
        batches = list(read_ahead(dataset, order, threads=threads))
        assert [b.index.tolist() for b in batches] == [i.tolist() for i in order]
        for indices, batch in zip(order, batches):
            assert torch.equal(batch.moments, dataset[indices].moments)


def test_reading_ahead_raises_and_stops(tmp_path):
    """An error in a thread comes out at its batch; a reader that is left behind ends its threads."""
    dataset = PackedDataset(write_dataset(tmp_path / "data"))
    stream = read_ahead(dataset, [np.array([1]), np.array([99])])
    assert next(stream).index.tolist() == [1]
    with pytest.raises(IndexError, match="99"):
        next(stream)
    before = threading.active_count()
    endless = read_ahead(dataset, StepSampler(20, 4, seed=0), threads=3)
    next(endless)
    assert threading.active_count() > before
    endless.close()
    assert threading.active_count() == before


def test_memory_is_used_again_but_never_while_it_is_held(tmp_path):
    """A batch that is referred to, even in part, keeps its values; other memory is used again."""
    folder = tmp_path / "data"
    folder.mkdir()
    arrays = {
        "label": np.arange(64) % 3,
        "pixels": np.arange(64, dtype=np.uint8)[:, None, None, None].repeat(64 * 64 * 3, 1),
    }
    arrays["pixels"] = arrays["pixels"].reshape(64, 64, 64, 3)
    write_manifest(folder, _manifest(arrays, [write_shard(folder, 0, arrays)], 64))
    dataset = PackedDataset(folder)
    held, places = [], set()
    for step in range(40):
        batch = dataset[[step, step + 1]]
        places.add(batch.pixels.data_ptr())
        if step < 4:
            held.append(batch.pixels[1])
        del batch
    assert [int(part[0, 0, 0]) for part in held] == [1, 2, 3, 4]
    assert len(places) <= 6  # 4 are held, the others take turns


def test_what_is_not_in_memory_is_asked_for_at_once(tmp_path, monkeypatch):
    """After one slow record the kernel is told of all that follow, once; quick ones tell nothing; same values."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    arrays = {"label": np.arange(6) % 3, "pixels": pixels}
    write_manifest(tmp_path, _manifest(arrays, [write_shard(tmp_path, 0, arrays)], 6))
    dataset, order, told = PackedDataset(tmp_path), [5, 1, 4, 0], []
    for tell in (memory._will_need, lambda records: told.append(np.concatenate(records))):
        monkeypatch.setattr(memory, "_will_need", tell)
        for seconds in (0.0, 1.0):
            clock = itertools.count()
            monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda c=clock, s=seconds: next(c) * s))
            assert np.array_equal(dataset[order].pixels, pixels[order])
    assert len(told) == 1 and np.array_equal(told[0], pixels[order[1:]])


def test_no_descriptors_and_little_memory_per_file(tmp_path):
    """Hundreds of files open at once take no file descriptors, and an epoch no memory of the process's own."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (300, 4, 64, 64, 3), np.uint8)
    shards = [write_shard(folder, k, {"label": np.arange(4) % 3, "pixels": rows[k]}) for k in range(300)]
    write_manifest(folder, _manifest({"label": np.arange(4), "pixels": rows[0]}, shards, 1200))
    dataset = PackedDataset(folder)
    dataset[range(0, 1200, 4)]
    descriptors, memory = len(os.listdir("/proc/self/fd")), _own_memory()
    for _ in range(10):
        dataset[np.random.default_rng(1).permutation(1200)[:300]]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert _own_memory() - memory < 40  # a buffer of 3.7 MB or two, and what Python fancies
    assert np.array_equal(dataset[[1199]].pixels[0], rows[299, 3])


def _own_memory():
    """MiB of this process, without mapped files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**10
