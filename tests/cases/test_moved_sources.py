"""A source is its list of names, sizes and checksums: it may lie elsewhere when a packing goes on."""

import shutil

import pytest

from config import UserError
from preprocessing import pack
from preprocessing.identity import forms
from preprocessing.index import Index
from preprocessing.sources import list_source
from tests.packs import (
    IMAGES,
    content,
    encoded,
    flags,
    flip,
    noise,
    records,
    torchrun,
    write_folder,
    write_tar,
    write_zip,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WRITERS = {"folder": write_folder, "zip": write_zip, "tar": write_tar}


@pytest.fixture(scope="module", params=["folder", "zip"])
def begun(request, toys, tmp_path_factory):
    """(kind, a packing that ended after its second shard, the whole dataset)."""
    folder = tmp_path_factory.mktemp("begun")
    source = WRITERS[request.param](folder / f"images.{request.param}", IMAGES)
    pack.main(flags(toys, folder / "whole", source=source))
    out = shutil.copytree(folder / "whole", folder / "out")
    for name in ("dataset.json", "class_means.npy", "shard-00002.json"):
        (out / name).unlink()
    return request.param, out, folder / "whole"


def test_images_moved_after_a_kill(toys, tmp_path, begun):
    """The same command with the new path finishes the packing, to the byte; other images are refused before that."""
    kind, out, whole = begun
    out = shutil.copytree(out, tmp_path / "out")
    before = content(out)
    for images, words in (
        ({name: data for name, data in IMAGES.items() if name != "c/1.png"}, "it has no c/1.png"),
        (IMAGES | {"bees/2.png": encoded(noise(20, 20))}, "bees/2.png has another size or checksum"),
    ):
        other = WRITERS[kind](
            tmp_path / words[-5:] / f"other.{kind}" if kind == "folder" else tmp_path / words[-5:], images
        )
        with pytest.raises(UserError, match=f"--source .* is not what .*out was packed from: {words}"):
            pack.main(flags(toys, out, source=other))
    assert content(out) == before
    pack.main(flags(toys, out, source=WRITERS[kind](tmp_path / f"moved.{kind}", IMAGES)))
    assert content(out) == content(whole)


def test_finished_and_repaired_after_the_move(toys, tmp_path, begun, capsys):
    """The same command says that nothing is to do; --repair redoes a broken shard, and a lost list, from the new place."""
    kind, _, whole = begun
    out, moved = shutil.copytree(whole, tmp_path / "out"), WRITERS[kind](tmp_path / f"moved.{kind}", IMAGES)
    pack.main(flags(toys, out, source=moved))
    assert "packed already: 15 images" in capsys.readouterr().out
    flip(out / "pixels-00001.npy", -5)
    (out / "index.npz").unlink()
    pack.main(flags(toys, out, "--repair", source=moved))
    assert content(out) == content(whole)
    with pytest.raises(UserError, match=r"is not what .*out was packed from"):
        pack.main(flags(toys, out, source=write_folder(tmp_path / "other", {"a/0.png": b"", "b/0.png": b""})))


def test_extended_and_repaired_after_the_move(toys, tmp_path, begun):
    """New images are added from the new place, and old shards are redone from it."""
    kind, _, whole = begun
    out, more = shutil.copytree(whole, tmp_path / "out"), {"deer/0.png": encoded(noise(11, 9))}
    moved = WRITERS[kind](tmp_path / f"moved.{kind}", IMAGES | more)
    pack.main([*flags(toys, out, source=moved), "--extend"])
    extended = content(out)
    assert len(records(out)["label"]) == 16
    flip(out / "pixels-00000.npy", -5)
    pack.main(flags(toys, out, "--repair", source=moved))
    assert content(out) == extended


def test_a_packing_begun_before_sizes_were_listed(toys, tmp_path):
    """Former versions listed files without their sizes: such a packing goes on, also after its list is lost."""
    source, out = write_folder(tmp_path / "images", IMAGES), tmp_path / "out"
    former = list(forms(list_source(source), str(source), source))[1]
    assert (former.places[:, 2] == -1).all() and (list_source(source).places[:, 2] > 0).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocessing.plan.list_images", lambda settings: former)
        pack.main(flags(toys, out, source=source))
    before = content(out)
    (out / "index.npz").unlink()
    pack.main(flags(toys, out, "--repair", source=source))
    assert content(out) == before and (Index.from_file(out / "index.npz").places[:, 2] == -1).all()
    write_folder(source, {"deer/0.png": encoded(noise(11, 9))})
    pack.main([*flags(toys, out, source=source.rename(tmp_path / "moved")), "--extend"])
    assert len(records(out)["label"]) == 16


def test_a_folder_that_was_zipped_is_the_same_source(toys, tmp_path, begun):
    """What is compared does not depend on the container."""
    _, out, whole = begun
    out = shutil.copytree(out, tmp_path / "out")
    pack.main(flags(toys, out, source=write_tar(tmp_path / "images.tar", IMAGES)))
    assert content(out) == content(whole)


@pytest.mark.parametrize("several", [False, True], ids=["one archive", "a folder of archives"])
def test_extended_archives_are_not_moved(toys, tmp_path, monkeypatch, capsys, several):
    """The new archives are other files than the old ones, in the same folder: nothing is listed again."""
    source, out = tmp_path / ("tars" if several else "images.tar"), tmp_path / "out"
    source.mkdir() if several else None
    for names in ("ab", "abc"):
        for name in names if several else ():
            write_tar(source / f"{name}.tar", {"0.png": IMAGES["c/0.png"]})
        if not several:
            write_tar(source, {f"{name}/0.png": IMAGES["c/0.png"] for name in names})
        pack.main(flags(toys, out, *(("--extend",) if names == "abc" else ()), source=source))
    monkeypatch.setattr("preprocessing.plan.list_images", None)
    pack.main(flags(toys, out, source=source))
    assert "packed already: 3 images" in capsys.readouterr().out
    (out / "index-00001.npz").unlink()
    with pytest.raises(UserError, match=r"index-00001\.npz is missing; repair it with"):
        pack.main(flags(toys, out, source=source))


@pytest.mark.slow
@pytest.mark.parametrize("begun", ["zip"], indirect=True)
def test_moved_and_finished_by_two_processes(toys, tmp_path, begun):
    """Rank 0 looks for the images, and all ranks read them at their new place."""
    kind, out, whole = begun
    out, moved = shutil.copytree(out, tmp_path / "out"), WRITERS[kind](tmp_path / f"moved.{kind}", IMAGES)
    (out / "shard-00000.json").unlink()
    done = torchrun(2, flags(toys, out, source=moved))
    assert done.returncode == 0 and content(out) == content(whole), done.stderr
