"""Evaluation from files: readers, feature networks, whole measurements, comparison."""

import importlib
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.crop import center_crop
from config import UserError, parse
from evaluations import compare, features, measure
from evaluations.collect import Auditor, collect
from evaluations.evaluate import EvaluateConfig
from evaluations.features import Extractor, Features
from evaluations.images import SeveralSizes, open_images
from evaluations.metrics import frechet_distance
from evaluations.results import Metric, Results, load, sample_warnings, sorted_share
from evaluations.statistics import compute_statistics

ROOT = Path(__file__).parents[1]


def pixels(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth random images, so that networks see something."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)


def read_all(path: Path, **arguments) -> np.ndarray:
    images = open_images([path], **arguments)
    return images.read(0, len(images))


def averages(dim: int = 12) -> Extractor:
    """Extractor without a network: pooled colours of a coarse grid."""

    def compute(x: torch.Tensor) -> Features:
        return Features(torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :dim])

    return Extractor("colours", "0", compute, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- readers


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


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
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
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read_all(tmp_path)
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has pixel type I;16"):
        read_all(tmp_path)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(ValueError, match=r"c\.txt is not an \.npz file"):
        open_images([tmp_path / "c.txt"])


def test_sets_of_different_size_do_not_join(tmp_path):
    np.savez(tmp_path / "a.npz", pixels(2))
    np.savez(tmp_path / "b.npz", pixels(2, size=8))
    with pytest.raises(ValueError, match=r"b\.npz has images of 8 x 8, a\.npz of 16 x 16"):
        open_images([tmp_path / "a.npz", tmp_path / "b.npz"])


# ----------------------------------------------------------------------------------------------------------- crops


def write_mixed(folder: Path, sizes=((16, 16), (40, 24), (16, 16), (8, 12))) -> list[Image.Image]:
    """Images of several (width, height), in the order of their names."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return images


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


def test_each_side_gives_the_other_its_size(settings, tmp_path):
    """A mixed reference is cropped to the samples' size and the other way round; results.json and the cache know of it."""
    write_mixed(tmp_path / "mixed", ((16, 16), (40, 24), (30, 50)) * 3)
    measure.measure(settings(reference=(tmp_path / "mixed",)))
    content = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert (content["reference_cropped"], content["samples_cropped"], content["image_size"]) == (6, 0, "16 x 16")
    measure.measure(settings(reference=(tmp_path / "mixed",), resolution=8))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    measure.measure(settings(samples=(tmp_path / "mixed",)))
    content = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert (content["reference_cropped"], content["samples_cropped"], content["image_size"]) == (0, 6, "16 x 16")
    write_mixed(tmp_path / "other")
    for more in ({"reference": (tmp_path / "other",)}, {"reference": ()}):
        with pytest.raises(SeveralSizes, match=r"(mixed|other) holds images of several sizes"):
            measure.measure(settings(samples=(tmp_path / "mixed",), **more))


# -------------------------------------------------------------------------------------------------------- one pass


def test_collect_equals_the_metrics_of_all_features(tmp_path):
    """Groups, batches and kept rows change nothing in the statistics of the whole."""
    images = pixels(50)
    np.savez(tmp_path / "s.npz", images)
    source, extractor = open_images([tmp_path / "s.npz"]), averages()
    whole = extractor(torch.from_numpy(images).permute(0, 3, 1, 2)).pooled
    expected = compute_statistics(whole)
    for batch_size, groups in ((1, 1), (16, 5), (64, 3)):
        found = collect(source, extractor, batch_size=batch_size, groups=groups)
        assert torch.equal(found.pooled, whole)
        assert frechet_distance(expected, found.statistics("pooled")) < 1e-9
        np.testing.assert_allclose(found.statistics("pooled").covariance, expected.covariance, rtol=1e-12)
    assert torch.equal(collect(source, extractor, batch_size=8, keep=10).pooled, whole[:10])


def test_a_part_of_a_folder_is_taken_evenly(tmp_path):
    """Neighbour metrics on a part of a sorted folder use images of all classes."""
    for number, image in enumerate(pixels(30, size=8)):
        folder = tmp_path / f"class{number // 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    source = open_images([tmp_path])
    kept = collect(source, averages(), batch_size=7, keep=6).pooled
    whole = collect(source, averages(), batch_size=7).pooled
    rows = [i for i in range(30) if (whole[i] == kept[:, None]).all(-1).any()]
    assert len(kept) == 6 and [sum(r // 10 == c for r in rows) for c in range(3)] == [2, 2, 2]


def test_auditor_counts_copies_and_flat_images(tmp_path):
    images = pixels(6)
    images[4] = images[1]
    images[5] = 77
    auditor = Auditor()
    for rows in (images[:2], images[2:]):
        auditor.update(rows)
    audit = auditor.result()
    assert (audit.constant, audit.duplicates) == (1, 1)
    assert (audit.lowest, audit.highest) == (images.min(), images.max())


def test_sorted_share():
    """1 for sorted classes, about 0 for shuffled ones, below for interleaved ones; no warning without repeats."""
    classes = np.arange(1000) // 100
    assert sorted_share(classes) == pytest.approx(1)
    assert abs(sorted_share(np.random.default_rng(0).permutation(classes))) < 0.1
    assert sorted_share(np.arange(1000) % 10) < 0
    assert sorted_share(np.arange(5)) == sorted_share(np.zeros(5)) == 0


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
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from evaluations.collect import Auditor, collect\n"
        "from evaluations.features import Extractor, Features\n"
        "from evaluations.images import open_images\n"
        "def compute(x):\n"
        "    wide = x[:, 0, ::16, ::2].flatten(1).float()\n"
        "    return Features(wide, wide[:, :2023], wide[:, :1008])\n"
        "extractor = Extractor('zeros', '0', compute, torch.device('cpu'))\n"
        "auditor = Auditor()\n"
        "found = collect(open_images([Path(sys.argv[1])]), extractor, batch_size=64, groups=5, auditor=auditor)\n"
        "assert found.pooled.shape == (50_000, 2048) and auditor.result().duplicates == 49_999\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5, f"{done.stdout} GB"


def write_sparse_member(path: Path, header: bytes, zeros: int) -> None:
    """A zip with one stored member, arr_0.npy = header + zeros, whose zeros take no disk. Sizes go to zip64 fields."""
    import struct

    name, size = b"arr_0.npy", len(header) + zeros
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
    central = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0
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


# -------------------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the published file's layout, scaled so that every layer passes its signal on."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            assert state == {}

    with mock.patch.object(module, "load_state_dict_from_url", return_value={}):
        network = Untrained("untrained", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    network.fc.weight.data.normal_(0, 0.3, generator=generator)
    network.fc.bias.data.normal_(0, 3, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_and_their_order(inception_file):
    """2048, 2023 and 1008 numbers. mixed_6/conv equals an independent forward, rows then columns then channels, and the
    logits leave the bias out."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    x = torch.from_numpy(pixels(2, size=64)).permute(0, 3, 1, 2)
    extractor = features.load_inception(inception_file, sha256="any")
    found = extractor(x)
    assert (found.pooled.shape, found.spatial.shape, found.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    network = FeatureExtractorInceptionV3("plain", ["2048"], feature_extractor_weights_path=str(inception_file))
    y = (resize(x.float(), size=(299, 299), align_corners=False) - 128) / 128
    for name in (
        "Conv2d_1a_3x3",
        "Conv2d_2a_3x3",
        "Conv2d_2b_3x3",
        "MaxPool_1",
        "Conv2d_3b_1x1",
        "Conv2d_4a_3x3",
        "MaxPool_2",
        "Mixed_5b",
        "Mixed_5c",
        "Mixed_5d",
        "Mixed_6a",
        "Mixed_6b",
        "Mixed_6c",
    ):
        y = getattr(network, name)(y)
    branch = network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(y)))[:, :7]  # (2, 7, 17, 17)
    for row, column, channel in ((0, 0, 0), (0, 1, 3), (5, 0, 6), (16, 16, 6)):
        ours = found.spatial[:, (row * 17 + column) * 7 + channel]
        torch.testing.assert_close(ours, maps[:, channel, row, column], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, found.pooled @ network.fc.weight.T)


@pytest.mark.slow
def test_fid_equals_torch_fidelity(inception_file, tmp_path):
    """The whole way from PNG files to FID, on both sides, in one network."""
    from torch_fidelity import calculate_metrics

    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        for number, image in enumerate(pixels(5, size=32, seed=seed)):
            Image.fromarray(image).save(folders[-1] / f"{number}.png")
    theirs = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=5,
        feature_extractor_weights_path=str(inception_file),
        cache=False,
    )["frechet_inception_distance"]
    extractor = features.load_inception(inception_file, sha256="any")
    ours = [collect(open_images([folder]), extractor, batch_size=5).statistics("pooled") for folder in folders]
    assert frechet_distance(*ours) == pytest.approx(theirs, rel=1e-5)


def test_inception_weights_are_checked_before_they_are_read(tmp_path):
    """Another file is refused by its checksum, a pickle with code is refused unread, a missing file is named."""
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"SHA-256 .* damaged or another network"):
        features.load_inception(path)
    with pytest.raises(ValueError, match=r"weights\.pth is no file of weights"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders about the pickle protocol
        features.load_inception(path, sha256="any")
    assert not (tmp_path / "sprung").exists()
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of the 2015 Inception"):
        features.load_inception(path, sha256="any")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth do not exist"):
        features.load_inception(tmp_path / "absent.pth")


def test_absent_inception_weights_are_one_sentence(tmp_path, monkeypatch):
    """An empty cache and no network: where to get the file and how to name it."""

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route.*get https://.*--inception-weights FILE"):
        features.load_inception()


@pytest.mark.slow
def test_inception_metrics_do_not_feel_batch_size_or_processes(inception_file, tmp_path):
    """FID, sFID, IS, precision and recall of 24 images for batches of 1, 16 and 64 and for 2 processes."""
    np.savez(tmp_path / "r.npz", pixels(24, size=32))
    np.savez(tmp_path / "s.npz", pixels(24, size=32, seed=1))
    arguments = [
        "--reference",
        tmp_path / "r.npz",
        "--samples",
        tmp_path / "s.npz",
        "--inception-weights",
        inception_file,
    ]
    arguments += [
        "--inception-sha256",
        "any",
        "--device",
        "cpu",
        "--cache-dir",
        tmp_path / "cache",
        "--error-groups",
        0,
    ]
    expected = None
    for batch, launcher in (
        (1, ["-m", "evaluations.evaluate"]),
        (16, ["-m", "evaluations.evaluate"]),
        (64, ["-m", "evaluations.evaluate"]),
        (16, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluations/evaluate.py"]),
    ):
        out = tmp_path / f"{batch}-{len(launcher)}.json"
        command = [sys.executable, *launcher, *arguments, "--batch-size", batch, "--out", out]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = load(out).metrics
        expected = expected or found
        for key, metric in expected.items():
            assert found[key].value == pytest.approx(metric.value, rel=1e-4), (key, batch, launcher)


# --------------------------------------------------------------------------------------------------- timm networks


def save_vit(folder: Path, classes: int = 5, channels: int = 3) -> Path:
    """A small random ViT with a class token, in timm's own folder format."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=classes,
        in_chans=channels,
    )
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else None
    arguments = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
    network.pretrained_cfg["input_size"] = (channels, 16, 16)
    network.pretrained_cfg["mean"] = network.pretrained_cfg["mean"][:channels]
    network.pretrained_cfg["std"] = network.pretrained_cfg["std"][:channels]
    save_for_hf(network, folder, model_args=arguments, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("networks") / "judge")


@pytest.fixture
def settings(vit, tmp_path):
    """A function giving the settings of a small measurement, with changes."""
    classifier = features.load_timm(str(vit))
    images = pixels(40, seed=1)
    labels = classifier(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.argmax(1).numpy()
    np.savez(tmp_path / "r.npz", pixels(60))
    np.savez(tmp_path / "s.npz", images, labels)
    (tmp_path / "s.json").write_text(json.dumps({"schema": 1, "mode": "sde", "steps": 250, "cfg_scale": 2.3}))

    def make(**changes) -> EvaluateConfig:
        given = {
            "samples": (tmp_path / "s.npz",),
            "reference": (tmp_path / "r.npz",),
            "features": (f"timm:{vit}",),
            "device": "cpu",
            "cache_dir": tmp_path / "cache",
            "out": tmp_path / "results.json",
        }
        return EvaluateConfig(**(given | changes))

    return make


def test_local_timm_folder(vit, tmp_path):
    """Pooled features and logits of the folder's network; grey networks get grey images; a headless one is no judge."""
    x = torch.from_numpy(pixels(3)).permute(0, 3, 1, 2)
    extractor = features.load_timm(str(vit))
    found = extractor(x)
    assert extractor.space == "judge" and found.pooled.shape == (3, 32) and found.logits.shape == (3, 5)
    grey = features.load_timm(str(save_vit(tmp_path / "grey", channels=1)))
    assert grey(x).pooled.shape == (3, 32)
    headless = save_vit(tmp_path / "headless", classes=0)
    assert features.load_timm(str(headless))(x).logits is None
    with pytest.raises(ValueError, match="has no classification head"):
        features.load_timm(str(headless), classifier=True)
    with pytest.raises(FileNotFoundError, match="absent"):
        features.load_timm(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        features.load_timm("no_such_network")
    with pytest.raises(ValueError, match="unknown features 'dino'"):
        features.load("dino")


def test_dinov2_positions_follow_its_own_code():
    """The grid is resampled by the factor (16 + 0.1) / 37 (timm: 16 / 37) and without antialias (timm: with)."""
    import timm

    network = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, depth=1)
    column = torch.arange(37)
    network.pos_embed.data[0, 1:, 0] = column.repeat(37) / 36
    network.pos_embed.data[0, 1:, 1] = (column % 2 * 2.0 - 1).repeat(37)
    features._position_like_dinov2(network, 224)
    assert network.patch_embed.img_size == (224, 224)
    grid = network.pos_embed[0, 1:].reshape(16, 16, -1).detach()
    centres = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5) / 36
    torch.testing.assert_close(grid[8, 2:14, 0], centres[2:14], rtol=0, atol=2e-3)  # the other factor: 5e-3 off
    assert grid[8, 2:14, 1].abs().mean() > 0.4  # antialias would blur alternating columns away


def test_a_measurement_from_files(settings, vit, tmp_path):
    """All metrics of one space, class accuracy, protocol and warnings arrive in results.json and the Markdown row."""
    everything = settings(
        density_coverage=True, kernel_distance=True, classifier=str(vit), memorization=3, error_groups=4
    )
    measure.measure(everything)
    found = load(tmp_path / "results.json")
    expected = {"fd_judge", "precision_judge", "recall_judge", "density_judge", "coverage_judge", "kd_judge"}
    assert set(found.metrics) == expected | {"class_accuracy", "authenticity"}
    extractor = features.load_timm(str(vit))
    pair = [
        compute_statistics(extractor(torch.from_numpy(pixels(n, seed=seed)).permute(0, 3, 1, 2)).pooled)
        for n, seed in ((60, 0), (40, 1))
    ]
    assert found.metrics["fd_judge"].value == pytest.approx(frechet_distance(*pair), rel=1e-4)
    assert found.metrics["fd_judge"].error > 0
    assert (found.metrics["fd_judge"].n_samples, found.metrics["fd_judge"].n_reference) == (40, 60)
    assert found.metrics["class_accuracy"].value == 1.0
    assert found.protocol["sampling"] == {"schema": 1, "mode": "sde", "steps": 250, "cfg_scale": 2.3}
    assert any("40 samples" in warning for warning in found.warnings)
    assert "sde 250" in (tmp_path / "results.md").read_text()
    with Image.open(tmp_path / "memorization.png") as picture:
        assert picture.size == (3 * (16 + 16 + 4 + 4), 16 + 4)


def test_wrong_labels_lower_the_accuracy(settings, vit, tmp_path):
    """The judge's answers shifted by one class are all wrong; missing or impossible labels are refused."""
    with np.load(tmp_path / "s.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    np.savez(tmp_path / "s.npz", images, (labels + 1) % 5)
    judged = settings(classifier=str(vit), features=(), reference=())
    found = measure.measure(judged)
    assert found.metrics["class_accuracy"].value == 0
    assert [warning.split(":")[0] for warning in found.warnings] == ["40 samples"]
    np.savez(tmp_path / "s.npz", images)
    with pytest.raises(ValueError, match=r"needs the labels of the samples \(arr_1\)"):
        measure.measure(judged)
    np.savez(tmp_path / "s.npz", images, labels + 5)
    with pytest.raises(ValueError, match=r"has label .*, the classifier .* 5 classes"):
        measure.measure(judged)


def test_generated_tokens_against_the_encoder(settings, vit, tmp_path):
    """Tokens read off the images themselves agree fully; the same tokens shifted by one image do not."""
    from models.encoder import load_encoder

    encoder = load_encoder(str(vit), 4)
    with np.load(tmp_path / "s.npz") as stored:
        tokens = encoder(torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2)).class_token.numpy()
    np.savez(tmp_path / "r.npz", pixels(60), np.arange(60) % 4)
    asked = {"features": (), "class_tokens": tmp_path / "tokens.npy", "encoder": str(vit), "token_grid": 4}
    np.save(tmp_path / "tokens.npy", tokens)
    found = measure.measure(settings(**asked)).metrics
    for key in ("token_cosine", "token_retrieval", "token_class_agreement"):
        assert found[key].value == pytest.approx(1, abs=1e-5), key
    assert found["token_cosine_shuffled"].value < 0.99
    np.save(tmp_path / "tokens.npy", np.roll(tokens, 1, axis=0))
    assert measure.measure(settings(**asked)).metrics["token_retrieval"].value < 0.2
    np.save(tmp_path / "tokens.npy", tokens[:30])
    with pytest.raises(ValueError, match=r"tokens\.npy holds float32 \(30, 32\), not one float vector for each of 40"):
        measure.measure(settings(**asked))


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 7}, {"dtype": "fp64"}])
def test_batch_size_and_dtype_leave_the_numbers(settings, change):
    usual, other = measure.measure(settings()), measure.measure(settings(cache=False, **change))
    for key, metric in usual.metrics.items():
        assert other.metrics[key].value == pytest.approx(metric.value, rel=1e-3), key


def test_reference_statistics_are_cached_by_content(settings, tmp_path, monkeypatch):
    """The second run does not read the reference's images; another content, network or setting makes a new entry."""
    first = measure.measure(settings())
    assert len(list((tmp_path / "cache").iterdir())) == 1
    passes = []
    monkeypatch.setattr("evaluations.reference.collect", lambda *args, **kwargs: passes.append(1))
    assert measure.measure(settings()).metrics == first.metrics
    assert not passes
    monkeypatch.undo()
    np.savez(tmp_path / "r.npz", pixels(60, seed=5))
    other = measure.measure(settings())
    assert other.metrics["fd_judge"] != first.metrics["fd_judge"]
    measure.measure(settings(pr_reference=30))
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_damaged_cache_is_told_and_written_anew(settings, tmp_path, capsys, keep):
    first = measure.measure(settings())
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:keep])
    assert measure.measure(settings()).metrics == first.metrics
    assert f"{entry} cannot be read" in capsys.readouterr().err
    assert len(entry.read_bytes()) == len(whole)


