"""Inputs as a model declares them: every open size gets a number, every input its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twofour.bench.timing import Array
from twofour.core.errors import InputError
from twofour.engine import TensorInfo

_MAX_BYTES = 2**34


@dataclass(frozen=True)
class ModelInput:
    """An input as a model declares it.

    Attributes:
        name: of the input.
        dtype: numpy dtype name.
        dims: sizes; a name or None where one is open.
        declared_by: who says so, in words.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]
    declared_by: str = "the file"


def static_inputs(
    inputs: Sequence[ModelInput], shapes: Mapping[str, Sequence[int]], batch: int | None
) -> tuple[TensorInfo, ...]:
    """Gives every open size a number.

    Args:
        inputs: as the model declares them.
        shapes: input name -> whole shape; wins over `batch`.
        batch: for an open first size; None means 1.

    Raises:
        InputError: an unknown name, a shape that contradicts the model, or a size left open.
    """
    unknown = set(shapes) - {each.name for each in inputs}
    if unknown:
        names = ", ".join(each.name for each in inputs)
        raise InputError(f"no input {min(unknown)!r}", [f"the model has {names}"], "check --shapes")
    return tuple(static_input(each, shapes.get(each.name), batch) for each in inputs)


def static_input(
    declared: ModelInput, shape: Sequence[int] | None, batch: int | None
) -> TensorInfo:
    """One input of which every size is a number. Arguments and errors as above."""
    dims = declared.dims
    if shape is None:
        first = dims[:1]
        if first and not isinstance(first[0], int):
            first = (1 if batch is None else batch,)
        elif batch is not None and first != (batch,):
            raise _contradiction(declared, (batch, *dims[1:]))
        filled = (*first, *dims[1:])
    else:
        filled = tuple(shape)
        fits = [a == b or not isinstance(b, int) for a, b in zip(filled, dims, strict=False)]
        if len(filled) != len(dims) or not all(fits):
            raise _contradiction(declared, filled)
    sizes = tuple(dim for dim in filled if isinstance(dim, int))
    if len(sizes) != len(dims):
        raise InputError(
            f"input {declared.name!r} has open sizes",
            [f"{declared.declared_by} says {_show(dims)}"],
            f"give them, as --shapes {declared.name}:{_example(filled)}",
        )
    return TensorInfo(declared.name, declared.dtype, sizes)


def _example(dims: Sequence[int | str | None]) -> str:
    """Sizes for open ones such as networks often have: of an image, or of a text."""
    usual = 224 if len(dims) == 4 else 128
    return "x".join(str(dim) if isinstance(dim, int) else str(usual) for dim in dims)


def _contradiction(declared: ModelInput, got: Sequence[int | str | None]) -> InputError:
    return InputError(
        f"input {declared.name!r} cannot have shape {_show(got)}",
        [f"expected {_show(declared.dims)}, as {declared.declared_by} says"],
        "give a shape that fits, or export the model with a dynamic batch size",
    )


def _show(dims: Sequence[int | str | None]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims)


def random_feeds(inputs: Sequence[TensorInfo], seed: int = 0) -> dict[str, Array]:
    """Seeded input: standard normal floats, whole numbers 0 to 9, or booleans.

    Raises:
        InputError: an input too large to make.
    """
    random = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for info in inputs:
        dtype = np.dtype(info.dtype)
        if math.prod(info.shape) * dtype.itemsize > _MAX_BYTES:
            raise InputError(f"input {info.name!r} of shape {_show(info.shape)} is too large")
        if dtype.kind == "f":
            feeds[info.name] = random.standard_normal(info.shape, np.float32).astype(dtype)
        else:
            high = 2 if dtype.kind == "b" else 10
            feeds[info.name] = random.integers(0, high, info.shape).astype(dtype)
    return feeds
