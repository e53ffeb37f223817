"""Files that were made to do harm: refused in one sentence, where they are read."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest

from common import arrays, files
from common.files import fingerprint, read_json, read_sealed, write_sealed
from config import UserError
from dataset import PackedDataset
from models.model_file import read_info
from packed.format import read_manifest
from preprocessing import pack
from tests.packs import flags
from tests.tiny import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("hostile") / "data")


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data")


@pytest.mark.parametrize("manifest", ["shard-00000.json", "dataset.json"])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_a_manifest_that_names_a_file_outside_of_the_folder(toys, tmp_path, manifest, absolute, capsys):
    """`--repair` deletes nothing outside, and the dataset is not read."""
    out, victim = shutil.copytree(toys / "packed", tmp_path / "out"), tmp_path / "victim.npy"
    victim.write_text("precious")
    content = read_sealed(out / manifest, "")
    entry = content if manifest == "shard-00000.json" else content["shards"][0]
    entry["files"]["label"]["file"] = str(victim) if absolute else "../victim.npy"
    write_sealed(out / manifest, content)
    if manifest == "dataset.json":
        with pytest.raises(
            UserError, match=r"dataset\.json names the file '.*victim\.npy', which is not a plain file name"
        ):
            PackedDataset(out)
        (out / "packing.json").unlink()  # then the manifest is what --repair rests on
    with pytest.raises(UserError, match="broken files"):
        pack.main(["--out", str(out), "--verify"])
    assert "not a plain file name" in capsys.readouterr().out
    if manifest == "shard-00000.json":
        pack.main(flags(toys, out, "--repair"))
        pack.main(["--out", str(out), "--verify"])
    assert victim.read_text() == "precious"


def test_a_file_of_another_field_or_shard_is_refused(copy):
    """A plain name does not make it a shard's file: --repair would delete the plan."""
    content = read_sealed(copy / "dataset.json", "")
    for name in ("packing.json", "moments-00000.npy", "label.npy"):
        content["shards"][0]["files"]["label"]["file"] = name
        write_sealed(copy / "dataset.json", content)
        with pytest.raises(UserError, match=rf"'{name}' is not the name of a file of label"):
            read_manifest(copy)


CRAFTED = {
    "count": (-1, 0, 10**30, 1.5, "20", None, [], float("nan"), True),
    "resolution": (-8, "8", float("inf")),
    "classes": ("ash", [1, 2, 3], None),
    "fields": ([], {}, {"label": {}}, {"label": {"dtype": "int64", "shape": [-1]}}, {"../x": 1}),
    "fields.moments": ({"dtype": "object", "shape": [8, 4, 4]}, {"dtype": "float16", "shape": [10**30, 4, 4]}, 3),
    "fields.label": ({"dtype": "V0", "shape": []}, {"dtype": "int64", "shape": [2]}, {"dtype": ["int64"], "shape": []}),
    "shards": (
        [],
        {},
        [1],
        [{"count": -14, "files": {}}],
        [{"count": 20, "files": []}],
        [{"count": 2**62, "files": {}}],
    ),
    "encoders": ([{}], [{"name": "a", "dim": -1, "grid": 2}], [{"name": "a", "dim": 1e300, "grid": 2}], "abc"),
    "class_means": ("../x.npy", 1, "/etc/passwd"),
    "files": ({"../x": "0"}, {"/x": "0"}, [], {"x": 1}),
    "vae": ({"name": 3}, {"factor": "2"}, {"normalization": [1]}, {"path": "x"}, "ema"),
    "unknown": (1,),
    "schema": ([], "1", 2, None),
}


@pytest.mark.parametrize("key", CRAFTED)
def test_crafted_values_of_a_manifest(copy, key):
    """Negative, huge, fractional, of another type: one sentence that names the file, and no large allocation."""
    content = read_sealed(copy / "dataset.json", "")
    for value in CRAFTED[key]:
        changed = json.loads(json.dumps(content))
        holder = changed["fields"] if "." in key else changed
        holder[key.split(".")[-1]] = value
        write_sealed(copy / "dataset.json", changed)
        with pytest.raises(UserError, match=r"dataset\.json"):
            PackedDataset(copy)


