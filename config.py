"""Settings of the programs: one frozen dataclass each, read from flags and an optional YAML recipe.

Precedence: a flag on the command line, then `--config FILE.yaml`, then the preset that either of them names, then the
dataclass default. Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import sys
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


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str,
    choices: Sequence | None = None,
    also: Sequence[str] = (),
) -> Any:
    """Declare one field of a settings dataclass.

    Args:
        default: value if the flag is not given; without one the flag is required.
        help: half a sentence for `--help`.
        group: heading in `--help`.
        choices: the only values allowed.
        also: names that people type for it in other projects; they are not accepted, the error names the right flag.
    """
    metadata = {"help": help, "group": group, "choices": choices, "also": tuple(also)}
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
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
            groups[name].add_argument(flag, type=kind, nargs=nargs, choices=choices, help=text, metavar=metavar)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--no-").lstrip("-").replace("-", "_")
        raise UserError(f"unknown argument {unknown[0]!r}{_closest(name, cls, _flag)}; see --help")
    values = vars(given)
    recipe = values.pop("config", None)
    if recipe is not None:
        values = {**_read_recipe(cls, hints, recipe), **values}
    values = {**presets.get(values.get("preset"), {}), **values}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{_flag(field.name)} is required: {field.metadata['help']}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run(main: Callable[[], None]) -> None:
    """Call a program's `main`; a user's mistake or a missing package ends it with one line on stderr and exit status 2.

    ValueError and FileNotFoundError are what the rooms below raise for bad input; other exceptions are bugs of ours
    and keep their traceback.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        here = Path(__file__).parent
        if not package or (here / package).exists() or (here / f"{package}.py").exists():
            raise
        sys.stderr.write(
            f"error: the package {package} is not installed for {sys.executable}: `source .venv/bin/activate` after "
            "`bash setup.sh`, or `pip install -r requirements.txt -c constraints.txt`\n"
        )
        raise SystemExit(2) from error


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain values that JSON and YAML can hold."""
    plain = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


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
        if name not in fields:
            raise UserError(f"--config {path}: unknown key {key!r}{_closest(name, cls)}")
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
