"""Settings of the programs: one frozen dataclass each, read from flags and an optional YAML recipe.

Precedence: a flag on the command line, then `--config FILE.yaml`, then the preset that either of them names, then the
dataclass default. Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import json
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input: one sentence that names the file, value or flag and says what to do."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or that belongs to one, does not exist."""


RESULT, RUN = "result", "run"  # roles of a setting: results depend on it; it says how or where to run


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str,
    choices: Sequence | None = None,
    also: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    role: str = RESULT,
) -> Any:
    """Declare one field of a settings dataclass.

    Args:
        default: value if the flag is not given; without one the flag is required.
        help: half a sentence for `--help`.
        group: heading in `--help`.
        choices: the only values allowed.
        also: names that people type for it in other projects; they are not accepted, the error names the right flag.
        at_least, above, at_most, below: the numbers allowed, for each number of a tuple; NaN never is.
        role: RESULT if what the program makes depends on it, so that work begun with another value is not continued; RUN if
            it only says how, where or how much (see `identity`).
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "group": group, "choices": choices, "also": tuple(also), "bounds": bounds, "role": role}
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    cls: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    examples: Sequence[str] = (),
    presets: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> T:
    """Read `cls` from the command line (and `--config FILE.yaml`).

    Args:
        cls: a dataclass whose fields are made by `setting`.
        description: of the program, for `--help`.
        argv: the arguments; default: those of this process.
        examples: whole commands, shown at the end of `--help`.
        presets: values of other settings by the value of the setting `preset`; a flag or the recipe overrides each one.

    Raises: SystemExit(2) from argparse for a malformed flag, UserError for a bad recipe or a missing required flag.
    """
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="recipe: any of the settings below, by name")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kind, nargs = _kind(hints[field.name])
        text = field.metadata["help"].replace("%", "%%")
        if field.default is dataclasses.MISSING:
            text += " (required)"
        elif field.default not in (None, "", ()):
            text += f" (default: {_show(field.default)})"
        flag = _flag(field.name)
        if kind is bool:
            groups[name].add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = field.metadata["choices"]
            metavar = None if choices else kind.__name__.upper()
            read = _reader(field, kind)
            groups[name].add_argument(flag, type=read, nargs=nargs, choices=choices, help=text, metavar=metavar)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--no-").lstrip("-").replace("-", "_")
        if name in REMOVED:
            raise UserError(f"{unknown[0]}: {_removed(name)}")
        raise UserError(f"unknown argument {unknown[0]!r}{_closest(name, cls, _flag)}; see --help")
    values = vars(given)
    recipe = values.pop("config", None)
    if recipe is not None:
        values = {**_read_recipe(cls, hints, recipe), **values}
    values = {**presets.get(values.get("preset"), {}), **values}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{_flag(field.name)} is required: {field.metadata['help']}")
    settings = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    for field in dataclasses.fields(cls):
        _check_bounds(field, getattr(settings, field.name))
    return settings


_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        for name, bound in field.metadata["bounds"].items():
            if bound is not None and number is not None and not _HOLDS[name](number, bound):
                raise UserError(f"{_flag(field.name)} must be {name.replace('_', ' ')} {bound}, got {number}")


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain values that JSON and YAML can hold."""
    plain = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def identity(settings: Any) -> dict[str, Any]:
    """The settings that results depend on (role RESULT), as `as_dict` gives them."""
    plain = as_dict(settings)
    return {field.name: plain[field.name] for field in dataclasses.fields(settings) if field.metadata["role"] == RESULT}


# ------------------------------------------------------------------------------------------------- files of former versions