def test_json_that_is_nested_without_end(tmp_path):
    """100,000 brackets: no RecursionError."""
    for text in ("[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
            read_json(tmp_path / "x.json")
        with pytest.raises(UserError, match=r"x\.json is damaged .*; do this"):
            read_sealed(tmp_path / "x.json", "do this")
    deep = "[" * 900 + "]" * 900
    (tmp_path / "x.json").write_text(f'{{"a": {deep}, "checksum": "{fingerprint({})}"}}')
    with pytest.raises(UserError, match=r"x\.json"):
        read_sealed(tmp_path / "x.json", "")


def test_json_that_is_too_large(tmp_path, monkeypatch):
    """No more than the limit is read, also of an archive's member that unpacks to 12 GiB."""
    monkeypatch.setattr(files, "JSON_LIMIT", 100)
    (tmp_path / "x.json").write_text(" " * 1000)
    with pytest.raises(UserError, match=r"x\.json is larger than the 100 bytes"):
        read_json(tmp_path / "x.json", 100)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", bytes(10**7))
    with zipfile.ZipFile(content) as archive, archive.open("dataset.json") as stream:
        with pytest.raises(UserError, match=r"bomb: dataset\.json is larger than the 1,000 bytes"):
            files.read_bounded(stream, 1000, "bomb: dataset.json")
        assert stream.tell() <= 1001


@pytest.mark.parametrize("shape", ["(10**15, 8)", "(1000000000000,)", "(-2, -4)", "(2**70,)"])
def test_array_headers_that_lie_about_the_size(tmp_path, shape):
    """The size of the file decides before memory is taken, in npy and npz."""
    header = np.lib.format.magic(1, 0)
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {eval(shape)}, }}".ljust(117) + "\n"
    data = header + len(text).to_bytes(2, "little") + text.encode() + bytes(8)
    (tmp_path / "x.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", data)
    for read, name in ((arrays.read_npy, "x.npy"), (arrays.read_npz, "x.npz")):
        with pytest.raises(UserError, match=rf"{name}.* has \d+ bytes, its header says|{name}.* not an array"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["{'descr': '<f4', 'shape': (3, ", "  {1\n 1L", "{'descr': ',4'}", "-" * 9000, "(" * 9000]
)
def test_damaged_array_headers(tmp_path, text):
    """Whatever numpy's parser raises for them."""
    data = np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode()
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.npy is not an array of a known version"):
        arrays.read_npy(tmp_path / "x.npy")


def test_a_model_header_of_impossible_values(tmp_path):
    """Of another type, negative or unknown: a sentence that names the file."""
    from safetensors.numpy import save_file

    network = {"depth": 1, "hidden_size": 32, "num_heads": 2, "input_size": 4, "num_classes": 5}
    info = {"network": network, "path": "linear", "resolution": 8, "vae": "v", "normalization": {}, "schema": 1}
    for change in (
        {"network": 1},
        {"network": {**network, "depth": "2"}},
        {"network": {**network, "hidden_size": -32}},
        {"network": {**network, "depths": 2}},
        {"network": {**network, "num_heads": 0}},
        {"classes": 3},
        {"normalization": {"scale": ["x"]}},
        {"normalization": {"scale": [float("inf")]}},
        {"resolution": float("nan")},
        {"schema": [1]},
        {"other": 1},
    ):
        save_file({"a": np.zeros(1)}, tmp_path / "m", metadata={"reg": json.dumps({**info, **change})})
        with pytest.raises(UserError, match=r"/m( |:)"):
            read_info(tmp_path / "m")
    for text in ("[" * 100_000, "{", "3"):
        save_file({"a": np.zeros(1)}, tmp_path / "m", metadata={"reg": text})
        with pytest.raises(UserError, match=r"/m( |:)"):
            read_info(tmp_path / "m")


@pytest.mark.parametrize("name", ["packing.json", "index.npz", "shard-00000.json"])
def test_crafted_files_of_a_packing(toys, tmp_path, name, capsys):
    """With right checksums and impossible values: `--verify` names the file, packing refuses, nothing breaks."""
    out = shutil.copytree(toys / "packed", tmp_path / "out")
    path = out / name
    if name == "index.npz":
        arrays_ = dict(np.load(path))
        crafted = [
            {**arrays_, "labels": arrays_["labels"] + 10**6},
            {**arrays_, "places": arrays_["places"][:, :2]},
            {**arrays_, "labels": arrays_["labels"].astype("U3")},
            {**arrays_, "head": np.frombuffer(b"[" * 100_000, np.uint8)},
        ]
    else:
        content = read_sealed(path, "")
        keys = {
            "packing.json": ("count", "shard_size", "fields", "extends"),
            "shard-00000.json": ("count", "files", "skipped", "error", "enlarged", "plan"),
        }
        crafted = []
        for key in keys[name]:
            for value in (-1, 10**30, [1], None, 1.5, {"a": "x"}):
                changed = json.loads(json.dumps(content))
                (changed["settings"] if key == "shard_size" else changed)[key] = value
                crafted.append(changed)
    for changed in crafted:
        if name == "index.npz":
            np.savez(path, **changed)
            plan = read_sealed(out / "packing.json", "")
            write_sealed(out / "packing.json", {**plan, "index": files.sha256(path)})
        else:
            write_sealed(path, changed)
        with pytest.raises(UserError):
            pack.main(["--out", str(out), "--verify"])
        if name != "shard-00000.json":
            with pytest.raises(
                UserError, match=r"index\.npz is damaged .*; repair it with" if name == "index.npz" else None
            ):
                pack.main(flags(toys, out))
    if name == "shard-00000.json":  # which is written again
        pack.main(flags(toys, out))
        assert path.read_bytes() == (toys / "packed" / name).read_bytes()
