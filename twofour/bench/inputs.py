"""The one input that all contestants of a benchmark get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twofour.bench.timing import Array, Feeds
from twofour.core.errors import InputError
from twofour.engine import TensorInfo
from twofour.onnx_tools.load import load_model

_MAX_BYTES = 2**34


@dataclass(frozen=True)
class ModelInput:
    """An input as an ONNX file declares it.

    Attributes:
        name: of the input.
        dtype: numpy dtype name.
        dims: sizes; a name or None where the file leaves one open.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


def model_inputs(model: Path) -> tuple[ModelInput, ...]:
    """The inputs of an ONNX file.

    Raises:
        InputError: the file is none, or an input is no tensor of known rank.
    """
    found = []
    for value in load_model(model).graph.inputs:
        if value.shape is None or value.dtype is None:
            raise InputError(
                f"input {value.name!r} of {model} has no shape",
                ["expected a tensor of known rank"],
                "export the model with static shapes",
            )
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        found.append(ModelInput(str(value.name), value.dtype.numpy().name, dims))
    return tuple(found)


def static_inputs(
    inputs: Sequence[ModelInput], shapes: Mapping[str, Sequence[int]], batch: int | None
) -> tuple[TensorInfo, ...]:
    """Gives every open size a number.

    Args:
        inputs: as the file declares them.
        shapes: input name -> whole shape; wins over `batch`.
        batch: for an open first size; None means 1.

    Raises:
        InputError: an unknown name, a shape that contradicts the file, or a size left open.
    """
    unknown = set(shapes) - {each.name for each in inputs}
    if unknown:
        names = ", ".join(each.name for each in inputs)
        raise InputError(f"no input {min(unknown)!r}", [f"the model has {names}"], "check --shapes")
    return tuple(_static(each, shapes.get(each.name), batch) for each in inputs)


def _static(declared: ModelInput, shape: Sequence[int] | None, batch: int | None) -> TensorInfo:
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
            [f"the file says {_show(dims)}"],
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
        [f"expected {_show(declared.dims)}, as the file says"],
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


def require_feeds(feeds: Feeds, inputs: Sequence[ModelInput], model: Path) -> None:
    """Refuses an input that a model does not take.

    Raises:
        InputError: names, dtypes or shapes differ.
    """
    declared = {each.name: each for each in inputs}
    if set(declared) != set(feeds):
        raise InputError(
            f"{model} has other inputs than the engine",
            [f"expected {', '.join(sorted(feeds))}", f"got {', '.join(sorted(declared))}"],
            "give the model that the engine was built from",
        )
    for name, array in feeds.items():
        if declared[name].dtype != array.dtype.name:
            raise InputError(
                f"input {name!r} of {model} has another type than the engine's",
                [f"expected {array.dtype.name}, got {declared[name].dtype}"],
                "give the model that the engine was built from",
            )
        _static(declared[name], array.shape, None)