def test_statistics_in_a_reference_file_are_used(tmp_path, monkeypatch):
    """mu, sigma, mu_s and sigma_s of an ADM file give FID and sFID; its images serve the neighbours only."""
    colours = averages()
    fake = Extractor(
        "inception",
        "0",
        lambda x: (f := colours(x).pooled.double()) is not None and Features(f, 2 * f, f),
        torch.device("cpu"),
    )
    monkeypatch.setattr("evaluations.features.load", lambda *_, **__: fake)
    stats = compute_statistics(torch.randn(99, 12, generator=torch.Generator().manual_seed(0)) * 60 + 128)
    np.savez(
        tmp_path / "r.npz",
        arr_0=pixels(20),
        mu=stats.mean,
        sigma=stats.covariance,
        mu_s=stats.mean * 2,
        sigma_s=stats.covariance * 4,
    )
    np.savez(tmp_path / "s.npz", pixels(30, seed=1))
    found = measure.measure(
        EvaluateConfig(
            samples=(tmp_path / "s.npz",), reference=(tmp_path / "r.npz",), device="cpu", cache_dir=tmp_path / "cache"
        )
    )
    samples = compute_statistics(fake(torch.from_numpy(pixels(30, seed=1)).permute(0, 3, 1, 2)).pooled)
    assert found.metrics["fid"].value == pytest.approx(frechet_distance(stats, samples), rel=1e-10)
    assert found.metrics["sfid"].value == pytest.approx(4 * found.metrics["fid"].value, rel=1e-9)
    assert found.metrics["recall"].n_reference == 20
    assert (tmp_path / "results.json").is_file()


