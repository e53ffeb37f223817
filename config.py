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


class Settings(typing.Protocol):
    """Any dataclass whose fields are made by `setting`."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field]]


T = TypeVar("T", bound=Settings)


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

    Raises: UserError for a flag or recipe that cannot be read, a value out of its range, or a missing required flag.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    given, unknown = _parser(fields, hints, description, examples).parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--no-").lstrip("-").replace("-", "_")
        if name in REMOVED:
            raise UserError(f"{unknown[0]} {_REMOVED_TEXT}")
        raise UserError(f"unknown argument {unknown[0]!r}{_closest(name, fields, _flag)}; see --help")
    flags = vars(given)
    recipe = flags.pop("config", None)
    values = {} if recipe is None else _read_recipe(fields, hints, Path(recipe).expanduser())
    values |= {name: _value(fields[name], hints[name], text, _flag(name)) for name, text in flags.items()}
    values = {**presets.get(values.get("preset", ""), {}), **values}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{_flag(name)} is required: {field.metadata['help']}")
    settings = cls(**values)
    for name, field in fields.items():
        _check_bounds(field, getattr(settings, name))
    return settings


Fields = Mapping[str, dataclasses.Field]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One sentence in place of argparse's list of all flags."""
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def _parser(fields: Fields, hints: Mapping[str, Any], description: str, examples: Sequence[str]) -> _Parser:
    """Reads the words of each flag as they are; `_value` gives them their meaning."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe: any of the settings below, by name")
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        kind, many = _kind(hints[name])
        text = field.metadata["help"].replace("%", "%%")
        if field.default is dataclasses.MISSING:
            text += " (required)"
        elif field.default not in (None, "", ()):
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            text += f" (default: {' '.join(map(str, default))})"
        if kind is bool and _optional(hints[name]):  # --x, --x auto, --no-x
            words = text + " (default: auto)"
            groups[heading].add_argument(_flag(name), nargs="?", const="on", metavar="{auto,on,off}", help=words)
            groups[heading].add_argument(_flag(f"no_{name}"), dest=name, action="store_const", const="off")
            continue
        if kind is bool:
            groups[heading].add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
            continue
        choices = field.metadata["choices"]
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
        groups[heading].add_argument(_flag(name), nargs="+" if many else None, help=text, metavar=metavar)
    return parser


_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        for name, bound in field.metadata["bounds"].items():
            if bound is not None and number is not None and not _HOLDS[name](number, bound):
                raise UserError(f"{_flag(field.name)} must be {name.replace('_', ' ')} {bound}, got {number}")


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain values that JSON and YAML can hold."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that results depend on (role RESULT), as `as_dict` gives them."""
    plain = as_dict(settings)
    return {field.name: plain[field.name] for field in dataclasses.fields(settings) if field.metadata["role"] == RESULT}


# ------------------------------------------------------------------------------------------------- files of former versions

_REMOVED_TEXT = "was removed; commit 83daf46 is the last one that has it"
REMOVED = {  # settings that are gone => the value that their absence means
    "ema_device": "same",
    "guidance_schedule": "constant",
}
REMOVED_CHOICES = {"solver": ("ab2", "ab3"), "time_grid": ("quadratic", "cosine")}
PRECISIONS = frozenset({"mixed_precision", "precision", "dtype", "dtypes", "vae_dtype", "pr_dtype"})  # settings
FORMER_WORDS = {"no": "fp32", "float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # for them
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
    if isinstance(value, list):
        return [_present_word(name, one) for one in value]
    return FORMER_WORDS.get(value, value) if name in PRECISIONS and isinstance(value, str) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(hint: Any) -> tuple[type, bool]:
    """Annotation => (type of one value, whether there may be several)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _closest(name: str, fields: Fields, flag: Callable[[str], str] = str) -> str:
    """What may have been meant by an unknown name: a setting that other projects call so, or one spelled alike."""
    for field in fields.values():
        if name in field.metadata["also"]:
            return f": here it is {flag(field.name)!r}, {field.metadata['help']}"
    match = difflib.get_close_matches(name, [*fields, "config"], n=1)
    return f" (did you mean {flag(match[0])!r}?)" if match else ""


def _read_recipe(fields: Fields, hints: Mapping[str, Any], path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_bytes()  # PyYAML detects UTF-16 and UTF-8
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected `name: value` lines, found {type(content).__name__}")
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(tree, yaml.MappingNode)  # as the content is a dict
    lines: dict[str, int] = {}
    for key, _ in tree.value:  # YAML itself lets the last one win
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"--config {path}: {name} is given twice, in lines {lines[name]} and {line}")
        lines[name] = line
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in REMOVED:
            if value == REMOVED[name]:
                continue
            raise UserError(f"--config {path}: {key}: {value} {_REMOVED_TEXT}")
        if name not in fields:
            raise UserError(f"--config {path}: unknown key {key!r}{_closest(name, fields)}")
        values[name] = _value(fields[name], hints[name], value, f"--config {path}: {key}")
    return values


_SWITCH = {
    "auto": None,
    "on": True,
    "off": False,
}  # words of a setting that is True, False or, left to the program, None
_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}


def _value(field: dataclasses.Field, hint: Any, raw: Any, where: str) -> Any:
    """What a setting holds, from the words of a flag or the value in a recipe; former words mean the present ones."""
    kind, many = _kind(hint)
    if kind is bool and _optional(hint):
        raw = _SWITCH.get(raw, raw) if isinstance(raw, str) else raw
    if raw is None and _optional(hint):
        return None
    if many:
        return tuple(_value(field, kind, one, where) for one in (raw if isinstance(raw, list) else [raw]))
    if raw is False and field.name in PRECISIONS:
        raw = "no"  # YAML reads the former word for fp32 as a boolean
    raw = _present_word(field.name, raw)
    if isinstance(raw, str) and raw in REMOVED_CHOICES.get(field.name, ()):
        raise UserError(f"{where}: {raw} {_REMOVED_TEXT}")
    unfit = isinstance(raw, list | dict | None) or isinstance(raw, bool) != (kind is bool)
    try:
        if unfit or (kind is int and isinstance(raw, float) and not raw.is_integer()):
            raise ValueError
        value = Path(raw).expanduser() if kind is Path else kind(raw)
    except (ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: ~ without a home folder
        words = f"one of {', '.join(_SWITCH)}" if kind is bool and _optional(hint) else _IN_WORDS[kind]
        raise UserError(f"{where}: {raw!r} is not {words}") from error
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, choices))}")
    return value
