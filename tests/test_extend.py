"""Extending a finished dataset by the images that its source has gained."""

import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

from config import UserError
from dataset import PackedDataset, decode_moments
from packed.format import read_manifest
from preprocessing import pack
from tests.packs import (
    IMAGES,
    content,
    encoded,
    flags,
    flip,
    killed,
    noise,
    records,
    torchrun,
    write_folder,
    write_table,
    write_tar,
)
from tests.tiny import write_encoder, write_vae

pytestmark = pytest.mark.usefixtures("one_thread")
# a new class between old ones, one after them, and more images of an old class that sort before, between and after
NEW = {
    f"{name}.png": encoded(noise(9 + i, 11))
    for i, name in enumerate(("bat/0", "bat/1", "bees/00", "bees/2b", "bees/9", "zebra/0", "zebra/1", "zebra/2"))
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory, one_thread):
    """A VAE and an encoder; images that have grown; `packed` before they grew, `extended` after, `at_once` all together."""
    folder = tmp_path_factory.mktemp("toys")
    write_vae(folder / "vae")
    write_encoder(folder / "encoder")
    write_folder(folder / "images", IMAGES)
    pack.main(flags(folder, folder / "packed"))
    shutil.copytree(folder / "packed", folder / "extended")
    write_folder(folder / "images", NEW)
    pack.main(flags(folder, folder / "extended", "--extend"))
    pack.main(flags(folder, folder / "at_once"))
    return folder


def by_image(folder):
    """(crop, class name) => moments and tokens of each record."""
    dataset = PackedDataset(folder)
    batch = dataset[range(len(dataset))]
    keys = [
        (image.numpy().tobytes(), dataset.manifest.classes[label]) for image, label in zip(batch.pixels, batch.label)
    ]
    values = zip(decode_moments(batch.moments).numpy(), batch.class_token[0].numpy(), batch.patch_tokens[0].numpy())
    found = dict(zip(keys, values))
    assert len(found) == len(dataset)
    return found


def test_the_same_records_as_packed_at_once(toys):
    """Whatever the order: the same crops in the same classes, with the same moments and tokens up to rounding."""
    extended, at_once = by_image(toys / "extended"), by_image(toys / "at_once")
    assert extended.keys() == at_once.keys() and len(extended) == 23
    for key, values in extended.items():
        for ours, theirs in zip(values, at_once[key], strict=True):
            assert np.allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    means, names = {}, {}
    for name in ("extended", "at_once"):
        manifest = read_manifest(toys / name)
        means[name] = np.load(toys / name / manifest.class_means, allow_pickle=False)
        names[name] = manifest.classes
    assert names["extended"] == ["ant", "bees", "c", "bat", "zebra"]
    order = [names["at_once"].index(name) for name in names["extended"]]
    assert np.allclose(means["extended"], means["at_once"][order], atol=1e-3)


def test_old_records_keep_their_numbers_and_their_bytes(toys):
    """Every file of the old dataset but the plan and the manifest is as it was; new records follow, by class and name."""
    before, after = content(toys / "packed"), content(toys / "extended")
    assert {name for name in before if after[name] != before[name]} == {"packing.json", "dataset.json"}
    old, new = PackedDataset(toys / "packed"), PackedDataset(toys / "extended")
    assert (
        new.labels()[:15].tolist() == old.labels().tolist()
        and new.labels()[15:].tolist() == [1] * 3 + [3] * 2 + [4] * 3
    )
    assert new.manifest.shards[:3] == old.manifest.shards and [s["count"] for s in new.manifest.shards[3:]] == [6, 2]
    assert new.manifest.source["extensions"] == [8] and new.manifest.source["images"] == 23
    assert "extensions" not in old.manifest.source and b"extends" not in before["packing.json"]


