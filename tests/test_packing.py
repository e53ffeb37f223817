"""Packing: the same records however it is run or interrupted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import UserError
from dataset import PackedDataset, decode_moments
from models import acceleration
from models.autoencoder import load_autoencoder
from models.encoder import load_encoder
from packed.format import read_class_means, read_manifest
from preprocessing import encode, pack
from tests.packs import IMAGES, SHARED, content, flags, flip, noise, records, torchrun, write_folder, write_published
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
    assert np.array_equal(read_class_means(toys / "packed", manifest), means)


def test_changed_class_means_are_refused(toys, tmp_path):
    """Means that are missing or not those of the manifest are named; a dataset without class tokens has none."""
    manifest = read_manifest(toys / "packed")
    with pytest.raises(UserError, match=r"class_means\.npy is missing; repair"):
        read_class_means(tmp_path, manifest)
    np.save(tmp_path / "class_means.npy", np.zeros((3, 16), np.float32))
    with pytest.raises(UserError, match=r"class_means\.npy does not match its checksum"):
        read_class_means(tmp_path, manifest)
    assert read_class_means(tmp_path, replace(manifest, class_means=None)) is None


def test_flip_packs_each_image_and_its_mirror_image(toys, tmp_path, capsys):
    """The mirrored crop goes through the networks: its moments are not the mirrored moments. Repair names such a record."""
    out = tmp_path / "out"
    pack.main(flags(toys, out, "--flip"))
    assert "15 images of 15" in capsys.readouterr().out
    plain, both = records(toys / "packed"), records(out)
    assert all(np.allclose(both[name][::2], plain[name], atol=2e-3) for name in plain)
    assert np.array_equal(both["pixels"][1::2], plain["pixels"][:, :, ::-1]) and both["label"][1::2].tolist() == [
        *plain["label"]
    ]
    mirrored = torch.from_numpy(both["pixels"][1::2].copy()).permute(0, 3, 1, 2)
    moments = decode_moments(torch.from_numpy(both["moments"][1::2]))
    assert torch.allclose(moments, load_autoencoder(str(toys / "vae")).encode(mirrored), rtol=1e-3, atol=1e-3)
    assert not np.allclose(both["moments"][1::2], plain["moments"][..., ::-1], atol=0.1)
    flip(out / "pixels-00001.npy", 128 + 3 * 192 + 7)
    with pytest.raises(UserError, match="broken files"):
        pack.main(["--out", str(out), "--verify"])
    assert "record 15 (bees/2.png, mirrored)" in capsys.readouterr().out
    pack.main(flags(toys, out, "--flip", "--repair"))
    assert all(np.array_equal(records(out)[name], both[name]) for name in both)
    with pytest.raises(UserError, match=r"--flip: .* brings its latents"):
        source = write_published(tmp_path / "published")
        pack.main(flags(toys, tmp_path / "other", "--flip", "--vae", "ema", source=source))


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


def test_networks_are_compiled_for_many_images(toys, tmp_path, monkeypatch):
    lengthy = []
    monkeypatch.setattr(acceleration, "decide_compile", lambda asked, device, **more: lengthy.append(more["lengthy"]))
    for name, least in (("a", 15), ("b", 16)):
        monkeypatch.setattr(encode, "COMPILED_FROM", least)
        pack.main(flags(toys, tmp_path / name))
    assert lengthy == [True, False]


def test_two_processes_write_the_same_bytes(toys, tmp_path):
    """torchrun with two processes, started as a script where the locale knows ASCII alone: every file is the same."""
    source = write_folder(tmp_path / "images", {name.replace("c/", "é/"): data for name, data in IMAGES.items()})
    pack.main(flags(toys, tmp_path / "one", source=source))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = torchrun(2, flags(toys, tmp_path / "out", source=source), **locale)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert read_manifest(tmp_path / "out").classes[2] == "é"


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
