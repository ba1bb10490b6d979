"""What the user decides for single tensors: their range, their type, or that they stay float.

    TEXT = "float" | [TYPE ":"] LOW ":" HIGH | "scale:" STEP | TYPE        TYPE = "int8" | "uint8"

`-3:3` is a range, `uint8:0:6` one with a zero point, `scale:0.05` the step of a symmetric int8.
What is decided for one tensor holds for all that share its scale, except `float`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from twofour.core.errors import InputError
from twofour.core.ranges import Activation, Range
from twofour.onnx_tools.options import TensorChoice
from twofour.onnx_tools.selection import nothing_matches

_FORMS = "float, int8, uint8, LOW:HIGH, int8:LOW:HIGH, uint8:LOW:HIGH or scale:STEP"
_LARGEST = 127


def parse_choice(text: str) -> TensorChoice:
    """Reads the form told above.

    Raises:
        InputError: not of this form, or a range without width.
    """
    if text == "float":
        return TensorChoice(stays_float=True)
    kind, _, rest = text.partition(":")
    if kind == "scale":
        step = _numbers(text, rest)
        if len(step) != 1 or step[0] <= 0:
            raise _bad(text, "a step above 0")
        return TensorChoice(span=Range(-_LARGEST * step[0], _LARGEST * step[0]), activation="int8")
    activation = _ACTIVATIONS.get(kind)
    if activation is not None and not rest:
        return TensorChoice(activation=activation)
    ends = _numbers(text, rest if activation is not None else text)
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise _bad(text, "two numbers, the lower one first")
    return TensorChoice(span=Range(*ends), activation=activation)


def parse_choices(texts: Iterable[str]) -> tuple[tuple[str, TensorChoice], ...]:
    """NAME=TEXT, for each tensor or pattern -> pairs.

    Raises:
        InputError: not of this form.
    """
    return tuple(_parsed_pair(text) for text in texts)


def read_choices(path: Path) -> tuple[tuple[str, TensorChoice], ...]:
    """A file of one table, JSON or (ending in .toml) TOML: {"NAME": "TEXT", ...} -> pairs.

    Raises:
        InputError: it cannot be read, or has something else in it.
    """
    try:
        content = path.read_text(encoding="utf-8")
        table: Any = tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read choices of tensors from {path}",
            [str(error)],
            'write {"NAME": "-3:3"} in JSON, or "NAME" = "-3:3" in TOML',
        ) from error
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise InputError(
            f"{path} is no table of texts",
            [f"expected NAME: TEXT, each TEXT one of {_FORMS}"],
            'write {"NAME": "-3:3"}',
        )
    return tuple((name, parse_choice(text)) for name, text in table.items())


def resolve(
    choices: Iterable[tuple[str, TensorChoice]], names: Mapping[str, str]
) -> dict[str, TensorChoice]:
    """What holds for each tensor that a pattern matches; of several patterns the last.

    Args:
        choices: pattern of names, choice.
        names: tensor that would be quantized -> the one that its scale is named after.

    Raises:
        InputError: a pattern matches none, or tensors of one scale are to have different ranges.
    """
    found: dict[str, TensorChoice] = {}
    for pattern, choice in choices:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise nothing_matches(f"no tensor {pattern!r} is quantized", pattern, names)
        found |= dict.fromkeys(hits, choice)
    given: dict[str, tuple[str, TensorChoice]] = {}
    for name, choice in found.items():
        other, same = given.setdefault(names[name], (name, choice))
        if choice != same and not (choice.stays_float or same.stays_float):
            raise InputError(
                f"tensors {other!r} and {name!r} share one scale, but are to have different ranges",
                [f"the scale is that of {names[name]!r}"],
                f"choose for {names[name]!r} alone",
            )
    return found


_ACTIVATIONS: dict[str, Activation] = {kind: kind for kind in get_args(Activation)}


def _parsed_pair(text: str) -> tuple[str, TensorChoice]:
    name, equals, choice = text.rpartition("=")
    if not (name and equals):
        raise _bad(text, "NAME=CHOICE")
    return name, parse_choice(choice)


def _numbers(text: str, part: str) -> list[float]:
    try:
        numbers = [float(each) for each in part.split(":")]
    except ValueError as error:
        raise _bad(text, _FORMS) from error
    if not all(map(math.isfinite, numbers)):
        raise _bad(text, "finite numbers")
    return numbers


def _bad(text: str, expected: str) -> InputError:
    return InputError(
        f"bad choice for a tensor: {text!r}",
        [f"expected {expected}"],
        f"NAME=CHOICE, with CHOICE one of {_FORMS}",
    )
