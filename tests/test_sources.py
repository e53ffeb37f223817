"""Every kind of source to pack, and what is refused."""

import json
import tarfile
import zipfile

import numpy as np
import pytest

from common.images import BadImage
from config import UserError
from preprocessing.index import Index
from preprocessing.read import Reader, crop_file
from preprocessing.sources import latent_name, list_source
from tests.packs import (
    LIMIT,
    SMALL,
    crops,
    encoded,
    noise,
    write_folder,
    write_published,
    write_table,
    write_tar,
    write_tar_of_tars,
    write_zip,
)

SOURCES = {
    "folder": lambda tmp: write_folder(tmp / "images"),
    "zip": lambda tmp: write_zip(tmp / "images.zip"),
    "zip, stored": lambda tmp: write_zip(tmp / "images.zip", method=zipfile.ZIP_STORED),
    "zip, wrapped": lambda tmp: write_zip(tmp / "images.zip", {f"set/train/{n}": d for n, d in SMALL.items()}),
    "tar": lambda tmp: write_tar(tmp / "images.tar", {f"./{n}": d for n, d in SMALL.items()}),
    "tar of tars": lambda tmp: write_tar_of_tars(tmp / "images.tar"),
    "parquet": lambda tmp: write_table(tmp / "images", "parquet"),
    "arrow": lambda tmp: write_table(tmp / "images", "arrow"),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_same_records(tmp_path, make):
    """Whatever the images lie in: sorted classes, images in order, the same crops."""
    index = list_source(make(tmp_path))
    read = crops(index)
    assert index.classes == ["ant", "bee", "cat"] and read.label.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    expected = [crop_file(data, 8, LIMIT)[0] for _, data in sorted(SMALL.items())]
    assert np.array_equal(read.pixels.numpy(), np.stack(expected)) and not read.bad


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_index_survives_its_file(tmp_path, make):
    """The list is the same every time, and after being written and read."""
    source = make(tmp_path)
    index = list_source(source)
    content = index.to_bytes()
    assert content == list_source(source).to_bytes()
    (tmp_path / "index.npz").write_bytes(content)
    assert Index.from_file(tmp_path / "index.npz").to_bytes() == content
    for place in range(0, len(content), max(1, len(content) // 40)):
        (tmp_path / "index.npz").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            Index.from_file(tmp_path / "index.npz")
        except ValueError as error:
            assert "is damaged" in str(error)


def test_classes_file_selects_and_orders(tmp_path):
    """--classes: labels follow its lines, classes it leaves out are not packed, names to show are kept."""
    root = write_folder(tmp_path / "images")
    file = tmp_path / "classes.txt"
    file.write_text("cat\na\tof no matter\n".replace("a\tof no matter", "ant red ant, Myrmica"))
    index = list_source(root, file)
    assert index.classes == ["cat", "red ant, Myrmica"]
    assert index.names[0] == "cat/0.png" and index.labels.tolist() == [0] * 3 + [1] * 3
    for text, message in (("cow\n", "'cow' is not a class"), ("cat\ncat\n", "twice"), ("\n", "names no class")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            list_source(root, file)


def test_labels_from_dataset_json(tmp_path):
    """A dataset.json of EDM's kind gives the labels, as in the published tool."""
    names = ["00000/img0.png", "00000/img1.png"]
    images = {name: encoded(noise(8, 8)) for name in names}
    labels = json.dumps({"labels": [[names[0], 4], [names[1], 2]]}).encode()
    for source in (
        write_folder(tmp_path / "folder", images | {"dataset.json": labels}),
        write_zip(tmp_path / "images.zip", images | {"dataset.json": labels}),
    ):
        index = list_source(source)
        assert dict(zip(index.names, index.labels.tolist())) == {names[0]: 4, names[1]: 2}
        assert index.classes == ["0", "1", "2", "3", "4"]
    write_folder(tmp_path / "folder", {"00000/img2.png": b""})
    with pytest.raises(UserError, match=r"has no label for 00000/img2\.png"):
        list_source(tmp_path / "folder")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "no images found"),
        ({"readme.txt": b""}, "no images found, only files like readme"),
        ({"ant/1.png": b""}, "all images are of one class, 'ant'"),
        ({"1.png": b"", "2.png": b""}, "1.png is not in a class folder"),
        ({"ant/1.png": b"", "bee/1.png": b"", "3.png": b""}, "3.png is not in a class folder"),
        ({"train/ant/1.png": b"", "val/ant/1.png": b""}, "holds splits, not classes"),
        ({"images.zip": b""}, "no images, but an archive: give .*images.zip"),
    ],
    ids=["empty", "no images", "one class", "flat", "loose image", "splits", "archive inside"],
)
def test_wrong_folders(tmp_path, images, message):
    """Each wrong folder is one sentence that names it."""
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", images)
    with pytest.raises(UserError, match=message):
        list_source(tmp_path / "images")


def test_classes_of_one_name_stay_apart(tmp_path):
    """A table whose classes share a name, as two cranes of ImageNet do, keeps its own numbers."""
    root = write_table(tmp_path / "images", "parquet", names=("crane", "bee", "crane"))
    index = list_source(root)
    assert index.classes == ["crane", "bee", "crane"] and index.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    (tmp_path / "classes.txt").write_text("bee\ncrane\n")
    with pytest.raises(UserError, match="several classes named 'crane'"):
        list_source(root, tmp_path / "classes.txt")


def test_one_class_when_asked_for(tmp_path):
    """--allow-one-class takes one class folder, or a flat folder of images."""
    index = list_source(write_folder(tmp_path / "a", {"ant/1.png": b""}), allow_one_class=True)
    assert index.classes == ["ant"]
    flat = list_source(write_folder(tmp_path / "b", {"2.png": b"", "1.png": b""}), allow_one_class=True)
    assert flat.classes == ["all"] and flat.names == ["1.png", "2.png"]


def test_missing_and_foreign_sources(tmp_path):
    (tmp_path / "x.txt").write_text("no archive")
    for source, message in ((tmp_path / "nowhere", "no such file"), (tmp_path / "x.txt", "not a folder, zip, tar")):
        with pytest.raises(UserError, match=message):
            list_source(source)


def test_other_files_are_ignored(tmp_path):
    """Hidden files, what macOS leaves in archives, and other files are not packed, and a few are named."""
    extra = {"ant/._1.png": b"", "__MACOSX/ant/1.png": b"", "ant/notes.txt": b"", "ant/.DS_Store": b""}
    for source in (write_folder(tmp_path / "a", SMALL | extra), write_zip(tmp_path / "b.zip", SMALL | extra)):
        index = list_source(source)
        assert len(index) == 9 and "ant/notes.txt" in index.ignored


def test_links_in_a_folder_are_followed_but_not_in_a_circle(tmp_path):
    """A class folder may be a link; a link to a folder above itself is not followed."""
    root = write_folder(tmp_path / "images")
    (root / "dog").symlink_to(root / "cat")
    (root / "cat" / "again").symlink_to(root)
    index = list_source(root)
    assert len(index) == 12 and index.classes == ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize("name", ["/etc/1.png", "../1.png", "ant/../../1.png", "C:\\ant\\1.png", "..\\1.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_point_out_are_refused(tmp_path, kind, name):
    """Absolute paths and .. in an archive are refused by name."""
    write = write_zip if kind == "zip" else write_tar
    with pytest.raises(UserError, match="points out of the archive"):
        list_source(write(tmp_path / f"x.{kind}", {name: b"", **SMALL}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("ant/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="is a link or no regular file"):
        list_source(tmp_path / "x.tar")


def test_links_and_encryption_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("ant/1.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        list_source(tmp_path / "x.zip")
    data = bytearray(write_zip(tmp_path / "y.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        list_source(tmp_path / "y.zip")


@pytest.mark.parametrize("make", ["tar", "tar of tars"])
def test_a_truncated_tar_is_refused(tmp_path, make):
    """Half a download, cut between members or within one, never passes for a smaller archive; nor does a broken header."""
    path = SOURCES[make](tmp_path)
    content = path.read_bytes().rstrip(b"\0")
    for end in range(1, len(content), 389):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"images\.tar: (damaged|not a folder|no images)"):
            list_source(path, allow_one_class=True)
    headers = [i - 257 for i in range(len(content)) if content[i : i + 5] == b"ustar"]
    path.write_bytes(content[: headers[2] + 10] + b"X" + content[headers[2] + 11 :] + bytes(10240))
    with pytest.raises(UserError, match="no end mark"):
        list_source(path)


def test_damaged_and_compressed_archives_are_refused(tmp_path):
    """A zip without its directory and a compressed tar are one sentence each."""
    path = write_zip(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"x\.zip"):
        list_source(path)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(write_folder(tmp_path / "images"), "images")
    with pytest.raises(UserError, match="decompress it once"):
        list_source(tmp_path / "x.tar.gz")


def test_a_zip_bomb_stays_small(tmp_path):
    """A member that inflates to more than its directory says, or whose bytes were changed, is a bad image."""
    path = write_zip(tmp_path / "x.zip", {"ant/1.png": b"\0" * 10**7, **SMALL})
    index = list_source(path)
    item = next(item for item in index.items(0, len(index)) if item.name == "ant/1.png")
    reader = Reader(index.kind, index.root, index.files)
    with pytest.raises(BadImage, match="not what its directory says"):
        reader.read(item._replace(size=1000))
    with pytest.raises(BadImage, match="not what its directory says"):
        reader.read(item._replace(crc=item.crc ^ 1))
    with pytest.raises(BadImage, match="too large for an image"):
        reader.read(item._replace(size=2**40))


@pytest.mark.parametrize("images", ["imagenet_256_vae", "images"])
def test_published_layout(tmp_path, images):
    """Crops and moments are paired by name and taken over as they are."""
    root = write_published(tmp_path / "data", images)
    index = list_source(root)
    read = crops(index, 16)
    assert index.kind == "published" and read.label.tolist() == [0, 1, 0, 1]
    assert np.array_equal(read.moments[3], np.load(root / "vae-sd" / latent_name(index.names[3])))
    assert np.array_equal(read.pixels[0], np.asarray(noise(16, 16)))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda r: (r / "vae-sd/00000/img-mean-std-00000002.npy").unlink(),
            "img00000002.png of imagenet_256_vae/ has no",
        ),
        (
            lambda r: (r / "imagenet_256_vae/00000/img00000001.png").unlink(),
            "img-mean-std-00000001.npy of vae-sd/ has no",
        ),
        (lambda r: (r / "vae-sd/dataset.json").write_text('{"labels": []}'), "has no label for"),
        (lambda r: (r / "vae-sd/dataset.json").write_text('{"labels": null}'), "holds no labels"),
        (lambda r: (r / "imagenet_256_vae").rename(r / "pictures"), "neither imagenet_256_vae/ nor images/"),
        (lambda r: _swap_labels(r / "imagenet_256_vae/dataset.json"), "do not belong together"),
    ],
    ids=["latent missing", "image missing", "label missing", "no labels", "no images", "labels disagree"],
)
def test_published_pairs_that_do_not_match_are_refused(tmp_path, harm, message):
    root = write_published(tmp_path / "data")
    harm(root)
    with pytest.raises(UserError, match=message):
        list_source(root)


def _swap_labels(path):
    path.write_text(path.read_text().replace(", 1]", ", 0]"))
