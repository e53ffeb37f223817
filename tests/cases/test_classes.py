"""Classes are what the source says, their names are not their numbers, and one name has one spelling."""

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from common.class_names import order_note
from common.files import write_text
from common.reporting import _Console
from config import UserError, parse
from evaluations.image_sets import open_images
from preprocessing import pack
from preprocessing.index import Item, Listing, build
from preprocessing.settings import PackConfig
from preprocessing.sources import list_source
from sampling.labels import read_labels
from tests.packs import encoded, flags, noise, write_folder, write_table, write_tar, write_zip

PICTURE = encoded(noise(8, 8))
NUMBERS = sorted(str(number) for number in range(12))  # as text: 0, 1, 10, 11, 2, ...


def drawn(*words, names=NUMBERS, flag="classes"):
    given = ((), words) if flag == "classes" else (words, ())
    return read_labels(*given, len(names), names, 8).values.tolist()


@pytest.mark.parametrize("flag", ["classes", "labels"])
def test_word_that_is_a_class_name_and_another_classs_number(flag):
    """Class folders 0 ... 11 and --classes 2: the number of folder 10. Refused, both are named, and each can be given."""
    with pytest.raises(
        UserError,
        match=f"--{flag} 2: '2' is the name of class number 4, and number 2 is the class named '10'; give name:2",
    ):
        drawn("2", flag=flag)
    assert drawn("name:2", "number:2", flag=flag) == [4, 2]
    assert drawn("0", "1", flag=flag) == [0, 1]  # both mean the same class
    with pytest.raises(UserError, match="'01' is the name of class number 0, and number 1 is the class named '02'"):
        drawn("1", names=("01", "02", "03"), flag=flag)
    with pytest.raises(UserError, match="2 classes have this name, those with the numbers 0, 2"):
        drawn("crane", names=("crane", "bee", "crane"), flag=flag)
    with pytest.raises(UserError, match="the model has classes 0 to 11"):
        drawn("12", flag=flag)


def test_packing_says_when_the_order_of_text_is_not_that_of_numbers(toys, tmp_path, capsys):
    assert "number 2 is the class named '10'" in order_note(NUMBERS)
    assert "number 1 is the class named 'c10'" in order_note(["c1", "c10", "c2"])
    assert order_note(["0", "1", "2"]) is order_note(["00", "01", "10"]) is order_note(["ant", "b1"]) is None
    root = write_folder(tmp_path / "S", {f"{name}/0.png": PICTURE for name in NUMBERS})
    assert list_source(root).classes == NUMBERS
    assert open_images([root]).labels.tolist() == list(range(12))
    assert "number 2 is the class named '10'" in capsys.readouterr().out
    pack.main(flags(toys, tmp_path / "out", source=root))
    assert "number 2 is the class named '10'; --classes FILE gives another order" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["", "set/"])
@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar])
def test_announced_labels(tmp_path, write, where):
    """dataset.json says that there are no labels: the storage folders are no classes. Labels that it gives are read, in a
    tar too, and where a folder wraps all."""
    images = {f"{where}0000{i}/img{i}.png": PICTURE for i in range(2)}
    for name, labels, words in (
        ("null", None, "says that these images have no labels"),
        ("empty", [], "has no label for"),
        ("twice", [["00000/img0.png", 1], ["00000/img0.png", 0], ["00001/img1.png", 1]], "several labels"),
        ("half", [["00000/img0.png", 0.5], ["00001/img1.png", 1]], "found the number 0.5"),
        ("deep", 100_000, "is not valid JSON"),
    ):
        text = "[" * labels if name == "deep" else json.dumps({"labels": labels})
        source = write(tmp_path / name, images | {f"{where}dataset.json": text.encode()})
        with pytest.raises(UserError, match=words) as error:
            list_source(source)
        assert f"{where}dataset.json" in str(error.value)
        if name == "null":
            assert list_source(source, allow_one_class=True).classes == ["all"]
    given = {"labels": [["00000/img0.png", 2], ["00001/img1.png", 0]]}
    source = write(tmp_path / "given", images | {f"{where}dataset.json": json.dumps(given).encode("utf-8-sig")})
    index = list_source(source)
    assert index.classes == ["0", "1", "2"] and index.labels.tolist() == [0, 2]
    assert open_images([source]).labels.tolist() == [2, 0] and open_images([tmp_path / "null"]).labels is None


