"""Dataclasses from JSON: every value has the annotated type before anything is computed from it."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from config import UserError

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


def build(cls: type[T], content: Any, name: str) -> T:
    """Make a dataclass of JSON content.

    Args:
        cls: the dataclass; its annotations are followed through list, tuple, dict, unions and dataclasses. An int has at
            most 63 bits, a float is finite.
        content: what the JSON holds.
        name: of the file, for the message.

    Raises:
        UserError: a key is unknown or missing, a value is of another type, or the dataclass refuses it; names the file.
    """
    if not isinstance(content, dict):
        raise UserError(f"{name} is not an object of names and values")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in content.keys() - fields.keys():
        raise UserError(f"{name} has an unknown entry {key!r}")
    for key, field in fields.items():
        if key not in content and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{name} lacks {key!r}")
    values = {key: _value(value, hints[key], f"{name}: {key}") for key, value in content.items()}
    try:
        return cls(**values)
    except UserError as error:  # of values that do not go together
        raise UserError(f"{name}: {error}") from error


def _value(value: Any, hint: Any, name: str) -> Any:
    """The value as the annotation wants it. Raises UserError."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(value, next(one for one in inner if one is not type(None)), name)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)  # type: ignore[arg-type]
    if kind in (list, tuple):
        if isinstance(value, list | tuple):
            return kind(_value(one, inner[0], f"{name}[{number}]") for number, one in enumerate(value))
        raise UserError(f"{name} is not a list")
    if kind is dict:
        if isinstance(value, dict):
            return {key: _value(one, inner[1], f"{name}.{key}") for key, one in value.items()}
        raise UserError(f"{name} is not an object of names and values")
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not hint or (hint is int and abs(value) >= 2**63) or (hint is float and not math.isfinite(value)):
        raise UserError(f"{name} is {str(value)[:40]!r}, not {_WORDS[hint]}")
    return value
