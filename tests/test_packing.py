"""Packing: the same records however it is run or interrupted."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.lock import FolderLock
from config import UserError
from dataset import PackedDataset, decode_moments
from models.autoencoder import load_autoencoder
from models.encoder import load_encoder
from packed.format import read_manifest
from packed.writer import ShardWriter
from preprocessing import pack, packing
from preprocessing.writer import BackgroundWriter
from tests.packs import (
    IMAGES,
    SHARED,
    content,
    flags,
    killed,
    noise,
    records,
    torchrun,
    write_folder,
    write_published,
)
from tests.tiny import write_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def test_records(toys):
    """Records are crop, moments, tokens and label of the images, in order, and the manifest says so."""
    dataset = PackedDataset(toys / "packed")
    manifest = dataset.manifest
    assert manifest.count == 15 and manifest.classes == ["ant", "bees", "c"] and len(manifest.shards) == 3
    assert manifest.resolution == 8 and manifest.encoders[0].grid == 2 and manifest.vae["factor"] == 2
    batch = dataset[range(15)]
    assert batch.label.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    pixels = batch.pixels.permute(0, 3, 1, 2)
    moments = load_autoencoder(str(toys / "vae")).encode(pixels)
    tokens = load_encoder(str(toys / "encoder"), 2)(pixels)
    assert torch.allclose(decode_moments(batch.moments), moments, rtol=1e-3, atol=1e-3)
    assert torch.allclose(batch.class_token[0].float(), tokens.class_token, atol=2e-3)
    assert torch.allclose(batch.patch_tokens[0].float(), tokens.patch_tokens, atol=2e-3)
    source = manifest.source
    assert source["packed"] == 15 and source["enlarged"] == 0 and source["skipped"] == []
    error = (decode_moments(batch.moments) - moments).abs()[:, :4].max().item()
    assert source["rounding"]["mean"] == pytest.approx(error, rel=0.1)


def test_class_means(toys):
    """class_means.npy holds the mean class token of each class."""
    manifest = read_manifest(toys / "packed")
    means = np.load(toys / "packed" / manifest.class_means, allow_pickle=False)
    tokens = records(toys / "packed")["class_token.0"].astype(np.float64).reshape(3, 5, 16).mean(1)
    assert means.dtype == np.float32 and np.allclose(means, tokens, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        (("--no-pixels",), {"moments", "label", "class_token.0", "patch_tokens.0"}),
        (("--no-tokens",), {"moments", "label", "pixels"}),
        (("--no-tokens", "--no-pixels"), {"moments", "label"}),
    ],
    ids=["tokens", "pixels", "neither"],
)
def test_what_is_stored(toys, tmp_path, more, fields):
    """Tokens, pixels, both or neither, by flags; what is stored is the same."""
    pack.main(flags(toys, tmp_path / "out", *more))
    whole, part = records(toys / "packed"), records(tmp_path / "out")
    assert set(part) == fields and all(np.array_equal(part[name], whole[name]) for name in part)


def test_two_encoders(toys, tmp_path):
    """Several encoders are stored one beside the other."""
    write_encoder(tmp_path / "wide", dim=24)
    arguments = flags(toys, tmp_path / "out")
    arguments.insert(arguments.index("--resolution"), str(tmp_path / "wide"))
    pack.main(arguments)
    batch = PackedDataset(tmp_path / "out")[[3]]
    assert [t.shape for t in batch.class_token] == [(1, 16), (1, 24)]
    assert [t.shape for t in batch.patch_tokens] == [(1, 4, 16), (1, 4, 24)]


def test_published_layout_is_taken_over(toys, tmp_path):
    """Moments of the published layout are stored as they are, without a VAE; crops and labels too."""
    root = write_published(tmp_path / "data")
    arguments = [
        "--source",
        str(root),
        "--out",
        str(tmp_path / "out"),
        "--resolution",
        "16",
        "--vae",
        "mse",
        "--no-tokens",
    ]
    pack.main([*arguments, "--pixels", "--num-workers", "0"])
    batch = PackedDataset(tmp_path / "out")[range(4)]
    for i, moments in enumerate(decode_moments(batch.moments).numpy()):
        assert np.allclose(moments, np.load(root / f"vae-sd/00000/img-mean-std-{i:08d}.npy"), rtol=1e-3)
    assert batch.label.tolist() == [0, 1, 0, 1] and np.array_equal(batch.pixels[1], np.asarray(noise(16, 16)))


def test_workers_and_batches_in_flight_change_nothing(toys, tmp_path):
    """Reading processes give the same bytes."""
    pack.main([*flags(toys, tmp_path / "out"), "--num-workers", "2"])
    assert content(tmp_path / "out") == content(toys / "packed")


def test_two_processes_write_the_same_bytes(toys, tmp_path):
    """torchrun with two processes, started as a script: every file is the same."""
    done = torchrun(2, flags(toys, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(toys / "packed")


@pytest.mark.parametrize("when", [0, 2, 4, 7, 27, 63, 65])
def test_killed_packing_is_finished_by_the_same_command(toys, tmp_path, when):
    """kill -9 at a write of the index, the plan, a shard, an entry, the manifest: the result is that of an unbroken run."""
    assert killed(flags(toys, tmp_path / "out"), tmp_path / "log", when)
    pack.main(flags(toys, tmp_path / "out"))
    assert content(tmp_path / "out") == content(toys / "packed")


@pytest.mark.slow
def test_kill_sweep(toys, tmp_path):
    """kill -9 at every write to the disk, and then at random instants one after the other, with reading processes."""
    writes = 0
    while killed(flags(toys, tmp_path / f"at{writes}"), tmp_path / "log", writes):
        assert not (tmp_path / f"at{writes}" / "dataset.json").exists() or writes > 40
        pack.main(flags(toys, tmp_path / f"at{writes}"))
        assert content(tmp_path / f"at{writes}") == content(toys / "packed"), writes
        writes += 1
    assert writes > 40  # 3 shards of 5 fields, checksums and an entry, and index, plan, means, manifest: twice each
    rng = random.Random(0)
    kills = 0
    for trial in range(200):  # 25 folders, and as many more as it takes for 20 kills to land before the work is done
        if trial >= 25 and kills >= 20:
            break
        out = tmp_path / f"random{trial}"
        for _ in range(3):
            workers = ("--num-workers", str(trial % 3))
            kills += killed([*flags(toys, out), *workers], tmp_path / "log", rng.uniform(0.0, 0.2))
        pack.main(flags(toys, out))
        assert content(out) == content(toys / "packed"), trial
    print(f"{kills} random kills landed in {trial} folders")
    assert kills >= 20


@pytest.mark.slow
def test_killed_with_two_processes(toys, tmp_path):
    """Two processes killed together, finished by one and by two: the same bytes."""
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(random.randint(20000, 60000)),
        }
        # without torchrun, which gives each process a session of its own and, killed, leaves them running
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "preprocessing.pack", *flags(toys, out)],
                cwd=ROOT,
                env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in "01"
        ]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(out.glob("shard-*.json")):
            time.sleep(0.001)
        for process in ranks:
            process.kill()
            process.wait()
        assert list(out.glob("shard-*.json"))
        if world == 1:
            pack.main(flags(toys, out))
        else:
            assert torchrun(2, flags(toys, out)).returncode == 0
        assert content(out) == content(toys / "packed")


def test_two_packings_of_one_folder(toys, tmp_path, capsys):
    """While one writes, another is refused by the name of the first; a finished folder can be asked about at any time."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    lock = FolderLock(out, packing.LOCK, "")
    pack.main(flags(toys, out))
    assert "packed already" in capsys.readouterr().out
    (out / "dataset.json").unlink()
    for more in ((), ("--repair",)):
        with pytest.raises(UserError, match=f"out is in use by process {os.getpid()} on .*; wait until it has ended"):
            pack.main(flags(toys, out, *more))
    lock.close()
    pack.main(flags(toys, out))
    assert content(out) == content(toys / "packed")


