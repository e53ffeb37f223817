"""Images as cameras and programs write them, and which of them an evaluation measures."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from common.images import decode_image, image_size
from common.listing import list_contents
from config import UserError
from evaluations.collect import kept_rows
from evaluations.image_sets import open_images
from tests.packs import SMALL, encoded, noise, write_folder, write_zip

PICTURE = encoded(noise(8, 8))
AB = {f"{folder}/{i}.png": encoded(noise(8, 8)) for folder in "ab" for i in range(2)}


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
