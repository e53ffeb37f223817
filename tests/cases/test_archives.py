"""Archives that were joined, cut off or made to do harm, and what tools leave in them."""

import tarfile
import zipfile

import numpy as np
import pytest

from config import UserError
from evaluations.image_sets import open_images
from preprocessing.sources import list_source
from tests.packs import both_refuse, encoded, noise, write_folder, write_table, write_tar, write_zip

PICTURE = encoded(noise(8, 8))
AB = {f"{folder}/{i}.png": encoded(noise(8, 8)) for folder in "ab" for i in range(2)}


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


def test_hidden_archives_are_left_out(tmp_path, capsys):
    """macOS writes ._a.tar beside a.tar: in a folder, in a tar of tars, beside class folders, and beside tables."""
    tars = {f"{name}.tar": write_tar(tmp_path / "x.tar", {"0.png": PICTURE}).read_bytes() for name in "ab"}
    hidden = {f"._{name}": b"\0\5\x16\7" * 300 for name in (*tars, "n01.tar", "train-0.parquet")}
    for source in (
        write_folder(tmp_path / "tars", tars | hidden),
        write_tar(tmp_path / "S.tar", tars | hidden),
        write_folder(tmp_path / "folders", AB | hidden),
    ):
        index, images = list_source(source), open_images([source])
        assert index.classes == ["a", "b"] and len(index) == len(images.labels)
        assert "hidden or system entries: 4 (._" in capsys.readouterr().out
    assert list_source(write_folder(write_table(tmp_path / "tables", "parquet"), hidden)).files[0][0] != "."


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
