"""Settings come from flags, then the recipe, then defaults; a mistake is one sentence."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.reporting import run
from config import UserError, as_dict, parse, setting
from evaluations.settings import EvaluateConfig
from preprocessing.pack import PackConfig
from sampling.settings import SampleConfig
from train import TrainConfig

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Example:
    data_dir: Path = setting(help="folder", group="data")
    batch_size: int = setting(256, "images per step", group="data")
    lr: float = setting(1e-4, "learning rate", group="optimisation")
    path_type: str = setting("linear", "interpolant", group="model", choices=("linear", "cosine"))
    ema: bool = setting(True, "keep an average", group="model")
    scale: float | None = setting(None, "guidance", group="model")
    classes: tuple[int, ...] = setting((), "labels", group="model")


def read(*argv):
    return parse(Example, "example", argv)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_flags_and_types():
    s = read("--data-dir", "d", "--lr", "3e-4", "--no-ema", "--scale", "2.3", "--classes", "1", "2")
    assert s == Example(Path("d"), 256, 3e-4, "linear", False, 2.3, (1, 2))
    assert as_dict(s)["data_dir"] == "d"


def test_recipe_then_flags(tmp_path):
    """A flag beats the recipe, the recipe beats the default; 1e-4 is a number in YAML as in Python."""
    path = recipe(tmp_path, "data-dir: d\nbatch_size: 32\nlr: 2e-4\nclasses: [3, 4]\nema: false\nscale: 2\n")
    assert read("--config", path, "--batch-size", "64") == Example(Path("d"), 64, 2e-4, "linear", False, 2.0, (3, 4))


@dataclass(frozen=True)
class Preset:
    preset: str | None = setting(None, "values by name", group="what", choices=("quick", "long"))
    steps: int = setting(10, "steps", group="what")
    scale: float | None = setting(1.0, "guidance", group="what")
    names: tuple[str, ...] = setting((), "names", group="what")


def test_a_preset_is_weaker_than_recipe_and_flags(tmp_path):
    """Flag, recipe, preset, default; the recipe may name the preset, and a flag another one."""
    presets = {"quick": {"steps": 2, "scale": None, "names": ("a", "b")}, "long": {"steps": 99}}

    def read(*argv):
        return parse(Preset, "", argv, presets=presets)

    path = recipe(tmp_path, "preset: quick\nsteps: 3\n")
    assert read() == Preset()
    assert read("--preset", "quick") == Preset("quick", 2, None, ("a", "b"))
    assert read("--preset", "quick", "--steps", "4", "--names", "c") == Preset("quick", 4, None, ("c",))
    assert read("--config", path) == Preset("quick", 3, None, ("a", "b"))
    assert read("--config", path, "--steps", "5") == Preset("quick", 5, None, ("a", "b"))
    assert read("--config", path, "--preset", "long") == Preset("long", 3, 1.0, ())
    assert read("--config", recipe(tmp_path, "preset: null")) == Preset()
    with pytest.raises(UserError, match="preset: 'brief' is none of quick, long"):
        read("--config", recipe(tmp_path, "preset: brief"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3", r"unknown key 'batchsize' \(did you mean 'batch_size'\?\)"),
        ("batch_size: many", "batch_size: 'many' is not a whole number"),
        ("batch_size: 1.5", "batch_size: 1.5 is not a whole number"),
        ("batch_size: true", "batch_size: True is not a whole number"),
        ("batch_size: [1, 2]", r"batch_size: \[1, 2\] is not a whole number"),
        ("batch_size: null", "batch_size: None is not a whole number"),
        ("batch_size: 1\nlr: 1\nbatch-size: 2", "batch_size is given twice, in lines 1 and 3"),
        ("batch_size: 1\nbatch_size: 1", "batch_size is given twice, in lines 1 and 2"),
        ("lr: fast", "lr: 'fast' is not a number"),
        ("classes: [1, a]", "classes: 'a' is not a whole number"),
        ("ema: 1", "ema: 1 is not true or false"),
        ("path_type: edm", "path_type: 'edm' is none of linear, cosine"),
        ("- a", "expected `name: value` lines, found list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read("--config", recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", "many"), "^--batch-size: 'many' is not a whole number$"),
        (("--batch-size", "1.5"), "^--batch-size: '1.5' is not a whole number$"),
        (("--lr", "fast"), "^--lr: 'fast' is not a number$"),
        (("--path-type", "edm"), "^--path-type: 'edm' is none of linear, cosine$"),
        (("--classes", "1", "a"), "^--classes: 'a' is not a whole number$"),
        (("--batch-size",), "^--batch-size: expected one argument; see --help$"),
        (("--classes",), "^--classes: expected at least one argument; see --help$"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        read("--data-dir", "d", *flags)


def test_missing_recipe_and_required_flag():
    with pytest.raises(UserError, match=r"--config nowhere.yaml: cannot be read"):
        read("--config", "nowhere.yaml")
    with pytest.raises(UserError, match="--data-dir is required: folder"):
        read()


def test_unknown_flag_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown argument '--batchsize' \(did you mean '--batch-size'\?\)"):
        read("--data-dir", "d", "--batchsize", "3")


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--lr", "--learning-rate"),
        ("--epochs=80", "--max-train-steps"),
        ("--bs", "--batch-size"),
        ("--wd", "--adam-weight-decay"),
        ("--data-path", "--data-dir"),
        ("--ema", "--ema-decay"),
    ],
)
def test_flags_of_other_projects_are_answered_by_ours(flag, ours):
    """What people type from habit is an error that names the right flag and says what it is."""
    with pytest.raises(UserError, match=f"unknown argument '{flag}': here it is '{ours}', [a-z]"):
        parse(TrainConfig, "", [flag, "1"])


def test_names_of_other_projects_do_not_hide_ours():
    """No alias is the name of another setting, and none stands for two settings."""
    for program in (TrainConfig, SampleConfig, PackConfig, EvaluateConfig):
        fields = dataclasses.fields(program)
        aliases = [alias for field in fields for alias in field.metadata["also"]]
        assert len(set(aliases)) == len(aliases) and not set(aliases) & {field.name for field in fields}


def test_examples_end_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(Example, "", ["--help"], examples=("toy --rate 1", "toy --rate 2"))
    assert capsys.readouterr().out.rstrip().endswith("examples:\n  toy --rate 1\n  toy --rate 2")


@pytest.mark.parametrize("program", ["train.py", "generate.py", "preprocessing/pack.py", "evaluations/evaluate.py"])
def test_help_is_grouped_and_does_not_import_torch(program):
    """--help answers at once, from any folder."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_module(%r, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported for --help'\n"
    ).replace("%r", repr(program.removesuffix(".py").replace("/", ".")))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config FILE.yaml" in done.stdout and done.stdout.count(":\n") >= 3, done.stdout


def test_a_missing_package_is_named(capsys):
    """`python train.py` outside of the environment says what to activate; a module of ours that is missing is a bug."""

    def needs(name):
        def main():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return main

    with pytest.raises(SystemExit) as stop:
        run(needs("torch.nn"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert re.search(r"^error: the package torch is not installed for \S+: `source .venv/bin/activate`", message)
    for ours in ("training.nothing", "dataset"):
        with pytest.raises(ModuleNotFoundError):
            run(needs(ours))
