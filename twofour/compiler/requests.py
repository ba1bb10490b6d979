"""What the user asks of a profile: a shape for each input, or a range of shapes.

    "x": (8, 3, 224, 224)                                   one shape
    "ids": ((1, 16), (8, 128), (32, 512))                   smallest, usual and largest

A dimension whose smallest and largest value differ is open. Dimensions that carry one name in the
model are one symbol, in whichever inputs they stand.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from twofour.core.abi import MAX_SYMBOLS
from twofour.core.data import DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.feeds import runs
from twofour.core.sizes import Symbol
from twofour.onnx_tools.reference import input_form

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
Requested = Mapping[str, Shape | ShapeRange]


@dataclass(frozen=True)
class Request:
    """One profile, before the model is read for it.

    Attributes:
        symbols: its open dimensions.
        axes: for each input that was given a shape, the index of the symbol of each axis, or the
            size as a negative number where it is fixed.
    """

    symbols: tuple[Symbol, ...]
    axes: Mapping[str, tuple[int, ...]]

    def shapes_at(self, values: Sequence[int]) -> dict[str, Shape]:
        """The shapes of the inputs given, where the symbols have these values."""
        return {
            name: tuple(-axis if axis < 0 else values[axis] for axis in axes)
            for name, axes in self.axes.items()
        }


def became_one(graph: ir.Graph, given: Collection[str]) -> str:
    """A remark on the open dimensions that nobody gave a size; "" if there are none.

    Args:
        graph: of the model as loaded.
        given: names of the inputs whose shapes the user gave.
    """
    dims = [
        (value.name, axis, dim)
        for value in graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if not isinstance(dim, int)
    ]
    known = {dim.value for name, _, dim in dims if name in given} - {None}
    taken = [
        f"{name}[{axis}]"
        for name, axis, dim in dims
        if name not in given and dim.value not in known
    ]
    return f"open sizes became 1, as none were given: {', '.join(taken)}" if taken else ""


def with_open_sizes(error: InputError, graph: ir.Graph, given: Collection[str]) -> InputError:
    """The error, and that sizes became 1 which the user may give; as it is where none did.

    Args:
        error: from a model whose open sizes became 1.
        graph: of the model as loaded.
        given: names of the inputs whose shapes the user gave.
    """
    note = became_one(graph, given)
    if not note:
        return error
    shapes = [
        f"--shapes {value.name}:" + "x".join(_placeholder(dim) for dim in value.shape)
        for value in graph.inputs
        if value.name not in given and value.shape is not None and not value.shape.is_static()
    ]
    return InputError(error.what, [*error.reasons, note], f"give the sizes: {' '.join(shapes)}")


def _placeholder(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else f"<{dim.value or 'size'}>"


def shapes_of_data(graph: ir.Graph, data: DataLike) -> dict[str, Shape]:
    """The shapes of a run on one sample, for the inputs with open sizes.

    Args:
        graph: of the model as loaded.
        data: calibration data; {} where it can be gone through only once.

    Raises:
        InputError: it does not fit the model.
    """
    forms = [input_form(v) for v in graph.inputs if v.name not in graph.initializers]
    opened = [form.name for form in forms if not all(isinstance(d, int) for d in form.dims or "?")]
    if not opened or not isinstance(data, (str, os.PathLike, Mapping, Sequence)):
        return {}
    source = as_data(data, [form.name for form in forms])
    first = next(iter(runs(source, forms, 1, 1)), None)
    shapes = {} if first is None else {name: first.feeds[name].shape for name in opened}
    return {name: shape for name, shape in shapes.items() if all(shape)}


def read_request(graph: ir.Graph, shapes: Requested) -> Request:
    """The profile that the user asked for.

    Args:
        graph: of the model as loaded.
        shapes: of inputs by name, as the module's docstring shows them.

    Raises:
        InputError: a range that is none, one that contradicts the model, or another input's.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    seen: dict[str, tuple[Shape, str]] = {}
    symbols: dict[str, Symbol] = {}
    axes = {}
    for name, given in shapes.items():
        value = inputs.get(name)  # an unknown name is refused by the importer
        declared = [] if value is None or value.shape is None else list(value.shape)
        found = []
        for axis, sizes in enumerate(zip(*_corners(name, given), strict=True)):
            dim = declared[axis] if axis < len(declared) else None
            symbol = _name(f"{name}[{axis}]", dim, sizes)
            _agree(f"{name}[{axis}]", symbol, sizes, seen)
            if sizes[0] == sizes[2]:
                found.append(-sizes[0])
                continue
            symbols.setdefault(symbol, Symbol(symbol, *sizes))
            found.append(list(symbols).index(symbol))
        axes[name] = tuple(found)
    if len(symbols) > MAX_SYMBOLS:
        raise InputError(
            f"{len(symbols)} dimensions are open",
            [f"expected at most {MAX_SYMBOLS}: {', '.join(symbols)}"],
            "export the model with one name for dimensions that are always equal, or fix some",
        )
    return Request(tuple(symbols.values()), axes)


def _corners(name: str, given: Shape | ShapeRange) -> ShapeRange:
    """Smallest, usual and largest shape."""
    nested = [tuple(part) for part in given if isinstance(part, (tuple, list))]
    flat = tuple(part for part in given if isinstance(part, int))
    corners = nested or [flat] * 3
    even = len(corners) == 3 and (not nested or not flat)
    if not even or len({len(corner) for corner in corners}) > 1:
        raise InputError(
            f"the shapes of input {name!r} are no range",
            ["expected one shape, or three of equally many dimensions", f"got {given}"],
            f"give the smallest, the usual and the largest: {name}:1x16:8x128:32x512",
        )
    for axis, (least, usual, most) in enumerate(zip(*corners, strict=True)):
        if not 1 <= least <= usual <= most:
            raise InputError(
                f"dimension {axis} of input {name!r} is no range",
                ["expected MIN <= OPT <= MAX, at least 1", f"got {least}, {usual}, {most}"],
                "give the smallest size first and the largest last",
            )
    return corners[0], corners[1], corners[2]


def _name(here: str, dim: int | ir.SymbolicDim | None, sizes: Shape) -> str:
    """The symbol's name; refuses a range where the model has a number."""
    if isinstance(dim, int) and sizes[0] != sizes[2]:
        raise InputError(
            f"{here} cannot be open",
            [f"the model fixes it to {dim}", f"got {sizes[0]} to {sizes[2]}"],
            "export the model again with this dimension dynamic",
        )
    return str(dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else here


def _agree(here: str, symbol: str, sizes: Shape, seen: dict[str, tuple[Shape, str]]) -> None:
    """Refuses another range for a symbol that an earlier input gave one."""
    known, there = seen.setdefault(symbol, (sizes, here))
    if known != sizes:
        raise InputError(
            f"{here} contradicts {there}",
            [
                f"both are {symbol!r} in the model",
                f"{there} is {':'.join(map(str, known))}, {here} is {':'.join(map(str, sizes))}",
            ],
            "give both the same range",
        )
