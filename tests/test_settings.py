"""Values of settings: ranges, roles, words of former versions, and what recorded settings mean today."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from config import RUN, UserError, differences, identity, parse, setting
from tests.test_architecture import MODULES, ROOT, module_name
from tests.test_config import read, recipe


def test_large_whole_numbers_are_kept(tmp_path):
    """2**53 + 1 has no float64: it must not pass through one."""
    number = 2**53 + 1
    assert read("--data-dir", "d", "--batch-size", str(number)).batch_size == number
    assert read("--data-dir", "d", "--config", recipe(tmp_path, f"batch_size: {number}")).batch_size == number
    assert read("--data-dir", "d", "--config", recipe(tmp_path, "batch_size: 8.0")).batch_size == 8


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    """The shell leaves --data-dir=~/d as it is."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert read("--data-dir=~/d").data_dir == Path("/home/someone/d")
    assert read("--config", recipe(tmp_path, "data_dir: ~/d")).data_dir == Path("/home/someone/d")


@dataclass(frozen=True)
class Ranges:
    steps: int = setting(10, group="g", at_least=1)
    rate: float = setting(0.5, group="g", above=0, below=1)
    shares: tuple[float, ...] = setting((), group="g", at_least=0, at_most=1)
    limit: float | None = setting(None, group="g", above=0, role=RUN)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--rate", "0"), "--rate must be above 0, got 0.0"),
        (("--rate", "1"), "--rate must be below 1, got 1.0"),
        (("--rate", "nan"), "--rate must be above 0, got nan"),
        (("--shares", "0.5", "1.5"), "--shares must be at most 1, got 1.5"),
        (("--limit", "-1"), "--limit must be above 0, got -1.0"),
    ],
)
def test_bounds(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        parse(Ranges, "", flags)
    name, values = flags[0].removeprefix("--"), ", ".join(flags[1:]).replace("nan", ".nan")
    with pytest.raises(UserError, match=words):
        parse(Ranges, "", ["--config", recipe(tmp_path, f"{name}: {f'[{values}]' if name == 'shares' else values}")])


def test_bounds_include_their_ends_where_they_say_so():
    settings = Ranges(1, 0.5, (0.0, 1.0), None)
    assert parse(Ranges, "", ["--steps", "1", "--shares", "0", "1"]) == settings


@dataclass(frozen=True)
class Switch:
    compile: bool | None = setting(None, "speed", group="g")
    other: bool = setting(False, group="g")


@pytest.mark.parametrize(
    ("flags", "text", "value"),
    [
        ((), "other: false", None),
        (("--compile", "auto"), "compile: auto", None),
        (("--compile",), "compile: true", True),
        (("--no-compile",), "compile: false", False),
        (("--compile", "off"), "compile: off", False),
    ],
)
def test_a_switch_may_be_left_to_the_program(tmp_path, flags, text, value):
    """As flags and in a recipe, in which `true` and `false` mean what they always did; a flag overrides the recipe."""
    assert parse(Switch, "", flags).compile is value
    assert parse(Switch, "", ["--config", recipe(tmp_path, text)]).compile is value
    assert parse(Switch, "", ["--config", recipe(tmp_path, text), "--no-compile"]).compile is False
    with pytest.raises(UserError, match="compile: 'fast' is not one of auto, on, off"):
        parse(Switch, "", ["--compile", "fast"])


def test_identity_is_what_results_depend_on():
    assert identity(Ranges(limit=2.0)) == {"steps": 10, "rate": 0.5, "shares": ()}


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ({"steps": 1}, {"steps": 1}, []),
        ({"steps": 1}, {"steps": 2}, [("steps", 1, 2)]),
        ({"shares": [1, 2]}, {"shares": (1, 2)}, []),
        ({}, {"newer": 1}, []),
        ({"older": 1}, {}, [("older", 1, None)]),
        ({"ema_device": "same"}, {}, []),
        ({"ema_device": "cpu"}, {}, [("ema_device", "cpu", "same")]),
        ({"guidance_schedule": "linear"}, {}, [("guidance_schedule", "linear", "constant")]),
        ({"mixed_precision": "no"}, {"mixed_precision": "fp32"}, []),
        ({"mixed_precision": "no"}, {"mixed_precision": "bf16"}, [("mixed_precision", "fp32", "bf16")]),
        ({"dtype": "bfloat16", "dtypes": ["float32"]}, {"dtype": "bf16", "dtypes": ("fp32",)}, []),
        ({"compile": True}, {}, []),
    ],
)
def test_recorded_settings_are_compared_by_meaning(before, now, found):
    assert differences(before, now) == found


@dataclass(frozen=True)
class Renamed:
    mixed_precision: str = setting("auto", group="g", choices=("auto", "fp32", "bf16"))
    dtypes: tuple[str, ...] = setting((), group="g", choices=("fp32", "bf16"))
    solver: str = setting("euler", group="g", choices=("euler", "heun"))


def test_former_words_mean_the_present_ones(tmp_path):
    """As flags and in a recipe, where YAML reads `no` as a boolean."""
    expected = Renamed("fp32", ("fp32", "bf16"))
    assert parse(Renamed, "", ["--mixed-precision", "no", "--dtypes", "float32", "bfloat16"]) == expected
    text = "mixed_precision: no\ndtypes: [float32, bfloat16]\nema_device: same\n"
    assert parse(Renamed, "", ["--config", recipe(tmp_path, text)]) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--solver", "ab2"), "^--solver: ab2 was removed; commit [0-9a-f]{7} is the last one that has it$"),
        (("--ema-device", "cpu"), "^--ema-device was removed; commit [0-9a-f]{7} is"),
        (("--guidance-schedule=linear",), "^--guidance-schedule=linear was removed; commit"),
        (("--config", "solver: ab3"), "solver: ab3 was removed; commit"),
        (("--config", "ema_device: cpu"), "ema_device: cpu was removed; commit"),
    ],
)
def test_what_was_removed_is_named(tmp_path, flags, words):
    if flags[0] == "--config":
        flags = ("--config", recipe(tmp_path, flags[1]))
    with pytest.raises(UserError, match=words):
        parse(Renamed, "", flags)


def test_help_of_every_program_imports_no_torch():
    """Whatever calls `parse`: programs, and benchmarks, whose settings are read before torch is there."""
    starts = re.compile(r"^if __name__ == .__main__.:\n    run\(main\b", re.MULTILINE)
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES}
    modules = [path for path, text in texts.items() if starts.search(text) and "import argparse" not in text]
    assert len(modules) > 12
    code = (
        "import runpy, sys\n"
        f"for module in {[module_name(path) for path in modules]!r}:\n"
        "    sys.argv = [module, '--help']\n"
        "    try: runpy.run_module(module, run_name='__main__')\n"
        "    except SystemExit as stop: assert not stop.code, module\n"
        "    assert 'torch' not in sys.modules, module\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(modules)
