"""Sets of images: npz files, folders, packed datasets; crops; what is refused."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.crop import center_crop
from evaluations.image_folder import SeveralSizes
from evaluations.image_sets import open_images
from evaluations.statistics import compute_statistics
from tests.toy_images import Trap, pixels, read_all, write_mixed

ROOT = Path(__file__).parents[1]


def test_every_form_of_a_set_reads_alike(tmp_path):
    """Stored npz, compressed npz, folder of PNG and a set in two files give the same images and labels."""
    images, labels = pixels(12), np.arange(12) // 4
    np.savez(tmp_path / "stored.npz", images, labels)
    np.savez_compressed(tmp_path / "packed.npz", images, labels)
    np.savez(tmp_path / "a.npz", images[:5], labels[:5])
    np.savez(tmp_path / "b.npz", images[5:], labels[5:])
    for number, image in enumerate(images):
        folder = tmp_path / "folder" / f"class{labels[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    for paths in (["stored.npz"], ["packed.npz"], ["folder"], ["a.npz", "b.npz"]):
        found = open_images([tmp_path / path for path in paths])
        assert found.shape == images.shape
        assert np.array_equal(found.labels, labels), paths
        assert np.array_equal(found.read(0, 12), images)
        assert np.array_equal(found.read(3, 9), images[3:9])  # across the files, and after a later read
        assert np.array_equal(found.pick([7, 0, 7]), images[[7, 0, 7]])


def test_packed_dataset_as_reference(tmp_path):
    """The pixels of a packed dataset are read over its shards; one without pixels is refused with the reason."""
    from dataset import encode_moments
    from packed.format import Manifest, write_manifest
    from packed.writer import write_shard

    images = pixels(10)
    shards = []
    moments = encode_moments(np.ones((10, 8, 2, 2), np.float32))
    for number, rows in enumerate((slice(0, 6), slice(6, 10))):
        arrays = {"moments": moments[rows], "label": np.arange(10)[rows], "pixels": images[rows]}
        shards.append(write_shard(tmp_path, number, arrays))
    fields = {
        "moments": {"dtype": "float16", "shape": [8, 2, 2]},
        "label": {"dtype": "int64", "shape": []},
        "pixels": {"dtype": "uint8", "shape": [16, 16, 3]},
    }
    manifest = Manifest(10, 6, 16, fields, [str(c) for c in range(10)], {}, [], shards)
    write_manifest(tmp_path, manifest)
    found = open_images([tmp_path])
    assert np.array_equal(found.read(0, 10), images) and np.array_equal(found.read(4, 8), images[4:8])
    assert found.labels.tolist() == list(range(10))
    del manifest.fields["pixels"]
    write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match="has no field 'pixels'"):
        open_images([tmp_path])


def test_limit_takes_the_first_images(tmp_path):
    np.savez(tmp_path / "s.npz", pixels(9), np.arange(9))
    found = open_images([tmp_path / "s.npz"], limit=4)
    assert len(found) == 4 and found.labels.tolist() == [0, 1, 2, 3]
    assert found.digest() != open_images([tmp_path / "s.npz"]).digest()


def write_member(path: Path, member: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", member)


def write_bad(path: Path, kind: str) -> None:
    images = pixels(4)
    if kind == "pickled":
        np.savez(path, np.array([Trap(path.with_name("sprung"))], dtype=object))
    elif kind == "float":
        np.savez(path, images / 255)
    elif kind == "grey":
        np.savez(path, images[..., 0])
    elif kind == "chw":
        np.savez(path, images.transpose(0, 3, 1, 2))
    elif kind == "empty":
        np.savez(path, images[:0])
    elif kind == "other name":
        np.savez(path, images=images)
    elif kind == "truncated file":
        np.savez(path, images)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "truncated array":
        stream = io.BytesIO()
        np.save(stream, images)
        write_member(path, stream.getvalue()[:-10])
    elif kind == "not a zip":
        path.write_bytes(b"hello")
    elif kind == "no npy":
        write_member(path, b"hello, this is no array at all")
    elif kind == "labels":
        np.savez(path, images, np.arange(3))
    elif kind == "fortran":
        np.savez(path, np.asfortranarray(images))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("pickled", "holds pickled objects"),
        ("float", "arr_0 is float64, images must be uint8"),
        ("grey", r"shape \(4, 16, 16\), images must be \(N, H, W, 3\)"),
        ("chw", r"images must be \(N, H, W, 3\)"),
        ("empty", "holds no images"),
        ("other name", "no array arr_0 .found: images."),
        ("truncated file", "not an npz file, or truncated"),
        ("truncated array", "its header says"),
        ("not a zip", "not an npz file, or truncated"),
        ("no npy", "is not an array of a known version"),
        ("labels", "labels must be 4 integers"),
        ("fortran", "Fortran order"),
    ],
)
def test_malformed_files_are_refused_with_one_sentence(tmp_path, kind, sentence):
    """Each names the file; nothing in it is executed."""
    path = tmp_path / "bad.npz"
    write_bad(path, kind)
    with pytest.raises(ValueError, match=sentence) as error:
        open_images([path])
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_compressed_file_is_named(tmp_path):
    """A flipped byte in compressed data is found when it is read."""
    path = tmp_path / "s.npz"
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"s\.npz is damaged"):
        read_all(path)


def test_folders_with_unusable_images(tmp_path):
    """Missing, empty, of two sizes, not an image, 16 bits: each with the name of the file."""
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        open_images([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no images"):
        open_images([tmp_path])
    Image.fromarray(pixels(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels(1, size=8)[0]).save(tmp_path / "b.png")
    with pytest.raises(
        SeveralSizes, match=r"several sizes \(a\.png is 16 x 16, b\.png is 8 x 8\): give --resolution N"
    ):
        read_all(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        read_all(tmp_path)
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: has pixels of type I;16"):
        read_all(tmp_path)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(ValueError, match=r"c\.txt: not a folder, zip, tar or another file"):
        open_images([tmp_path / "c.txt"])


def test_links_are_followed_as_by_packing(tmp_path):
    """A class folder may be a link; hidden files, and a link back to the folder itself, are left out."""
    for place in ("elsewhere", "set/b"):
        (tmp_path / place).mkdir(parents=True)
        for number, image in enumerate(pixels(3)):
            Image.fromarray(image).save(tmp_path / place / f"{number}.png")
    (tmp_path / "set/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/b/self").symlink_to(tmp_path / "set")
    (tmp_path / "set/b/._0.png").write_bytes(b"left by another system")
    found = open_images([tmp_path / "set"])
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1] and np.array_equal(found.read(0, 3), found.read(3, 6))


def test_sets_of_different_size_do_not_join(tmp_path):
    np.savez(tmp_path / "a.npz", pixels(2))
    np.savez(tmp_path / "b.npz", pixels(2, size=8))
    with pytest.raises(ValueError, match=r"b\.npz has images of 8 x 8, a\.npz of 16 x 16"):
        open_images([tmp_path / "a.npz", tmp_path / "b.npz"])


def test_a_folder_of_several_sizes_is_cropped_as_for_training(tmp_path, capsys):
    """The crops are those of packing; what has the size already stays as it is; a message counts the others."""
    images = write_mixed(tmp_path / "mixed")
    found = open_images([tmp_path / "mixed"], resolution=16)
    assert capsys.readouterr().out == (
        "2 of 4 images of mixed are cropped to 16 x 16, as for training (1 of them enlarged)\n"
    )
    crops = np.stack([center_crop(image, 16) for image in images])
    assert found.shape == crops.shape and np.array_equal(found.read(0, 4), crops)
    assert np.array_equal(crops[0], np.asarray(images[0])) and found.cropped == 2
    assert len({open_images([tmp_path / "mixed"], resolution=size).digest() for size in (8, 16, 32)}) == 3
    assert open_images([tmp_path / "mixed"], 1, resolution=16).cropped == 0  # of the images that are used


def test_a_folder_of_one_size_is_left_alone(tmp_path, capsys):
    """Not even one that is not square, unless --resolution says so; its digest is that without the flag."""
    write_mixed(tmp_path / "wide", ((24, 16), (24, 16)))
    as_it_is = open_images([tmp_path / "wide"], fallback=8)
    assert as_it_is.shape == (2, 16, 24, 3) and as_it_is.cropped == 0 and not capsys.readouterr().out
    write_mixed(tmp_path / "square", ((16, 16), (16, 16)))
    digests = {open_images([tmp_path / "square"], resolution=size).digest() for size in (None, 16)}
    assert len(digests) == 1 and not capsys.readouterr().out


def test_resolution_crops_npz_files_too(tmp_path):
    """Statistics that came with the file are not those of the crops."""
    stats = compute_statistics(torch.randn(9, 3))
    np.savez(tmp_path / "r.npz", arr_0=pixels(5), arr_1=np.arange(5), mu=stats.mean, sigma=stats.covariance)
    whole, found = open_images([tmp_path / "r.npz"]), open_images([tmp_path / "r.npz"], resolution=8)
    assert np.array_equal(found.read(1, 4), np.stack([center_crop(Image.fromarray(x), 8) for x in pixels(5)[1:4]]))
    assert whole.statistics and not found.statistics and found.cropped == 5 and found.labels.tolist() == list(range(5))
    assert found.digest() != whole.digest() and open_images([tmp_path / "r.npz"], resolution=16).statistics
    write_mixed(tmp_path / "mixed")
    both = open_images([tmp_path / "r.npz", tmp_path / "mixed"])  # the size of the file is that of the folder
    assert (
        both.shape == (9, 16, 16, 3)
        and both.cropped == 2
        and np.array_equal(both.read(5, 9), read_all(tmp_path / "mixed", resolution=16))
    )


@pytest.mark.slow
def test_a_file_of_10_gigabytes_needs_little_memory(tmp_path):
    """50,000 x 256 x 256 zeros (a sparse file) pass through reader, audit and statistics in under 1.5 GB."""
    path, count = tmp_path / "zeros.npz", 50_000 * 256 * 256 * 3
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (50_000, 256, 256, 3)}
    )
    write_sparse_member(path, header.getvalue(), count)
    code = (
        "import re, sys, torch\n"
        "from pathlib import Path\n"
        "from evaluations.audit import Auditor\n"
        "from evaluations.collect import collect\n"
        "from evaluations.features import Extractor, Features\n"
        "from evaluations.image_sets import open_images\n"
        "def compute(x):\n"
        "    wide = x[:, 0, ::16, ::2].flatten(1).float()\n"
        "    return Features(wide, wide[:, :2023], wide[:, :1008])\n"
        "extractor = Extractor('zeros', '0', compute, torch.device('cpu'))\n"
        "auditor = Auditor()\n"
        "found = collect(open_images([Path(sys.argv[1])]), extractor, batch_size=64, groups=5, auditor=auditor)\n"
        "assert found.pooled.shape == (50_000, 2048) and '49999 of 50000 samples are copies' in auditor.warnings()[1]\n"
        # not ru_maxrss: across fork and exec a process inherits the peak of the one that starts it
        "peak = re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())\n"
        "print(int(peak[1]) * 1024 / 1e9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5, f"{done.stdout} GB"


def write_sparse_member(path: Path, header: bytes, zeros: int) -> None:
    """A zip with one stored member, arr_0.npy = header + zeros, whose zeros take no disk. Sizes go to zip64 fields."""
    import struct
    import zlib

    crc, piece = zlib.crc32(header), bytes(2**24)
    for start in range(0, zeros, len(piece)):
        crc = zlib.crc32(piece[: zeros - start], crc)
    name, size = b"arr_0.npy", len(header) + zeros
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
    central = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0
    )
    with path.open("wb") as stream:
        stream.write(local + name + extra + header)
        stream.seek(zeros, os.SEEK_CUR)
        start = stream.tell()
        stream.write(central + name + extra)
        length = stream.tell() - start
        end = stream.tell()
        stream.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, start))
        stream.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        stream.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, length, 0xFFFFFFFF, 0))
