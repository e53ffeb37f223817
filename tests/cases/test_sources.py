"""What people give as a source, and what must not be passed over in silence; packing and evaluation list alike."""

import io
import os
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from common.contents import CIRCLES, HIDDEN, OTHERS, SPECIAL
from common.images import decode_image, image_size
from common.listing import list_contents
from config import UserError
from evaluations.collect import kept_rows
from evaluations.image_sets import open_images
from preprocessing.sources import list_source
from tests.packs import SMALL, encoded, noise, write_folder, write_tar, write_zip

PICTURE = encoded(noise(8, 8))
AB = {f"{folder}/{i}.png": encoded(noise(8, 8)) for folder in "ab" for i in range(2)}


def both_refuse(path, words):
    """Packing and evaluation refuse a source with the same words."""
    for read in (list_source, lambda source: open_images([source])):
        with pytest.raises(UserError, match=words):
            read(path)


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


def test_folders_among_the_members_of_archives(tmp_path):
    """As `tar cf x.tar .` and the Finder write them: the folder itself, empty ones, those of the system."""
    root = write_folder(tmp_path / "S", AB)
    with tarfile.open(tmp_path / "S.tar", "w") as archive:
        archive.add(root, ".")
    with zipfile.ZipFile(tmp_path / "S.zip", "w") as archive:
        for name in ("a/", "b/", "__MACOSX/", "__MACOSX/a/", ".git/"):
            archive.writestr(name, b"")
        for name, data in AB.items():
            archive.writestr(name, data)
    for source in (tmp_path / "S.tar", tmp_path / "S.zip"):
        assert list_source(source).names == sorted(AB)
    with zipfile.ZipFile(tmp_path / "S.zip", "a") as archive:
        archive.writestr("c/", b"")
    with pytest.raises(UserError, match="c holds no images, but lies beside the class folders"):
        list_source(tmp_path / "S.zip")


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


# ---------------------------------------------------------------------------------------------------------- archives


def test_advice_is_not_refused_in_turn(tmp_path):
    """Compressed class tars are not what to give instead."""
    root = write_folder(tmp_path / "S", {"n01.tar.gz": b"", "n02.tar.gz": b""})
    both_refuse(root, r"no images, but compressed archives, such as n01\.tar\.gz; unpack them")


def test_member_that_is_there_twice(tmp_path):
    images = {"a/0.png": PICTURE, "./a/0.png": PICTURE, "b/0.png": PICTURE}
    both_refuse(write_tar(tmp_path / "S.tar", images), r"a/0\.png is there twice")


def test_joined_archives(tmp_path):
    """cat a.tar b.tar: the second half must not be lost; of joined zips it would be the first half."""
    parts = {"a.tar": write_tar, "a.zip": write_zip}
    for name, write in parts.items():
        data = write(tmp_path / name, AB).read_bytes()
        other = write(tmp_path / f"other.{name[2:]}", {f"c/{i}.png": PICTURE for i in "01"}).read_bytes()
        (tmp_path / name).write_bytes(data + other)
    both_refuse(tmp_path / "a.tar", r"a\.tar: goes on after the end mark that follows member 'b/1\.png'")
    both_refuse(tmp_path / "a.zip", r"a\.zip: two zips joined into one file")
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "joined.npz").write_bytes((tmp_path / "a.npz").read_bytes() * 2)
    with pytest.raises(UserError, match=r"joined\.npz: two zips joined into one file"):
        open_images([tmp_path / "joined.npz"])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, "pax"])
def test_tar_that_lies_about_sizes(tmp_path, kind):
    """A negative size was listed for ever; the size of a long name is how much is read at once."""
    for size in (-512, 2**40):
        path = write_tar(tmp_path / "t.tar", AB)
        info = tarfile.TarInfo("a/n.png")
        if kind == "pax":
            info.pax_headers = {"size": str(size)}
        else:
            info.size, info.type = size, kind
        header = info.tobuf(tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT)
        path.write_bytes(_members(path) + header + bytes(1024))
        both_refuse(
            path, r"t\.tar: damaged .*(of -512|of 1099511627776|no end mark after member 'a/n\.png'|unexpected)"
        )