def test_label_below_zero_is_named(tmp_path):
    """One -1 among labels 0 and 1, and a number that no class has."""
    images = {f"0/{i}.png": PICTURE for i in range(3)}
    for number in (-1, 10**9):
        labels = json.dumps({"labels": [["0/0.png", 0], ["0/1.png", number], ["0/2.png", 1]]})
        source = write_folder(tmp_path / str(number), images | {"dataset.json": labels.encode()})
        with pytest.raises(UserError, match=rf"0/1\.png has label {number}, but labels are numbers from 0"):
            list_source(source)
    with pytest.raises(UserError, match=r"train-00001\.parquet#1 has label 2, but the source names 2 classes"):
        list_source(write_table(tmp_path / "table", "parquet", names=("ant", "bee")), None)


def test_labels_of_images_that_are_not_there_are_said(tmp_path, capsys):
    labels = json.dumps({"labels": [["0/0.png", 0], ["0/1.png", 1], ["0/2.png", 2]]})
    images = {f"0/{i}.png": PICTURE for i in range(2)}
    list_source(write_folder(tmp_path / "S", images | {"dataset.json": labels.encode()}))
    assert "1 of its labels are of images that are not there, such as 0/2.png" in capsys.readouterr().out


def test_tables_of_different_classes_and_of_splits(tmp_path):
    """Files whose classes have other names or another order are not one dataset; nor are splits: one can be given."""
    root = write_table(tmp_path / "a", "parquet")
    other = write_table(tmp_path / "b", "parquet", names=("bee", "ant", "cat"))
    (other / "train-00000.parquet").rename(root / "train-00009.parquet")
    with pytest.raises(UserError, match=r"train-00009\.parquet: its classes are not those of train-00000\.parquet"):
        list_source(root)
    (root / "train-00009.parquet").rename(root / "test-00000.parquet")
    with pytest.raises(UserError, match=f"holds the splits test, train; give one of them, such as {root}/train"):
        list_source(root)
    index = list_source(root / "train")
    assert len(index) == 9 and index.files == ["train-00000.parquet", "train-00001.parquet"]
    (root / "train-00000.parquet").rename(root / "validation-0.parquet")
    (root / "train-00001.parquet").unlink()
    with pytest.raises(UserError, match="holds the splits test, validation"):
        list_source(root)


# ---------------------------------------------------------------------------------------------------------- spelling


NFC, NFD = "été", unicodedata.normalize("NFD", "été")


def test_two_named_classes_of_one_spelling(tmp_path):
    """A table's names that differ in Unicode form only: --classes cannot tell them apart, and would drop one's images."""
    listing = Listing("parquet", tmp_path, [""], [Item(f"t#{i}", i) for i in range(3)], ["ant", NFC, NFD])
    (tmp_path / "classes.txt").write_text(f"ant\n{NFC}\n", encoding="utf-8")
    with pytest.raises(UserError, match="has several classes named 'été'; leave --classes out"):
        build(listing, tmp_path / "classes.txt", False)


