"""Frozen dataclasses to plain JSON data and back, every field's type checked on the way in.

What a file says is not trusted: a record is built only when each field is there, none is unknown,
and each value has the type that the dataclass declares. Known types are str, int, float, bool,
`X | None`, `tuple[X, ...]`, `dict[str, X]` and dataclasses of these; what may be `Any` is not
looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable
from typing import Any, TypeVar

Record = TypeVar("Record")
_MAX_FLOAT = 1e300


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers, as `json.dumps` writes them; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Record], data: Any, where: str = "") -> Record:
    """The inverse of `to_plain`.

    Args:
        kind: a dataclass; a field with a default may be missing.
        data: what `json.loads` gave.
        where: the place of `data` within the whole, for messages.

    Raises:
        ValueError: says which field, what was expected and what was found.
    """
    where = where or kind.__name__
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {_show(data)}")
    hints = _hints(typing.cast("Hashable", kind))
    if unknown := sorted(set(map(str, data)) - set(hints)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    values = {name: _value(hints[name], item, f"{where}.{name}") for name, item in data.items()}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        bare = field.default is dataclasses.MISSING
        if bare and field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{where}: field {field.name!r} is missing")
    return kind(**values)


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`, a type of the module docstring's list."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (some,) = (a for a in arguments if a is not type(None))
        return None if data is None else _value(some, data, where)
    if origin is tuple:
        _require(isinstance(data, list), "a list", data, where)
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _require(isinstance(data, dict), "an object", data, where)
        return {key: _value(arguments[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return from_plain(typing.cast("type[Any]", kind), data, where)
    return _scalar(kind, data, where)


def _scalar(kind: Any, data: Any, where: str) -> Any:
    """A bool is no number, an int may stand for a float; NaN, infinity, broken text are refused."""
    if kind is float:
        number = isinstance(data, (int, float)) and not isinstance(data, bool)
        _require(number and abs(data) < _MAX_FLOAT, "a finite number", data, where)
        return float(data)
    _require(type(data) is kind, kind.__name__, data, where)
    if kind is str:
        _require(data.isascii() or _encodable(data), "valid text", data, where)
    return data


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can spell but no terminal can print."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _require(holds: bool, expected: str, data: Any, where: str) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {_show(data)}")


def _show(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