def _members(path):
    with tarfile.open(path) as archive:
        end = max(member.offset_data + 512 * -(-member.size // 512) for member in archive)
    return path.read_bytes()[:end]


def test_labels_that_inflate(tmp_path, monkeypatch):
    """A zip of a few bytes whose dataset.json inflates beyond all measure is refused before it takes the memory."""
    monkeypatch.setattr("common.archives.MAX_LABELS", 10**6)
    source = write_zip(tmp_path / "bomb.zip", AB | {"dataset.json": b" " * 10**7})
    assert source.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bomb\.zip: dataset\.json is larger than the 1,000,000 bytes"):
        list_source(source)


# ------------------------------------------------------------------------------------------------------------ images


def test_metadata_never_decides_whether_an_image_is_read(tmp_path):
    """A text of 3 MB in a PNG, a damaged one, a broken colour profile of a JPEG: the pixels are read."""
    image, text = noise(9, 7), PngImagePlugin.PngInfo()
    text.add_text("raw", "x" * 3_000_000, zip=True)
    heavy = encoded(image, pnginfo=text)
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "hello")
    damaged = encoded(image, pnginfo=text).replace(b"hello", b"jello")
    for data in (heavy, damaged):
        assert decode_image(data) == image and image_size(data) == (7, 9)
    write_folder(tmp_path / "S", {"a/0.png": heavy, "a/1.png": damaged})
    assert np.array_equal(open_images([tmp_path / "S"]).read(0, 2), np.stack([np.asarray(image)] * 2))
    jpeg, profile = encoded(image, "JPEG"), b"\xff\xe2\x00\x0eICC_PROFILE\0"
    assert decode_image(jpeg[:2] + profile + jpeg[2:]) == decode_image(jpeg)


def test_an_image_that_cannot_be_read_is_named_by_evaluation(tmp_path):
    root = write_folder(tmp_path / "S", {"a/0.png": PICTURE, "a/1.png": PICTURE[:-30]})
    with pytest.raises(UserError, match=r"S/a/1\.png: truncated"):
        open_images([root]).read(0, 2)
    with pytest.raises(UserError, match=r"S\.zip/a/1\.png: truncated"):
        open_images([write_zip(tmp_path / "S.zip", {"a/0.png": PICTURE, "a/1.png": PICTURE[:-30]})]).read(0, 2)


def test_pictures_of_phones(tmp_path):
    """An MPO holds further views: its first frame is taken, by evaluation as by packing."""
    image = noise(16, 16)
    stream = io.BytesIO()
    image.save(stream, "MPO", save_all=True, append_images=[image.rotate(90)])
    root = write_folder(tmp_path / "R", {"a/0.jpg": stream.getvalue()})
    assert np.array_equal(open_images([root]).read(0, 1)[0], np.asarray(decode_image(encoded(image, "JPEG"))))


# -------------------------------------------------------------------------------------------------------- evaluation


def test_pictures_of_ours_are_not_samples(tmp_path):
    """The folder of generate.py holds grid.png: its samples are those of samples.npz, or of png/."""
    out = write_folder(tmp_path / "out", {"png/000000.png": PICTURE, "grid.png": encoded(noise(40, 40))})
    (out / "samples.json").write_text("{}", encoding="utf-8")
    assert open_images([out]).shape == (1, 8, 8, 3)
    np.savez(out / "samples.npz", np.zeros((5, 4, 4, 3), np.uint8))
    assert open_images([out]).shape == (5, 4, 4, 3)
    assert len(open_images([write_folder(tmp_path / "mine", {"grid.png": PICTURE})])) == 1


def test_part_of_a_set_whose_classes_lie_together(tmp_path):
    """--num-samples takes images from all classes: of folders, and of an npz in the order of its labels."""
    images = np.arange(24, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    for number, pixels in enumerate(images):
        folder = tmp_path / "B" / "abcd"[number // 6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    np.savez(tmp_path / "sorted.npz", images, np.arange(24) // 6)
    np.savez(tmp_path / "mixed.npz", images, np.arange(24) % 4)
    for name, expected in (("B", range(0, 24, 2)), ("sorted.npz", range(0, 24, 2)), ("mixed.npz", range(12))):
        part = open_images([tmp_path / name], limit=12)
        assert part.read(0, 12)[:, 0, 0, 0].tolist() == list(expected), name
        assert np.bincount(part.labels).tolist() == [3] * 4
        assert ("evenly" in part.name) == (name != "mixed.npz")
        whole = open_images([tmp_path / name])
        kept = kept_rows(whole, 8, torch.arange(24))  # what --pr-reference takes
        assert np.bincount(whole.labels[kept]).tolist() == [2] * 4, name
    whole = open_images([tmp_path / "B", tmp_path / "mixed.npz"])
    assert whole.pick([30, 1, 30])[:, 0, 0, 0].tolist() == [6, 1, 6]


def test_zip_opened_by_another_process(tmp_path):
    """Readers are sent to worker processes: what they have opened stays behind."""
    import pickle

    source = write_zip(tmp_path / "S.zip", SMALL, zipfile.ZIP_STORED)
    contents = list_contents(source)
    from common.members import Members

    members = Members(contents.kind, contents.root, contents.files)
    first = members.read(contents.items[0])
    again = pickle.loads(pickle.dumps(members))
    assert again.read(contents.items[0]) == first == SMALL[contents.items[0].name] and not hasattr(first, "open")
