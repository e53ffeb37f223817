"""Packing: the same records however it is run or interrupted, damage found and mended, mistakes told in one sentence."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import UserError
from dataset import PackedDataset, decode_moments
from models.autoencoder import load_autoencoder
from models.encoder import load_encoder
from packed.format import read_manifest
from preprocessing import pack
from tests import killable
from tests.test_preprocessing import encoded, noise, write_folder, write_published, write_zip
from tests.tiny import write_encoder, write_vae

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
IMAGES = {
    f"{folder}/{i}.png": encoded(noise(8 + i, 9 + len(folder))) for folder in ("ant", "bees", "c") for i in range(5)
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with images, a VAE and an encoder, and one finished packing of them."""
    folder = tmp_path_factory.mktemp("toys")
    write_folder(folder / "images", IMAGES)
    write_vae(folder / "vae")
    write_encoder(folder / "encoder")
    pack.main(flags(folder, folder / "packed"))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """The last bit of a convolution depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def records(folder):
    """Everything a dataset holds, in order: field => array, without what depends on the division into shards."""
    dataset = PackedDataset(folder)
    shards = range(len(dataset.manifest.shards))
    return {name: np.concatenate([dataset.records(k, name) for k in shards]) for name in dataset.manifest.fields}


# ------------------------------------------------------------------------------------------------------------ records


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


# ------------------------------------------------------------------------------------------------------------ restart


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


# ------------------------------------------------------------------------------------------------- verify and repair


@pytest.mark.parametrize(
    "name",
    [
        "moments-00001.npy",
        "label-00000.npy",
        "pixels-00002.npy",
        "class_token.0-00001.npy",
        "patch_tokens.0-00000.npy",
        "crc-00001.npy",
        "shard-00002.json",
        "packing.json",
        "index.npz",
        "class_means.npy",
        "dataset.json",
    ],
)
def test_a_flipped_byte_is_found_and_mended(toys, tmp_path, capsys, name):
    """One changed byte in any kind of file is found by --verify, and --repair restores the folder to the byte."""
    out = tmp_path / "out"
    for place in ("last", "first"):
        shutil.copytree(toys / "packed", out, dirs_exist_ok=True)
        flip(out / name, -5 if place == "last" else 3)
        with pytest.raises(UserError, match="broken files, the first is " + name.replace(".", r"\.")):
            pack.main(["--out", str(out), "--verify"])
        assert name in capsys.readouterr().out
        pack.main(flags(toys, out, "--repair"))
        assert content(out) == content(toys / "packed")
    pack.main(["--out", str(out), "--verify"])
    assert "every checksum is right" in capsys.readouterr().out


def test_verify_names_the_record(toys, tmp_path, capsys):
    """A broken record is named by its number and its image; repair redoes its shard alone."""
    out = tmp_path / "out"
    shutil.copytree(toys / "packed", out)
    flip(out / "pixels-00001.npy", 128 + 2 * 192 + 7)
    with pytest.raises(UserError):
        pack.main(["--out", str(out), "--verify"])
    text = capsys.readouterr().out
    assert "pixels-00001.npy: 1 of 6 records do not match their checksums: record 8 (bees/3.png)" in text
    kept = (out / "pixels-00000.npy").stat().st_mtime_ns
    pack.main(flags(toys, out, "--repair"))
    assert (out / "pixels-00000.npy").stat().st_mtime_ns == kept


def test_verify_finds_what_is_missing_or_short(toys, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(toys / "packed", out)
    (out / "label-00000.npy").unlink()
    (out / "shard-00001.json").unlink()
    (out / "moments-00002.npy").write_bytes((out / "moments-00002.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="3 broken files"):
        pack.main(["--out", str(out), "--verify"])
    text = capsys.readouterr().out
    assert "label-00000.npy: is missing" in text and "never finished" in text and "truncated" in text
    pack.main(flags(toys, out, "--repair"))
    assert content(out) == content(toys / "packed")
    with pytest.raises(UserError, match="nothing was packed here"):
        pack.main(["--out", str(tmp_path), "--verify"])


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_a_corrupt_image_is_named(toys, tmp_path):
    """By default a corrupt image ends the packing with its name, and finished shards are kept; with --on-corrupt skip the
    same command leaves it out and lists it."""
    broken = dict(IMAGES) | {"c/1.png": IMAGES["c/1.png"][:60]}
    source, out = write_zip(tmp_path / "images.zip", broken), tmp_path / "out"
    with pytest.raises(UserError, match=r"image c/1\.png: truncated or corrupt"):
        pack.main(flags(toys, out, source=source))
    assert (out / "shard-00000.json").is_file() and not (out / "dataset.json").exists() and not list(out.glob("*.tmp"))
    pack.main(flags(toys, out, "--on-corrupt", "skip", source=source))
    manifest = read_manifest(out)
    assert manifest.count == 14 and [name for name, _ in manifest.source["skipped"]] == ["c/1.png"]
    whole, part = records(toys / "packed"), records(out)
    kept = [i for i, name in enumerate(sorted(IMAGES)) if name != "c/1.png"]
    assert np.array_equal(
        part["pixels"], whole["pixels"][kept]
    )  # batches differ in size from there on: pixels are exact
    pack.main(["--out", str(out), "--verify"])


def test_shards_without_a_record(toys, tmp_path):
    """A shard all of whose images are corrupt leaves no files and no record; without any image there is no dataset."""
    broken = {name: data if name < "bees/1" or name > "c/1.png" else b"" for name, data in sorted(IMAGES.items())}
    pack.main(flags(toys, tmp_path / "out", "--on-corrupt", "skip", source=write_folder(tmp_path / "a", broken)))
    dataset = PackedDataset(tmp_path / "out")
    assert len(dataset) == 9 and len(dataset.manifest.shards) == 2
    assert dataset[range(9)].label.tolist() == [0] * 5 + [1] + [2] * 3
    nothing = write_folder(tmp_path / "b", dict.fromkeys(IMAGES, b""))
    with pytest.raises(UserError, match=r"none of the 15 images could be read; the first, ant/0\.png: "):
        pack.main(flags(toys, tmp_path / "none", "--on-corrupt", "skip", source=nothing))


def test_enlarged_images_are_counted(toys, tmp_path, capsys):
    """Images smaller than the crop are enlarged, as in the published code, counted and told once."""
    pack.main(flags(toys, tmp_path / "out", "--resolution", "12"))
    assert read_manifest(tmp_path / "out").source["enlarged"] == 13
    assert capsys.readouterr().out.count("13 images were smaller than the crop") == 1


def test_full_disk(toys, tmp_path, monkeypatch):
    """Too little room is told before the start; a disk that fills up on the way leaves finished shards intact."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(UserError, match=r"GiB are needed and 0\.0 GiB are free"):
            pack.main(flags(toys, out))
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 24:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="the disk is full"):
            pack.main(flags(toys, out))
    assert (out / "shard-00000.json").is_file()
    pack.main(flags(toys, out))
    assert content(out) == content(toys / "packed")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--resolution", "10"), "must be a multiple of 4"),
        (("--vae", "nowhere"), "nowhere"),
        (("--enc-type", "resnet18"), "not a ViT with a class token"),
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--source", "nowhere"), "--source nowhere: no such file"),
        (("--classes", "nowhere"), "--classes nowhere: no such file"),
        (("--max-pixels", "60"), "more than --max-pixels 60"),
    ],
)
def test_mistakes_in_flags(toys, tmp_path, monkeypatch, more, message):
    """Each mistake is one sentence that names the flag."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((UserError, FileNotFoundError, ValueError), match=message):
        pack.main(flags(toys, tmp_path / "out", *more))


def test_what_is_said_before_and_during(toys, tmp_path, capsys, monkeypatch):
    """Images, classes, bytes per record and in all beside the free space before it starts; the time after the first shard;
    bars that end at 100 %."""
    import shutil as disk

    monkeypatch.setattr(disk, "disk_usage", lambda _: type("Usage", (), {"free": 3 * 2**30})())
    pack.main(flags(toys, tmp_path / "out"))
    captured = capsys.readouterr()
    text = captured.out
    assert f"packing 15 images of folder {toys / 'images'} into {tmp_path / 'out'}" in text
    assert "3 classes: ant (5), bees (5), c (5)" in text and "crop 8 x 8; VAE " in text and "fp32 on " in text
    for name, array in records(tmp_path / "out").items():
        assert f"{name}: " in text and f"{array[0].nbytes:,} bytes per record" in text, name
    written = sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*-0000?.npy") if not path.name.startswith("crc")
    )
    assert f"to write: {written / 1024:.1f} KiB in 3 shards; 3.0 GiB are free" in text
    order = ["listing the images", "packing 15", "first shard: ", "(h:mm:ss) for the other 9 images", "15 images of 15"]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and text.count("first shard") == 1
    assert "packing: 100%" in captured.err and "15/15" in captured.err


def test_forecast():
    """Eight processes that have as much to do each; the first batch does not count, as it warms the device up."""
    from preprocessing.messages import duration, forecast

    text = forecast(done=2048, seconds=10.24, remaining=158_000, world=8)
    assert text.startswith("first shard: 1,600.0 images/s; about 0:13:10 ") and text.endswith(
        "the other 1,264,000 images"
    )
    assert duration(100_000) == "1 day, 3:46:40"


def test_folders_without_permission(toys, tmp_path, monkeypatch):
    """A source that cannot be read and an --out that cannot be written are one sentence, and nothing is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: the folder cannot be made \(Not a directory\)"):
        pack.main(flags(toys, tmp_path / "file" / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(UserError, match=r"--out .*out: the folder is read-only"):
            pack.main(flags(toys, tmp_path / "out"))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("bees"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuse)
        with pytest.raises(UserError, match=r"--source .*images: .*bees cannot be read \(Permission denied\)"):
            pack.main(flags(toys, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--input", "--source"),
        ("--dest", "--out"),
        ("--image-size", "--resolution"),
        ("--bs", "--batch-size"),
        ("--workers", "--num-workers"),
    ],
)
def test_flags_of_other_projects(flag, ours):
    with pytest.raises(UserError, match=f"unknown argument '{flag}': here it is '{ours}'"):
        pack.main(["--out", "nowhere", flag, "5"])


def test_examples_of_the_help_can_be_given():
    from config import parse
    from preprocessing import describe

    for module, settings in ((pack, pack.PackConfig), (describe, describe.DescribeConfig)):
        for example in module.EXAMPLES:
            words = example.split()
            parse(
                settings,
                "",
                words[next(i for i, word in enumerate(words) if word.startswith("--") and "=" not in word) :],
            )


def test_out_that_is_something_else(toys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pack.main(flags(toys, tmp_path / "file"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="was not packed here"):
        pack.main(flags(toys, tmp_path / "foreign"))
    with pytest.raises(UserError, match="--source is required"):
        pack.main(["--out", str(tmp_path / "out")])


def test_values_that_cannot_be_stored_are_told(toys, tmp_path, monkeypatch):
    """A network that gives NaN for an image is told with the image's name."""
    from models.autoencoder import Autoencoder

    encode = Autoencoder.encode

    def spoiled(self, pixels):
        moments = encode(self, pixels)
        moments[2:3] = float("nan")
        return moments

    monkeypatch.setattr(Autoencoder, "encode", spoiled)
    with pytest.raises(UserError, match=r"image ant/2\.png: its moments are not finite"):
        pack.main(flags(toys, tmp_path / "out"))


def test_describe(toys, tmp_path, capsys):
    """The description counts classes and storage and draws every image."""
    from PIL import Image

    from preprocessing import describe

    sheet = tmp_path / "sheet.png"
    describe.main(["--data-dir", str(toys / "packed"), "--images", "6", "--sheet", str(sheet)])
    text = capsys.readouterr().out
    assert "15 records, 3 classes, 8 pixels" in text and "2 c: 5" in text and "images a class: 5 to 5" in text
    assert "left out" in text and "class token of" in text
    with Image.open(sheet) as image:
        assert np.asarray(image).std() > 10


# ------------------------------------------------------------------------------------------------------- real images


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


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


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


def torchrun(world, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(_torchrun(world, arguments), cwd=ROOT, env=environment, capture_output=True, text=True)
