"""Records of a packed dataset that are not what was written: named when they are first read, labels at the start."""

import shutil
import zlib

import numpy as np
import pytest

import train
from config import UserError
from dataset import PackedDataset, StepSampler, read_ahead
from evaluations.image_sets import open_images
from packed import checks
from packed.format import read_manifest, write_manifest
from packed.writer import write_shard
from tests.packs import flip
from tests.tiny import train_flags, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("damaged") / "data", pixels=True)


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


def relabel(folder, row, label, *, as_packed):
    """Change a label of the second shard, which begins with record 14; as_packed: with the checksums of then."""
    manifest = read_manifest(folder)
    arrays = {name: np.load(folder / f"{name}-00001.npy") for name in manifest.fields}
    arrays["label"][row] = label
    if as_packed:
        manifest.shards[1] = write_shard(folder, 1, arrays)
        write_manifest(folder, manifest)
    else:
        np.save(folder / "label-00001.npy", arrays["label"])


@pytest.mark.parametrize("as_packed", [False, True], ids=["changed", "packed so"])
@pytest.mark.parametrize("label", [3, -1, 10**6, -(2**63)])
def test_a_label_that_is_no_class(copy, tmp_path, label, as_packed):
    """The number of classes would train the null class: training and its dry run name shard and record at the start."""
    relabel(copy, 2, label, as_packed=as_packed)
    words = rf"label-00001\.npy: record 16 \(row 2\) has label {label}, but the classes are 0 to 2"
    for dry in ((), ("--dry-run",)):
        with pytest.raises(UserError, match=words):
            train.main(train_flags(copy, tmp_path, *dry))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=words):
        open_images([copy])


def test_a_label_that_has_become_another_class(copy):
    label = np.load(copy / "label-00001.npy")[0]
    relabel(copy, 0, (label + 1) % 3, as_packed=False)
    with pytest.raises(UserError, match=r"label-00001\.npy does not match its checksum"):
        PackedDataset(copy)


@pytest.mark.parametrize("field", ["moments", "pixels", "class_token.0", "patch_tokens.0"])
def test_a_record_that_has_changed(copy, field):
    """The reading threads find it, whichever field it is, and name record, field, file and remedy; others are read."""
    flip(copy / f"{field}-00001.npy", -1)  # the last record, 19
    dataset = PackedDataset(copy)
    words = rf"record 19 is damaged: its {field} \(row 5 of .*{field}-00001\.npy\) .*--repair"
    with pytest.raises(UserError, match=words):
        for batch in read_ahead(dataset, StepSampler(20, 4, seed=0)):
            assert 19 not in batch.index
    assert dataset[range(19)].label.shape == (19,)
    with pytest.raises(UserError, match="record 19"):
        dataset[[3, 19]]
    rest = tuple(name for name in dataset.fields if name != field)
    assert PackedDataset(copy, rest)[[19]].index.tolist() == [19]


def test_damaged_pixels_are_not_measured(copy):
    flip(copy / "pixels-00000.npy", -1)
    with pytest.raises(UserError, match="record 13 is damaged: its pixels"):
        open_images([copy]).read(8, 16)


def test_damaged_checksums_are_not_believed(copy):
    """A flipped bit in the file of the CRC-32 is named as such, not as a damaged record."""
    flip(copy / "crc-00000.npy", -1)
    with pytest.raises(UserError, match=r"crc-00000\.npy does not match its checksum"):
        PackedDataset(copy)[[0]]
    (copy / "crc-00000.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"crc-00000\.npy is missing"):
        PackedDataset(copy)


def test_records_are_compared_once(copy, monkeypatch):
    """Each field of each record in the first epoch, nothing in the second."""
    counted = []
    monkeypatch.setattr(checks, "crc32", lambda data: counted.append(1) or zlib.crc32(data))
    dataset = PackedDataset(copy)
    sampler = StepSampler(20, 4, seed=0)
    for step in range(10):
        dataset[sampler.indices(step, 0)]
        assert len(counted) == min(4 * (step + 1), 20) * len(dataset.fields)


def test_a_dataset_without_checksums_of_records(copy, capsys):
    """Of an earlier version: read as before, and a message names the command that compares whole files."""
    manifest = read_manifest(copy)
    for shard in manifest.shards:
        del shard["files"]["crc"]
    write_manifest(copy, manifest)
    flip(copy / "moments-00001.npy", -1)
    assert PackedDataset(copy)[[19]].index.tolist() == [19]
    assert capsys.readouterr().out.count("--verify` compares whole files") == 1
