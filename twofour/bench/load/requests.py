"""The requests of a load, made once: from what the server tells of the model, or from files."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.bench.declared import ModelInput, random_feeds, static_inputs
from twofour.bench.load.client import Client, Content, Feeds, ModelInfo, Target
from twofour.bench.load.datatypes import DATATYPES
from twofour.core.errors import InputError, UnsupportedError
from twofour.engine import TensorInfo

_ALIKE, _MIXED = 8, 256
_MOST_BYTES = 1 << 28
_MOST_LENGTH = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What the requests shall look like.

    Attributes:
        batch: rows of a request, for inputs whose first size is open; None means 1.
        shapes: input name -> whole shape.
        arrays: input name -> array to send.
        lengths: sizes that all other open axes get, one drawn for each request; () for none.
        seed: of the data, and of the lengths' order.
    """

    batch: int | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    seed: int = 0


@dataclass(slots=True)
class Message:
    """One request.

    Attributes:
        data: what is sent.
        rows: in it.
        content: what its answer holds; found by asking once.
    """

    data: bytes
    rows: int
    content: Content | None = None


def parse_lengths(text: str) -> tuple[int, ...]:
    """64, or 8-128 (each equally likely), or a file with a whole number in each line.

    Raises:
        InputError: none of these.
    """
    low, dash, high = text.partition("-")
    if low.isdecimal() and (high.isdecimal() if dash else True):
        ends = (int(low), int(high or low))
        if 1 <= ends[0] <= ends[1] <= _MOST_LENGTH:
            return tuple(range(ends[0], ends[1] + 1))
    elif Path(text).is_file():
        words = Path(text).read_text(encoding="utf-8", errors="replace").split()
        if words and all(word.isdecimal() and 1 <= int(word) <= _MOST_LENGTH for word in words):
            return tuple(int(word) for word in words)
    raise InputError(
        f"bad --lengths {text!r}",
        ["expected a length, two as in 8-128, or a file with a whole number in each line"],
        "write it like --lengths 8-128",
    )


def make_requests(info: ModelInfo, wanted: Wanted, target: Target) -> list[dict[str, Any]]:
    """Feeds of requests, several so that no server learns one by heart.

    Args:
        info: what the server tells of the model.
        wanted: what they shall look like.
        target: where they go, for messages.

    Returns:
        name -> array, for each request.

    Raises:
        InputError: an input has no such name, shape or type.
        UnsupportedError: an input is of texts.
    """
    inputs = [_declared(each.name, each.datatype, each.shape, target) for each in info.inputs]
    shapes = dict(wanted.shapes)
    for name, array in wanted.arrays.items():
        if tuple(shapes.setdefault(name, array.shape)) != array.shape:
            reason = f"--shapes says {list(shapes[name])}, --input has {list(array.shape)}"
            raise InputError(f"two shapes for input {name!r}", [reason], "leave out --shapes")
    made: list[dict[str, Any]] = []
    size = 0
    for number, length in enumerate(_lengths(wanted, inputs)):
        sized = [_of_length(each, length) for each in inputs]
        feeds = _feeds(static_inputs(sized, shapes, wanted.batch), wanted, number, target)
        size += sum(array.nbytes for array in feeds.values())
        if made and size > _MOST_BYTES:
            break
        made.append(feeds)
        if set(wanted.arrays) == set(feeds):
            break
    return made


def encode(client: Client, requests: Sequence[Feeds]) -> list[Message]:
    """The requests as this client sends them."""
    return [Message(client.encode(feeds), rows_of(feeds)) for feeds in requests]


def rows_of(feeds: Feeds) -> int:
    """Size of the first axis, if all inputs agree on it; else 1."""
    sizes = {array.shape[0] if array.ndim else 1 for array in feeds.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def shapes_of(requests: Sequence[Feeds]) -> dict[str, str]:
    """Name -> the shape of an input, or its smallest and its largest."""
    found = {}
    for name in requests[0]:
        shapes = sorted({feeds[name].shape for feeds in requests}, key=math.prod)
        ends = dict.fromkeys("x".join(map(str, shape)) for shape in (shapes[0], shapes[-1]))
        found[name] = " to ".join(ends)
    return found


def in_turn(messages: Sequence[Message]) -> Iterator[Message]:
    """One after the other, without end."""
    return itertools.cycle(messages)


def _lengths(wanted: Wanted, inputs: Sequence[ModelInput]) -> list[int | None]:
    """One for each request that is made."""
    if not wanted.lengths:
        return [None] * _ALIKE
    if not any(None in each.dims[1:] for each in inputs):
        raise InputError(
            "--lengths has nothing to say",
            ["no input has an open axis beside the first"],
            "leave it out",
        )
    random = np.random.default_rng(wanted.seed)
    return [int(each) for each in random.choice(np.array(wanted.lengths), _MIXED)]


def _of_length(declared: ModelInput, length: int | None) -> ModelInput:
    if length is None:
        return declared
    dims = tuple(length if dim is None else dim for dim in declared.dims[1:])
    return dataclasses.replace(declared, dims=(*declared.dims[:1], *dims))


def _declared(name: str, datatype: str, shape: Sequence[int], target: Target) -> ModelInput:
    if datatype not in DATATYPES:
        raise UnsupportedError(
            f"{target.url}: input {name!r} of {target.model!r} is of type {datatype}",
            [f"expected one of {', '.join(DATATYPES)}"],
            "measure a model of numbers",
        )
    dims = tuple(None if size < 0 else size for size in shape)
    return ModelInput(name, DATATYPES[datatype].name, dims, "the server")


def _feeds(
    inputs: Sequence[TensorInfo], wanted: Wanted, number: int, target: Target
) -> dict[str, Any]:
    """The arrays given, and for other inputs data that a network of its kind may meet."""
    random = random_feeds(inputs, wanted.seed * 100_003 + number)
    for info in inputs:
        array = random[info.name]
        if array.dtype.kind in "iu" and "mask" in info.name:
            array[...] = 1
        elif array.dtype.kind in "iu" and "type" in info.name:
            array[...] = 0
        given = wanted.arrays.get(info.name)
        if given is not None and given.dtype.name != info.dtype:
            raise InputError(
                f"input {info.name!r} does not fit {target.model!r} on {target.url}",
                [f"expected {info.dtype}, got {given.dtype.name}"],
                f"convert it with .astype({info.dtype!r}) before numpy.save",
            )
    return {info.name: wanted.arrays.get(info.name, random[info.name]) for info in inputs}
