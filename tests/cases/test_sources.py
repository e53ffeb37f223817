"""What people give as a source, and what must not be passed over in silence; packing and evaluation list alike."""

import os
import re
import shutil

import numpy as np
import pytest

from common.contents import CIRCLES, HIDDEN, OTHERS, SPECIAL
from common.listing import list_contents
from config import UserError
from evaluations.image_sets import open_images
from preprocessing.sources import list_source
from tests.packs import both_refuse, encoded, noise, write_folder, write_tar, write_zip

PICTURE = encoded(noise(8, 8))
AB = {f"{folder}/{i}.png": encoded(noise(8, 8)) for folder in "ab" for i in range(2)}


def test_dead_link_in_place_of_a_class_folder(tmp_path):
    """The class must not vanish and shift the labels of those behind it."""
    for name in "abc":
        write_folder(tmp_path / "far" / name, {"0.png": PICTURE})
        (tmp_path / "S").mkdir(exist_ok=True)
        (tmp_path / "S" / name).symlink_to(tmp_path / "far" / name)
    assert list_source(tmp_path / "S").classes == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "far" / "b")
    both_refuse(tmp_path / "S", "1 link leads nowhere, such as b to .*far/b; restore")
    (tmp_path / "S" / "loop").symlink_to("loop")
    both_refuse(tmp_path / "S", "2 links lead nowhere")


def test_dead_link_in_place_of_an_image(tmp_path):
    """Refused with the first one and their number; --on-corrupt skip lists it, so that packing leaves it out."""
    root = write_folder(tmp_path / "S", AB)
    for name in ("a/8.png", "a/9.png"):
        (root / name).symlink_to("gone.png")
    both_refuse(root, r"2 images cannot be read, such as a/8\.png: a link to gone\.png, which does not exist")
    assert len(list_source(root, skip_unreadable=True)) == 6


def test_links_between_class_folders(tmp_path):
    """Each is followed once, and not round and round."""
    root = write_folder(tmp_path / "S", AB)
    (root / "a" / "x").symlink_to("../b")
    (root / "b" / "y").symlink_to("../a")
    found = list_contents(root)
    assert {item.name.rpartition("/")[0] for item in found.items} == {"a", "b", "a/x", "b/y"}
    assert sorted(found.left_out[CIRCLES]) == ["a/x/y", "b/y/x"]


def test_whatever_a_walk_leaves_out_is_counted_and_said(tmp_path, capsys):
    root = write_folder(
        tmp_path / "S", AB | {"a/.x.png": b"", ".h/0.png": b"", "a/@eaDir/0.png": b"", "a/notes.txt": b""}
    )
    (root / "a" / "again").symlink_to(root)
    os.mkfifo(root / "a" / "pipe.png")
    left_out = {why: sorted(names) for why, names in list_contents(root).left_out.items()}
    assert left_out == {
        HIDDEN: [".h", "a/.x.png", "a/@eaDir"],
        CIRCLES: ["a/again"],
        SPECIAL: ["a/pipe.png"],
        OTHERS: ["a/notes.txt"],
    }
    for read in (list_source, lambda source: open_images([source])):
        read(root)
        said = capsys.readouterr().out
        assert "hidden or system entries: 3 (" in said and "links in a circle: 1 (a/again)" in said
        assert (
            "sockets, pipes or devices: 1 (a/pipe.png)" in said and "files that are not images: 1 (a/notes.txt)" in said
        )


def test_hidden_and_system_entries_of_archives_are_those_of_folders(tmp_path):
    images = AB | {".thumbs/0.png": PICTURE, "a/._0.png": b"", "__MACOSX/a/0.png": b"", "b/@eaDir/x.png": PICTURE}
    found = [
        sorted(item.name for item in list_contents(source).items)
        for source in (
            write_folder(tmp_path / "S", images),
            write_zip(tmp_path / "S.zip", images),
            write_tar(tmp_path / "S.tar", images),
        )
    ]
    assert found == [sorted(AB)] * 3


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "class tars", "class zips"])
def test_evaluation_and_packing_list_the_same_images(tmp_path, kind):
    """The reference of an evaluation may be what was packed, in any form: the same images, and the same digest."""
    folder = write_folder(tmp_path / "S", AB)
    if kind == "folder":
        source = folder
    elif kind in ("zip", "tar"):
        source = (write_zip if kind == "zip" else write_tar)(tmp_path / f"T.{kind}", AB)
    else:
        suffix, source = kind[6:9], tmp_path / "T"
        source.mkdir()
        for name in "ab":
            members = {file.split("/")[1]: data for file, data in AB.items() if file[0] == name}
            (write_zip if suffix == "zip" else write_tar)(source / f"{name}.{suffix}", members)
    index, images = list_source(source), open_images([source])
    assert index.names == sorted(AB) and index.classes == ["a", "b"] and index.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.read(0, 4), np.stack([np.asarray(noise(8, 8))] * 4))
    assert images.labels.tolist() == [0, 0, 1, 1] and images.digest() == open_images([folder]).digest()


