"""What packing says, and what it refuses, each in one sentence."""

import errno
import os

import numpy as np
import pytest
import torch

from config import UserError
from dataset import PackedDataset
from packed.format import read_manifest
from preprocessing import messages, pack
from tests.packs import IMAGES, content, flags, records, write_folder, write_zip

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Images smaller than the crop are enlarged, as in the published code, counted and reported once."""
    pack.main(flags(toys, tmp_path / "out", "--resolution", "12"))
    assert read_manifest(tmp_path / "out").source["enlarged"] == 13
    assert capsys.readouterr().out.count("13 images were smaller than the crop") == 1


def test_full_disk(toys, tmp_path, monkeypatch):
    """Too little space is reported before the start; a disk that fills up on the way leaves finished shards intact."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free"):
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
        (("--enc-type", "resnet18"), "does not give a token for each patch"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--source", "nowhere"), "--source nowhere: no such file"),
        (("--classes", "nowhere"), "--classes nowhere: no such file"),
        (("--classes", "tests"), "--classes tests: is not a file"),
        (("--max-pixels", "60"), "more than --max-pixels 60"),
    ],
)
def test_mistakes_in_flags(toys, tmp_path, monkeypatch, more, message):
    """Each mistake is one sentence that names the flag, and no empty folder is left behind."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((UserError, FileNotFoundError, ValueError), match=message):
        pack.main(flags(toys, tmp_path / "new" / "out", *more))
    assert not (tmp_path / "new").exists() or list((tmp_path / "new" / "out").iterdir())


def test_float32_on_a_gpu_is_called_what_it_is(monkeypatch):
    """Convolutions take TF32 by torch's default; bf16 and a CPU have none of it."""
    for allowed, said in ((True, "fp32 (convolutions in TF32)"), (False, "fp32")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        machines = [(dtype, torch.device(device)) for dtype in ("fp32", "bf16") for device in ("cuda", "cpu")]
        assert [messages._arithmetic(*one) for one in machines] == [said, "fp32", "bf16", "bf16"]


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
    order = ["listing the images", "packing 15", "first shard: ", "for the other 9 images", "15 images of 15"]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and text.count("first shard") == 1
    assert "packing: 100%" in captured.err and "15/15" in captured.err


def test_forecast():
    """Eight processes that have as much to do each; the first batch does not count, as it warms the device up."""
    from preprocessing.messages import forecast

    text = forecast(done=2048, seconds=10.24, remaining=158_000, world=8)
    assert text.startswith("first shard: 1,600.0 images/s; about 13 min ") and text.endswith(
        "the other 1,264,000 images"
    )


def test_folders_without_permission(toys, tmp_path, monkeypatch):
    """A source that cannot be read and an --out that cannot be written are one sentence, and nothing is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: the folder cannot be made \(.*/file is a file\)"):
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
    assert not (tmp_path / "out").exists()


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


def test_values_that_cannot_be_stored_are_refused(toys, tmp_path, monkeypatch):
    """A network that gives NaN for an image is reported with the image's name."""
    from models.autoencoder import Autoencoder

    encode = Autoencoder.encode

    def spoiled(self, pixels):
        moments = encode(self, pixels)
        moments[2:3] = float("nan")
        return moments

    monkeypatch.setattr(Autoencoder, "encode", spoiled)
    with pytest.raises(UserError, match=r"image ant/2\.png: its moments are not finite"):
        pack.main(flags(toys, tmp_path / "out"))