def test_two_processes_measure_the_same(settings, tmp_path, vit):
    """torchrun with 2 gloo processes gives the numbers of one: 41 images split unevenly, all metrics of one space."""
    np.savez(tmp_path / "s.npz", pixels(41, seed=1), np.arange(41) % 5)
    extra = {"density_coverage": True, "kernel_distance": True, "classifier": str(vit), "cache": False}
    single = measure.measure(settings(**extra))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "evaluations/evaluate.py",
        "--samples",
        tmp_path / "s.npz",
        "--reference",
        tmp_path / "r.npz",
        "--features",
        f"timm:{vit}",
        "--density-coverage",
        "--kernel-distance",
        "--classifier",
        vit,
        "--device",
        "cpu",
        "--no-cache",
        "--out",
        tmp_path / "two.json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    both = load(tmp_path / "two.json")
    assert both.metrics.keys() == single.metrics.keys() and both.warnings == single.warnings
    for key, metric in single.metrics.items():
        assert both.metrics[key].value == pytest.approx(metric.value, rel=1e-5), key


def test_program_errors_are_one_line(tmp_path):
    """The script form finds the project from any folder; a user's mistake is one line and status 2."""
    command = [sys.executable, str(ROOT / "evaluations" / "evaluate.py"), "--samples", str(tmp_path / "no.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'no.npz'} does not exist\n"


def test_where_results_cannot_be_written(settings, tmp_path, monkeypatch, capsys):
    """An --out that cannot be written ends it before the work; a cache that cannot be written does not."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot be made \(.*\); give another --out"):
        measure.measure(settings(out=tmp_path / "file" / "results.json"))
    with pytest.raises(ValueError, match=r"--out .* is a folder; give a file"):
        measure.measure(settings(out=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(ValueError, match=r"results cannot be written to .* give another --out"):
            measure.measure(settings())
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "cache").exists()
    measure.measure(settings(cache_dir=tmp_path / "file" / "cache"))
    assert "statistics are not kept: " in capsys.readouterr().out and (tmp_path / "results.json").is_file()


def test_steps_after_the_features_are_named(settings, capsys):
    measure.measure(settings(density_coverage=True))
    captured = capsys.readouterr()
    steps = [line.removeprefix("judge: ") for line in captured.out.splitlines() if line.startswith("judge: ")]
    first = ("fd, Frechet distance in 32 ", "precision and recall of 40 ", "density and coverage of 40 ")
    assert len(steps) == 3 and all(step.startswith(words) for step, words in zip(steps, first, strict=True))
    assert captured.err.count("100%") == 2 and "reference, judge" in captured.err and "samples, judge" in captured.err


@pytest.mark.parametrize("program", ["cknna", "compare", "evaluate", "report"])
def test_examples_of_the_help_can_be_given(program):
    """Every example is a command whose flags the program takes."""
    module = importlib.import_module(f"evaluations.{program}")
    (settings,) = (value for name, value in vars(module).items() if name.lower() == f"{program}config")
    for example in module.EXAMPLES:
        words = shlex.split(example)
        assert (
            f"evaluations{'/' if words[1].endswith('.py') else '.'}{program}" in example and len(module.EXAMPLES) == 2
        )
        words = words[2 if words[1].endswith(".py") else 3 :]
        parse(settings, "", words if words[0].startswith("-") else ["--results", *words])


@pytest.mark.parametrize(
    ("flag", "ours"),
    [("--ref", "--reference"), ("--sample-batch", "--samples"), ("--bs", "--batch-size"), ("--n", "--num-samples")],
)
def test_flags_of_other_projects(flag, ours):
    with pytest.raises(UserError, match=f"unknown argument '{flag}': here it is '{ours}'"):
        parse(EvaluateConfig, "", ["--samples", "a.npz", flag, "5"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"batch_size": 0}, "--batch-size"), ({"error_groups": 1}, "--error-groups 1"), ({"split": 0}, "--split")],
)
def test_impossible_settings(change, sentence, tmp_path):
    from evaluations.evaluate import _check

    with pytest.raises(UserError, match=sentence):
        _check(EvaluateConfig(samples=(tmp_path,), **change))


def test_suspicious_samples_are_reported(settings, tmp_path):
    """Constant, repeated and badly scaled samples and unknown makers each give a warning; for IS also sorted classes."""
    images = (pixels(40, seed=1) > 127).astype(np.uint8)
    images[7] = 1
    images[9] = images[8]
    (tmp_path / "s.json").unlink()
    np.savez(tmp_path / "s.npz", images, np.arange(40) // 8)
    told = " | ".join(measure.measure(settings()).warnings)
    for part in (
        "1 of 40 samples are a single colour",
        "1 of 40 samples are copies",
        "in [0, 1]",
        "no JSON beside s.npz",
    ):
        assert part in told, part
    ordered = np.arange(60) // 10
    assert any("IS uses chunks of 50" in line for line in sample_warnings(60, ordered, None, None, 50))
    assert any("sorted by class: shuffle" in line for line in sample_warnings(60, ordered, None, None, 100))
    assert not any("sorted" in line for line in sample_warnings(60, ordered.reshape(6, 10).T.ravel(), None, None, 50))
    assert any("64 images, fewer than Inception" in line for line in sample_warnings(60, None, None, 64, 50))


# ------------------------------------------------------------------------------------------------------- comparison


def result(name: str, fid: float, **protocol) -> Results:
    sampling = {"mode": "sde", "steps": protocol.pop("steps", 250), "cfg_scale": 2.3, "seed": protocol.pop("seed", 0)}
    settled = {"n_samples": 50_000, "reference_sha256": "r", "networks": {"inception": "i"}, "sampling": sampling}
    return Results({"fid": Metric(fid), "recall": Metric(1 / fid)}, settled | protocol, [], name)


def test_results_survive_the_file(tmp_path):
    before = result("a", 2.0)
    before.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == before
    assert json.loads((tmp_path / "a.json").read_text())["metrics"]["fid"] == 2.0
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json was not written by"):
        load(tmp_path / "a.json")


def test_equal_protocols_are_ranked():
    """Sorted by FID, best values bold: small for FID, large for recall; the seed may differ."""
    rows = [result("worse", 3.0), result("better", 2.0, seed=1)]
    assert compare.differences(rows) == {}
    lines = compare.table(rows, ranked=True).splitlines()
    assert lines[2].startswith("1 | better") and "**2.00**" in lines[2] and "**0.500**" in lines[2]
    assert lines[3].startswith("2 | worse") and "**" not in lines[3]


def test_different_protocols_are_not_ranked_unless_told():
    """Other numbers of images, references or steps are named; --across admits them one by one."""
    rows = [result("a", 3.0), result("b", 2.0, n_samples=10_000, steps=50)]
    assert set(compare.differences(rows)) == {"n_samples", "sampling.steps"}
    assert set(compare.differences(rows, ("steps",))) == {"n_samples"}
    assert compare.differences(rows, ("steps", "n_samples")) == compare.differences(rows, ("all",)) == {}
    assert compare.differences([result("a", 3.0), result("b", 2.0, sampling={"vae": "x"})]).keys() >= {"sampling.vae"}
    assert "Rank" not in compare.table(rows, ranked=False)
    with pytest.raises(UserError, match="no protocol key of that name"):
        compare.differences(rows, ("stepps",))


def test_compare_program(tmp_path):
    """Prints the table either way; status 2 and the differing keys when it will not rank."""
    result("a", 3.0).save(tmp_path / "a.json")
    result("b", 2.0, reference_sha256="q").save(tmp_path / "b.json")
    command = [sys.executable, "-m", "evaluations.compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "3.00" in done.stdout and "Rank" not in done.stdout
    assert "protocols differ in reference_sha256" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--across", "reference_sha256"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 | b" in done.stdout