def test_two_spellings_of_a_name(tmp_path):
    """Folders as macOS writes them (NFD), words as people type them (NFC): the same class, the same order everywhere."""
    images = {f"{name}/0.png": PICTURE for name in (NFD, "eta", "zoo")}
    root = write_folder(tmp_path / "S", images)
    composed = write_folder(tmp_path / "T", {unicodedata.normalize("NFC", name): data for name, data in images.items()})
    assert list_source(root).classes == list_source(composed).classes == ["eta", "zoo", NFC]
    (tmp_path / "classes.txt").write_text(f"{NFC}\nzoo\n", encoding="utf-8")
    assert list_source(root, tmp_path / "classes.txt").labels.tolist() == [0, 1]
    labels = json.dumps({"labels": [[f"{name}/0.png", i] for i, name in enumerate((NFC, "eta", "zoo"))]})
    labelled = write_folder(tmp_path / "L", images | {"dataset.json": labels.encode()})
    assert dict(zip(list_source(labelled).labels.tolist(), list_source(labelled).names))[0] == f"{NFD}/0.png"
    assert drawn(NFC, names=("a", NFD)) == drawn(NFD, names=("a", NFC)) == [1]
    write_folder(root, {f"{NFC}/0.png": PICTURE})
    for read in (list_source, lambda source: open_images([source])):
        with pytest.raises(UserError, match=r"two classes are both called 'été', .*\\u0301.*\\xe9"):
            read(root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_text_in_any_encoding(tmp_path, encoding):
    """--classes and --labels from any editor."""
    root = write_folder(tmp_path / "S", {f"{name}/0.png": PICTURE for name in ("été", "ant", "bee")})
    (tmp_path / "classes.txt").write_bytes("été\r\nant\r\n".encode(encoding))
    assert list_source(root, tmp_path / "classes.txt").classes == ["été", "ant"]
    (tmp_path / "labels.txt").write_bytes("2 0\r\n1".encode(encoding))
    assert read_labels((str(tmp_path / "labels.txt"),), (), 3, (), 8).values.tolist() == [2, 0, 1]
    if encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "recipe.yaml").write_bytes("source: été\nout: x".encode(encoding))
        assert parse(PackConfig, "", ["--config", str(tmp_path / "recipe.yaml")]).source == Path("été")
    if encoding != "latin-1":
        (tmp_path / "labels.json").write_bytes("[2, 0]".encode(encoding))
        assert read_labels((str(tmp_path / "labels.json"),), (), 3, (), 8).values.tolist() == [2, 0]


def test_class_folder_with_bytes_that_are_not_utf_8(tmp_path):
    """Its name is text all the way, so that no file or terminal refuses it at the end of a run; its images are found."""
    root = write_folder(tmp_path / "S", {"ant/0.png": PICTURE})
    (root / b"caf\xe9".decode("utf-8", "surrogateescape")).mkdir()
    (root / b"caf\xe9/0.png".decode("utf-8", "surrogateescape")).write_bytes(PICTURE)
    index = list_source(root)
    assert index.classes == ["ant", "café"] and "".join(index.classes).encode()
    images = open_images([root])
    assert images.read(0, 2).shape == (2, 8, 8, 3) and len(images.digest()) == 64
    assert index.names[1].encode("utf-8", "surrogateescape") == b"caf\xe9/0.png"
    console = _Console(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    write_text(tmp_path / "text", index.names[1])
    for name in (index.names[1], index.classes[1]):
        console.write(name)


# ------------------------------------------------------------------------------------------------------------- scale


class Counted(str):
    """A name that counts how often it is hashed."""

    hashed = 0

    def __hash__(self):
        Counted.hashed += 1
        return super().__hash__()

    def split(self, *separator):
        return [Counted(part) for part in super().split(*separator)]


def test_many_classes(tmp_path):
    """Twice the classes cost twice as much: each name is looked up a few times, whatever their number."""
    counts = []
    for classes in (100, 200):
        names = [f"c{i:04d}" for i in range(classes)]
        (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
        Counted.hashed = 0
        items = [Item(Counted(f"{name}/{i}.png"), number) for number, name in enumerate(names) for i in range(2)]
        found = [Counted(name) for name in names]
        listing = Listing("folder", tmp_path, [""], items, found)
        for file in (None, tmp_path / "classes.txt"):
            assert len(build(listing, file, False).classes) == classes
        plain = Listing("folder", tmp_path, [""], [item._replace(label=None) for item in items])
        assert np.array_equal(build(plain, None, False).labels, np.repeat(np.arange(classes), 2))
        counts.append(Counted.hashed)
    assert 0 < counts[1] <= 2.2 * counts[0]