def test_kaggle_layout_of_imagenet(tmp_path):
    """Refused naming the whole path of the training images, which can then be given, also inside the archive."""
    top = "ILSVRC/Data/CLS-LOC"
    images = {f"{top}/train/{name}": data for name, data in AB.items()}
    images |= {f"{top}/{split}/{i}.png": PICTURE for split in ("test", "val") for i in range(2)}
    images |= {"ILSVRC/Annotations/x.xml": b"", "LOC_synset_mapping.txt": b""}
    for source in (
        write_folder(tmp_path / "kaggle", images),
        write_zip(tmp_path / "kaggle.zip", images),
        write_tar(tmp_path / "kaggle.tar", images),
    ):
        with pytest.raises(UserError, match="holds splits, not classes; give one of them, such as ") as error:
            list_source(source)
        given = re.search(r"such as (\S+)", str(error.value))[1]
        assert given == f"{source}/{top}/train"
        index = list_source(tmp_path / given)
        assert index.classes == ["a", "b"] and index.names == sorted(AB)
    with pytest.raises(UserError, match=r"kaggle\.zip/ILSVRC/train: no images there; .*kaggle\.zip holds ILSVRC"):
        list_source(tmp_path / "kaggle.zip/ILSVRC/train")
    with pytest.raises(UserError, match="kaggle/nothing: no such file or folder"):
        list_source(tmp_path / "kaggle/nothing")


def test_archives_of_splits_or_notes_are_not_classes(tmp_path):
    """ILSVRC2012_img_train.tar beside _val.tar; archives that hold several classes each, or captions (WebDataset)."""
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        write_folder(tmp_path / "downloads", {name: write_tar(tmp_path / "x.tar", AB).read_bytes()})
    both_refuse(tmp_path / "downloads", "no images, but an archive: give .*ILSVRC2012_img_train.tar")
    captions = {"000.jpg": PICTURE, "000.cls": b"3"}
    for folder, members, words in (
        ("parts", AB, "0.tar holds several folders"),
        ("web", captions, "0/000.cls describes"),
    ):
        data = write_tar(tmp_path / "x.tar", members).read_bytes()
        both_refuse(
            write_folder(tmp_path / folder, {"0.tar": data, "1.tar": data}), f"not one class each, since {words}"
        )


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("TRAIN", "VAL"),
        ("train_set", "test_set"),
        ("training-images", "dev"),
        ("train", "eval"),
        ("train2017", "val2017"),
        ("train", "test", "extra"),
    ],
)
def test_splits_by_name(tmp_path, names, capsys):
    """In any case and spelling; the training folder is named."""
    root = write_folder(
        tmp_path / "S", {f"{split}/{name}/{i}.png": PICTURE for split in names for name in "ab" for i in "01"}
    )
    with pytest.raises(UserError, match=f"give one of them, such as {root / names[0]} "):
        list_source(root)
    open_images([root])  # is not refused, but it is said
    assert (
        f"{root} holds {', '.join(sorted(set(names) - {'extra'}))}: all of them are measured" in capsys.readouterr().out
    )


def test_splits_by_structure(tmp_path):
    """All top folders hold the same folders: the one with most images is named. Named in --classes they are classes."""
    images = {f"{top}/{name}/{i}.png": b"" for top, n in (("x", 1), ("y", 3)) for name in "ab" for i in range(n)}
    root = write_folder(tmp_path / "S", images)
    with pytest.raises(UserError, match=f"its folders x, y all hold the same folders.* such as {root}/y "):
        list_source(root)
    (tmp_path / "classes.txt").write_text("x\ny\n", encoding="utf-8")
    assert list_source(root, tmp_path / "classes.txt").classes == ["x", "y"]
    tiny = {f"{name}/images/{i}.png": b"" for name in ("n01", "n02") for i in range(2)}  # of Tiny-ImageNet
    assert list_source(write_folder(tmp_path / "tiny", tiny)).classes == ["n01", "n02"]
    assert (
        list_source(write_folder(tmp_path / "cars", {f"{n}/0.png": b"" for n in ("bus", "train")})).classes[1]
        == "train"
    )


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "jxl"])
def test_images_in_a_format_that_cannot_be_read(tmp_path, suffix):
    """Counted and refused; with --on-corrupt skip they stay listed, so that their class keeps its number."""
    images = {f"apple/{i}.{suffix}": b"ftypheic" for i in range(3)} | {f"b{n}/0.png": PICTURE for n in "12"}
    root = write_folder(tmp_path / "S", images)
    both_refuse(
        root, rf"3 images cannot be read, such as apple/0\.{suffix}: the format {suffix.lower()} cannot be read"
    )
    index = list_source(root, skip_unreadable=True)
    assert index.classes == ["apple", "b1", "b2"] and index.labels.tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("inside", [None, "0.psd", "b.tar"])
def test_class_folder_without_images(tmp_path, inside):
    """Empty, with other files, or a tar that was not unpacked: it would vanish, and labels shift."""
    root = write_folder(tmp_path / "S", {"a/0.png": PICTURE, "c/0.png": PICTURE, "d/0.png": PICTURE})
    if inside == "b.tar":
        write_tar(root / "b.tar", {"0.png": PICTURE})
        words = "b.tar is not unpacked"
    else:
        write_folder(root, {f"b/{inside}": b""} if inside else {})
        (root / "b").mkdir(exist_ok=True)
        words = "b holds no images"
    with pytest.raises(UserError, match=f"{words}, but lies beside the class folders"):
        list_source(root)
    (tmp_path / "classes.txt").write_text("a\nc\n", encoding="utf-8")
    assert list_source(root, tmp_path / "classes.txt").classes == ["a", "c"]
