"""Each flag of each program changes something: it is read, and where objects are built from it cheaply, they differ."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from config import UserError
from packed.format import read_manifest
from tests.test_architecture import LIBRARY, MODULES, module_name
from tests.tiny import write_dataset
from train import TrainConfig
from training.plan import make_plan

CARRIERS = ("settings", "request", "config", "given")  # names of variables and attributes that hold settings


def settings_classes() -> dict[str, list[str]]:
    """Name of each dataclass whose fields are made by `setting` => its fields."""
    found = {}
    for path in MODULES:
        if not re.search(r"\bsetting\b", path.read_text()):
            continue
        for value in vars(importlib.import_module(module_name(path))).values():
            if dataclasses.is_dataclass(value) and value.__module__ == module_name(path):
                fields = [field.name for field in dataclasses.fields(value) if "group" in field.metadata]
                if fields:
                    found[f"{value.__module__}.{value.__name__}"] = fields
    return found


CLASSES = settings_classes()


def names_read(paths: list[Path]) -> set[str]:
    """Attributes and keys that code reads from something called settings, and words in modules that call getattr."""
    found: set[str] = set()
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        for node in nodes:
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
                holder = node.value
                name = getattr(holder, "id", getattr(holder, "attr", ""))
                if any(name.endswith(word) for word in CARRIERS) or name == "s":
                    key = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
                    found |= {key} if isinstance(key, str) else set()
        if any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "getattr" for n in nodes):
            found |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_is_read(name):
    """In the program's own package, in the programs, or for a benchmark in that benchmark."""
    top = name.split(".")[0]
    own = [path for path in MODULES if module_name(path) == name.rsplit(".", 1)[0]] if top == "benchmarks" else LIBRARY
    unread = set(CLASSES[name]) - names_read(own)
    assert not unread, f"{name}: nothing reads {', '.join(sorted(unread))}"


def test_the_settings_of_all_programs_are_found():
    names = {name.rsplit(".", 1)[1] for name in CLASSES}
    assert {"TrainConfig", "SampleConfig", "PackConfig", "EvaluateConfig", "CknnaConfig"} <= names
    assert all(len(fields) > 1 for fields in CLASSES.values())


def test_a_setting_that_nothing_reads_is_found(tmp_path):
    text = "def f(settings, other):\n    return settings.width + other.height + self.settings['depth']\n"
    (tmp_path / "a.py").write_text(text)
    assert names_read([tmp_path / "a.py"]) == {"width", "depth"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("flags") / "data", dims=(16, 12))


NETWORK = {"model": "SiT-S/2", "depth": 2, "hidden_size": 32, "num_heads": 2, "encoder_depth": 1, "projector_dim": 32}
DIFFERENT = {  # of the settings that say what is trained
    "model": "SiT-S/4",
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "patch_size": 1,
    "qk_norm": True,
    "class_token": False,
    "enc_type": ("toy-16",),
    "encoder_depth": 2,
    "projector_dim": 48,
    "path_type": "cosine",
    "weighting": "lognormal",
    "class_coeff": 0.1,
    "align_class_token": False,
    "proj_coeff": 0.1,
    "cfg_prob": 0.5,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_each_setting_changes_what_is_trained(data, name):
    """The network's config, the objective, or what is read of the dataset; or it contradicts the dataset and says so."""
    manifest = read_manifest(data)
    given = {**NETWORK, "data_dir": data, "exp_name": "x", "class_token": True}
    before = make_plan(TrainConfig(**given), manifest)
    if name == "model":
        given["patch_size"] = None
        given["depth"] = given["hidden_size"] = given["num_heads"] = None
    try:
        after = make_plan(TrainConfig(**{**given, name: DIFFERENT[name]}), manifest)
    except UserError as error:
        assert name in ("model", "patch_size") and "--patch-size" in str(error)
        return
    changed = [f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(after, f.name)]
    assert set(changed) & {"network", "objective", "fields", "encoders"}


@pytest.mark.parametrize("name", ["resolution", "num_classes"])
def test_settings_that_must_agree_with_the_dataset(data, name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} 16: dataset"):
        make_plan(TrainConfig(data_dir=data, exp_name="x", **{name: 16}), read_manifest(data))