def test_what_is_said(toys, tmp_path, capsys):
    """New classes and their labels before it starts; afterwards nothing is left to add, and --extend is pointed at."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    pack.main(flags(toys, out, "--extend"))
    text = capsys.readouterr().out
    assert "packing 8 images of folder" in text and "new classes, with labels from 3 on: bat, zebra" in text
    assert "3 classes: bees (3), bat (2), zebra (3)" in text
    assert "3 of 5 shards are written already" in text and "in 2 shards" in text
    before = content(out)
    pack.main(flags(toys, out, "--extend"))
    assert "are packed already (23); nothing to add" in capsys.readouterr().out
    pack.main(flags(toys, out))
    assert "--extend adds images that were added to" in capsys.readouterr().out and content(out) == before


def test_extended_twice(toys, tmp_path):
    """A second extension follows the first; each has its own list of images, and all verify."""
    images, out = tmp_path / "images", shutil.copytree(toys / "packed", tmp_path / "out")
    write_folder(images, IMAGES)
    arguments = flags(toys, tmp_path / "out", source=images)
    shutil.rmtree(out)
    pack.main(arguments)
    for name in ("bees/7.png", "deer/0.png"):
        write_folder(images, {name: NEW["bees/9.png"]})
        pack.main([*arguments, "--extend"])
    dataset = PackedDataset(out)
    assert dataset.labels().tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [1, 3]
    assert dataset.manifest.classes == ["ant", "bees", "c", "deer"] and dataset.manifest.source["extensions"] == [1, 1]
    pack.main(["--out", str(out), "--verify"])


@pytest.mark.parametrize("when", [0, 1, 2, 4, 5, 26, 44, 46, 48, 49, 50])
def test_killed_extension(toys, tmp_path, when):
    """kill -9 at a write of the list, the plan, a shard, the means, the manifest: the old dataset can be read until the new
    one is whole, and the same command finishes it, to the byte."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    arguments = flags(toys, out, "--extend")
    old = PackedDataset(toys / "packed").manifest
    assert killed(arguments, tmp_path / "log", when)
    assert PackedDataset(out).manifest == old
    assert {name: data for name, data in content(toys / "packed").items() if name != "packing.json"}.items() <= content(
        out
    ).items()
    pack.main(arguments)
    assert content(out) == content(toys / "extended")


def test_the_last_of_these_writes_is_that_of_the_manifest(toys, tmp_path):
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    assert not killed(flags(toys, out, "--extend"), tmp_path / "log", 54)


@pytest.mark.parametrize("again", [(), ("--repair",)])
def test_an_unfinished_extension_is_finished_by_repair_too(toys, tmp_path, capsys, again):
    """--verify says that it is not finished; the packing command without --extend finishes it as well."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    assert killed(flags(toys, out, "--extend"), tmp_path / "log", 20)
    with pytest.raises(UserError, match=r"broken files, the first is dataset\.json"):
        pack.main(["--out", str(out), "--verify"])
    assert "its extension is not finished: give the packing command again" in capsys.readouterr().out
    pack.main(flags(toys, out, *again))
    assert content(out) == content(toys / "extended")


def test_repair_of_an_unfinished_extension_keeps_the_old_dataset(toys, tmp_path):
    """Until the extension is whole, the manifest of the old dataset stays; it goes if an old shard is broken."""
    from preprocessing import verify

    out = shutil.copytree(toys / "packed", tmp_path / "out")
    assert killed(flags(toys, out, "--extend"), tmp_path / "log", 20)
    verify.repair(out)
    assert len(PackedDataset(out)) == 15
    flip(out / "pixels-00001.npy", -5)
    verify.repair(out)
    assert not (out / "dataset.json").exists()
    pack.main(flags(toys, out))
    assert content(out) == content(toys / "extended")


@pytest.mark.parametrize(
    "name",
    [
        "moments-00001.npy",
        "pixels-00004.npy",
        "crc-00003.npy",
        "shard-00002.json",
        "shard-00003.json",
        "packing.json",
        "index.npz",
        "index-00001.npz",
        "class_means-00001.npy",
        "dataset.json",
    ],
)
def test_a_flipped_byte_is_found_and_repaired(toys, tmp_path, capsys, name):
    """In any file of either part; --repair restores the folder to the byte."""
    out = shutil.copytree(toys / "extended", tmp_path / "out")
    flip(out / name, -5)
    with pytest.raises(UserError, match="broken files, the first is " + name.replace(".", r"\.")):
        pack.main(["--out", str(out), "--verify"])
    pack.main(flags(toys, out, "--repair"))
    assert content(out) == content(toys / "extended")
    pack.main(["--out", str(out), "--verify"])
    assert "every checksum is right" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_extend(toys, tmp_path):
    """torchrun with two processes: every file is the same."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    done = torchrun(2, flags(toys, out, "--extend"))
    assert done.returncode == 0, done.stderr
    assert content(out) == content(toys / "extended")


# ----------------------------------------------------------------------------------------------------------- refusals


def remove(images):
    (images / "ant/0.png").unlink()


def change(images):
    (images / "ant/0.png").write_bytes(encoded(noise(30, 30)))
    os.utime(images / "ant/0.png", (2e9, 2e9))


