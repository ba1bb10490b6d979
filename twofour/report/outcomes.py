"""A run's document read as an `Outcome`, whatever of it there is.

    {"checks": [{"name": "speed", "value": null}]}  ->  checks=(Check("speed", "", nan, ...

What is missing is as empty as its type can be, and a number that JSON cannot spell (it has null
there) is NaN, or None where that is allowed. Only what is of another type is refused.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from twofour.core.errors import InputError
from twofour.core.outcome import Outcome

_EMPTY = {str: "", int: 0, float: math.nan, bool: False}


def read_outcome(document: Mapping[str, Any]) -> Outcome:
    """The outcome of a run.

    Args:
        document: the plain form of an `Outcome`, or a part of it; other keys are not looked at.

    Raises:
        InputError: a field has another type than it should.
    """
    try:
        found: Outcome = _record(Outcome, document, "run")
    except ValueError as e:
        raise InputError(
            "this is no record of a run", [str(e)], "name the run.json of `twofour pipeline`"
        ) from e
    return found


def read_record(kind: type[Any], data: Any, where: str) -> Any:
    """Another dataclass, as leniently.

    Raises:
        ValueError: says which field has another type than it should.
    """
    return _record(kind, data, where)


def _record(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, got {_show(data)}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: _value(hints[name], data.get(name), f"{where}.{name}") for name in names})


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`; None for what is missing."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (some,) = (a for a in arguments if a is not type(None))
        return None if _is_none(data) else _value(some, data, where)
    if kind is Any:
        return data
    if origin is tuple:
        _require(data is None or isinstance(data, (list, tuple)), "a list", data, where)
        items = list(data or ())
        return tuple(_value(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(items))
    if origin is dict:
        _require(data is None or isinstance(data, Mapping), "an object", data, where)
        pairs = dict(data or {}).items()
        return {_text(k): _value(arguments[1], item, f"{where}[{k!r}]") for k, item in pairs}
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast("type[Any]", kind), {} if data is None else data, where)
    return _scalar(kind, data, where)


def _scalar(kind: Any, data: Any, where: str) -> Any:
    """An int may stand for a float; a number that no drawing can hold is none."""
    if data is None:
        return _EMPTY[kind]
    if kind is float:
        _require(isinstance(data, (int, float)) and type(data) is not bool, "a number", data, where)
        return math.nan if _is_none(data) else float(data)
    _require(type(data) is kind, kind.__name__, data, where)
    if kind is int:
        return min(max(data, -_MOST), _MOST)
    return _text(data) if kind is str else data


def _text(data: Any) -> str:
    """What a file can hold: half a surrogate pair, which JSON can spell, becomes "?"."""
    return str(data).encode(errors="replace").decode()


_LARGEST, _MOST = 1e200, 1 << 62


def _is_none(data: Any) -> bool:
    """Whether there is nothing, or a number beyond what can be drawn."""
    return data is None or (type(data) in (int, float) and not abs(data) <= _LARGEST)


def _require(holds: bool, expected: str, data: Any, where: str) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, got {_show(data)}")


def _show(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