LAST_WITH_REMOVED = "83daf46"  # the newest commit that had what is listed here
REMOVED = {  # settings that are gone => the value that their absence means
    "ema_device": "same",
    "guidance_schedule": "constant",
}
REMOVED_CHOICES = {"solver": ("ab2", "ab3"), "time_grid": ("quadratic", "cosine")}
_DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FORMER_WORDS = {  # names of precisions before all programs had the same ones
    "mixed_precision": {"no": "fp32"},
    "precision": {"no": "fp32"},
    "dtypes": _DTYPES,
    "dtype": _DTYPES,
    "vae_dtype": _DTYPES,
    "pr_dtype": _DTYPES,
}
NEUTRAL = frozenset({"compile"})  # was recorded, but changes no result


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between recorded settings and today's, as (name, before, now).

    A removed setting counts as equal to its absence where it had the value that its absence means, and a former word as the
    present one. `before` may lack settings that are newer than it.
    """
    plain = json.loads(json.dumps(now))  # tuples as JSON gives them back
    missing = object()
    found = []
    for name in {**before, **plain}:
        if name in NEUTRAL:
            continue
        a, b = (_present_word(name, side.get(name, REMOVED.get(name, missing))) for side in (before, plain))
        if a is not missing and a != b:
            found.append((name, a, None if b is missing else b))
    return found


def _present_word(name: str, value: Any) -> Any:
    return FORMER_WORDS.get(name, {}).get(value, value) if isinstance(value, str) else value


def _removed(name: str) -> str:
    return f"was removed; the last version that had it is commit {LAST_WITH_REMOVED}"


def _reader(field: dataclasses.Field, kind: type) -> Callable[[str], Any]:
    """Text => value for argparse, former words included."""
    gone = REMOVED_CHOICES.get(field.name, ())

    def read(text: str) -> Any:
        if text in gone:
            raise UserError(f"{_flag(field.name)} {text}: {_removed(field.name)}")
        return kind(_present_word(field.name, text))

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> tuple[type, str | None]:
    """Annotation => (type of one value, argparse nargs)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], "+"
    return hint, None


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _closest(name: str, cls: type, flag: Callable[[str], str] = str) -> str:
    """What may have been meant by an unknown name: a setting that other projects call so, or one spelled alike."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for field in fields.values():
        if name in field.metadata["also"]:
            return f": here it is {flag(field.name)!r}, {field.metadata['help']}"
    match = difflib.get_close_matches(name, [*fields, "config"], n=1)
    return f" (did you mean {flag(match[0])!r}?)" if match else ""


def _read_recipe(cls: type, hints: dict[str, Any], path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected `name: value` lines, found {type(content).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in REMOVED:
            if value == REMOVED[name]:
                continue
            raise UserError(f"--config {path}: {key}: {value}: {_removed(name)}")
        if name not in fields:
            raise UserError(f"--config {path}: unknown key {key!r}{_closest(name, cls)}")
        if value is False and name in FORMER_WORDS:
            value = "no"  # YAML reads the former word for fp32 as a boolean
        if isinstance(value, str):
            if value in REMOVED_CHOICES.get(name, ()):
                raise UserError(f"--config {path}: {key}: {value}: {_removed(name)}")
            value = _present_word(name, value)
        kind, nargs = _kind(hints[name])
        try:
            values[name] = _convert(value, kind, nargs, optional=type(None) in typing.get_args(hints[name]))
        except (TypeError, ValueError) as error:
            raise UserError(f"--config {path}: {key}: {value!r} is not a {kind.__name__}") from error
        choices = fields[name].metadata["choices"]
        if choices and values[name] is not None and values[name] not in choices:
            raise UserError(f"--config {path}: {key}: {value!r} is none of {', '.join(map(str, choices))}")
    return values


def _convert(value: Any, kind: type, nargs: str | None, *, optional: bool) -> Any:
    if value is None and optional:
        return None
    if nargs:
        return tuple(_convert(v, kind, None, optional=False) for v in (value if isinstance(value, list) else [value]))
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool | list | dict) or value is None:
        raise TypeError
    if kind is int and float(value) != int(value):
        raise ValueError
    return kind(value)