def move(images):
    """A folder around the classes becomes a class of its own."""
    (images / "all").mkdir()
    for name in ("ant", "bees", "c"):
        (images / name).rename(images / "all" / name)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove, r"images that are packed already are gone \(1, such as ant/0\.png\)"),
        (change, r"already were changed after packing \(1, such as ant/0\.png\)"),
        (move, r"images that are packed already are gone \(15, such as ant/0\.png\)"),
    ],
)
def test_old_images_must_be_as_they_were(toys, tmp_path, harm, message):
    """Otherwise it is refused before anything is written."""
    images = write_folder(tmp_path / "images", IMAGES)
    arguments = flags(toys, tmp_path / "out", source=images)
    pack.main(arguments)
    before = content(tmp_path / "out")
    harm(images)
    write_folder(images, {"deer/0.png": NEW["bat/0.png"], "elk/0.png": NEW["bat/1.png"]})
    with pytest.raises(UserError, match=message):
        pack.main([*arguments, "--extend"])
    assert content(tmp_path / "out") == before


def test_a_zip_that_was_appended_to(toys, tmp_path):
    """Members that keep their places are the old images; a zip that was written anew is refused."""
    source, out = tmp_path / "images.zip", tmp_path / "out"
    for images in (IMAGES, NEW):
        with zipfile.ZipFile(source, "a") as archive:
            for name, data in images.items():
                archive.writestr(name, data)
        if images is IMAGES:
            pack.main(flags(toys, out, source=source))
    pack.main([*flags(toys, out, source=source), "--extend"])
    assert by_image(out).keys() == by_image(toys / "extended").keys()
    other = tmp_path / "other"
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
    pack.main(flags(toys, other, source=source))
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in {**NEW, **IMAGES}.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=r"already were changed after packing \(15, "):
        pack.main([*flags(toys, other, source=source), "--extend"])


def test_a_tar_and_tables_that_grew(toys, tmp_path):
    """Members that `tar -r` appends; a parquet file that was added, even one that comes first in the order of names."""
    source = write_tar(tmp_path / "images.tar", IMAGES)
    pack.main(flags(toys, tmp_path / "tar", source=source))
    with tarfile.open(source, "a") as archive:
        for name, data in NEW.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pack.main([*flags(toys, tmp_path / "tar", source=source), "--extend"])
    assert by_image(tmp_path / "tar").keys() == by_image(toys / "extended").keys()

    source, out = write_table(tmp_path / "tables", "parquet"), tmp_path / "out"
    pack.main(flags(toys, out, source=source))
    before = records(out)
    shutil.copy(source / "train-00001.parquet", source / "train--1.parquet")
    pack.main([*flags(toys, out, source=source), "--extend"])
    after = records(out)
    old = len(before["label"])
    assert len(after["label"]) == old + (old - 5) and all(
        np.array_equal(after[name][:old], before[name]) for name in before
    )
    assert np.array_equal(after["pixels"][old:], before["pixels"][5:])
    for file in ("index.npz", "index-00001.npz"):  # each list can be made again from the source
        whole = content(out)
        (out / file).unlink()
        pack.main(flags(toys, out, "--repair", source=source))
        assert content(out) == whole


def test_a_class_file_may_grow_at_its_end(toys, tmp_path):
    """--classes keeps the labels: its first lines must stay."""
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("zebra\nant\n")
    arguments = flags(toys, out, "--classes", str(names))
    pack.main(arguments)
    names.write_text("zebra\nbat\nant\n")
    with pytest.raises(UserError, match=r"names\.txt: must begin with the 2 classes that are packed"):
        pack.main([*arguments, "--extend"])
    names.write_text("zebra\nant\nbat\n")
    with pytest.raises(UserError, match="was begun with --classes"):
        pack.main(arguments)
    pack.main([*arguments, "--extend"])
    manifest = read_manifest(out)
    assert manifest.classes == ["zebra", "ant", "bat"] and manifest.count == 10 and PackedDataset(out).labels()[-1] == 2


def test_only_a_finished_dataset_is_extended(toys, tmp_path):
    with pytest.raises(UserError, match=r"--extend: .* holds no finished dataset to add images to"):
        pack.main(flags(toys, tmp_path / "none", "--extend"))
    assert not (tmp_path / "none").exists()
    assert killed(flags(toys, tmp_path / "out"), tmp_path / "log", 20)
    with pytest.raises(UserError, match="without --extend first"):
        pack.main(flags(toys, tmp_path / "out", "--extend"))
    with pytest.raises(UserError, match="--extend goes with neither --verify nor --repair"):
        pack.main(flags(toys, toys / "extended", "--extend", "--repair"))
    with pytest.raises(UserError, match="was begun with --resolution 8, now it is 16"):
        pack.main(flags(toys, toys / "extended", "--extend", "--resolution", "16"))