def test_nothing_is_written_after_an_error(tmp_path, monkeypatch):
    """Batches that wait behind one that failed are not appended: the shard would lack records and still look whole."""
    real, calls = ShardWriter.append, []

    def append(self, arrays):
        calls.append(len(arrays["label"]))
        if len(calls) == 2:
            time.sleep(0.2)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, arrays)

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(UserError, match="the disk is full at .*finished shards are kept"):
        with BackgroundWriter(tmp_path) as writer:
            for size, notes in ((1, None), (2, None), (3, None), (4, {"plan": ""})):
                writer.put(0, {"label": np.arange(size)}, notes)
    assert calls == [1, 2] and not list(tmp_path.iterdir())


def test_finished_packing_is_left_alone(toys, capsys):
    """The same command again reads no image and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in (toys / "packed").iterdir()}
    pack.main(flags(toys, toys / "packed"))
    assert "packed already: 15 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (toys / "packed").iterdir()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch-size", "5"), "was begun with --batch-size 4, now it is 5"),
        (("--resolution", "16"), "was begun with --resolution 8, now it is 16"),
        (("--no-tokens",), "was begun with --enc-type"),
    ],
)
def test_other_flags_are_refused(toys, more, message):
    """One dataset is of one kind: a flag that would change records is named."""
    with pytest.raises(UserError, match=message):
        pack.main(flags(toys, toys / "packed", *more))


def test_changed_weights_and_images_are_refused(toys, tmp_path):
    """Networks or images that are not those of the first start are told."""
    out = tmp_path / "out"
    shutil.copytree(toys / "vae", tmp_path / "vae")
    arguments = flags(toys, out, "--vae", str(tmp_path / "vae"), source=write_folder(tmp_path / "images", IMAGES))
    assert killed(arguments, tmp_path / "log", 20)
    torch.manual_seed(7)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    torch.nn.init.normal_(vae.quant_conv.weight)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="--vae: its weights are not those"):
        pack.main(arguments)
    (out / "index.npz").unlink()
    (tmp_path / "images/ant/0.png").unlink()
    with pytest.raises(UserError, match="its images are not those"):
        pack.main(arguments)


@pytest.mark.slow
def test_imagenet_files_with_one_and_two_processes(toys, tmp_path):
    """48 ImageNet files at 256 pixels, in latents of a small VAE: the same bytes with one and with two processes."""
    source = SHARED / "data" / "imagenet-samples"
    if not source.is_dir():
        pytest.skip("the ImageNet samples are not here")
    one, two = (flags(toys, tmp_path / name, "--resolution", "256", source=source) for name in "ab")
    pack.main(one)
    assert torchrun(2, two).returncode == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert read_manifest(tmp_path / "a").count == 48


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10-test.zip", "cifar10-train.zip"])
def test_cifar_with_one_and_two_processes(toys, tmp_path, name):
    """The CIFAR-10 zips: the same bytes with one and with two processes, ten classes of equal size."""
    source = SHARED / "data" / name
    if not source.is_file():
        pytest.skip("CIFAR-10 is not here")
    more = ("--resolution", "32", "--shard-size", "4096", "--batch-size", "256", "--no-tokens")
    for out, world in ((tmp_path / "a", 1), (tmp_path / "b", 2)):
        assert torchrun(world, flags(toys, out, *more, source=source)).returncode == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    counts = np.bincount(PackedDataset(tmp_path / "a").labels())
    assert len(counts) == 10 and len(set(counts.tolist())) == 1


@pytest.mark.slow
def test_an_epoch_of_training_on_cifar(toys, tmp_path):
    """CIFAR-10, packed with tokens, trains for one epoch of 100 steps (benchmarks/epoch.py measures the data wait)."""
    source = SHARED / "data" / "cifar10-test.zip"
    if not source.is_file():
        pytest.skip("CIFAR-10 is not here")
    pack.main(
        flags(toys, tmp_path / "cifar", "--resolution", "32", "--batch-size", "256", "--no-pixels", source=source)
    )
    train.main(
        [
            "--data-dir",
            str(tmp_path / "cifar"),
            "--output-dir",
            str(tmp_path),
            "--exp-name",
            "run",
            "--model",
            "SiT-S/2",
            "--depth",
            "4",
            "--hidden-size",
            "128",
            "--num-heads",
            "4",
            "--encoder-depth",
            "2",
            "--projector-dim",
            "256",
            "--batch-size",
            "100",
            "--max-train-steps",
            "100",
            "--num-workers",
            "1",
            "--mixed-precision",
            "fp32",
            "--sampling-steps",
            "0",
            "--log-every",
            "50",
        ]
    )
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 100 and np.isfinite(last["loss"]) and 0 <= last["data_wait"] < 1
