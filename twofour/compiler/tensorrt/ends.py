"""Inputs and outputs of a model at the shapes that were asked for, and the profiles of TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.fit import Fit, Irregular
from twofour.compiler.importer import bind_inputs
from twofour.compiler.native import kind_of, static_shape
from twofour.compiler.requests import Request, Shape
from twofour.compiler.second_opinion import told
from twofour.compiler.settle import settle
from twofour.core.errors import UnsupportedError
from twofour.core.sizes import Count, Symbol
from twofour.engine import DTYPES, TensorInfo
from twofour.onnx_tools.infer import infer_shapes

Corners = tuple[Shape, Shape, Shape]


@dataclass(frozen=True)
class Ends:
    """One profile.

    Attributes:
        inputs: of the model.
        outputs: of the model; their shapes are known where onnx or ONNX Runtime can infer them.
        corners: input -> its smallest, usual and largest shape.
        symbols: open dimensions.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    corners: Mapping[str, Corners]
    symbols: tuple[Symbol, ...]


def ends_of(model: ir.Model, request: Request) -> Ends:
    """The inputs and outputs of one profile.

    Args:
        model: not changed.
        request: its shapes.

    Raises:
        InputError: a shape contradicts the model.
        UnsupportedError: an input or output is of a kind that engines do not pass on.
    """
    fit = Fit.of(request.symbols)
    corners = [tuple(getattr(s, c) for s in request.symbols) for c in ("least", "usual", "most")]
    points = [*fit.points, *corners[:2]] if request.symbols else [()]
    seen = [_shapes_at(model, request, values) for values in points]
    kinds = {value.name or "": value for value in (*seen[0].inputs, *seen[0].outputs)}
    for name, value in kinds.items():
        if kind_of(value) not in DTYPES:
            raise UnsupportedError(
                f"an engine does not pass on {name!r}, which is {kind_of(value)}",
                [f"expected a tensor of {', '.join(sorted(DTYPES))}"],
                "cut the model so that this value is neither an input nor an output",
            )
    values = [
        [_info(fit, points, each) for each in zip(*ends, strict=True)]
        for ends in ([graph.inputs for graph in seen], [graph.outputs for graph in seen])
    ]
    at_corners = [_input_shapes(model, request, corner) for corner in corners]
    least, usual, most = at_corners
    shapes = {name: (least[name], usual[name], most[name]) for name in least}
    return Ends(tuple(values[0]), tuple(values[1]), shapes, request.symbols)


def fix_inputs(model: ir.Model, ends: Sequence[Ends]) -> list[dict[str, Corners]]:
    """Makes the sizes that never change part of the model, in place.

    Returns:
        For each profile the corners of the inputs that stay open; nothing where none does.
    """
    open_inputs = set()
    for value in model.graph.inputs:
        name = value.name or ""
        shapes = [shape for each in ends for shape in each.corners[name]]
        dims = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]
        if None in dims:
            open_inputs.add(name)
        declared = list(value.shape or ())
        value.shape = ir.Shape(
            [
                _symbol(declared[axis], f"{name}_{axis}") if dim is None else dim
                for axis, dim in enumerate(dims)
            ]
        )
    if not open_inputs:
        return []
    return [{name: each.corners[name] for name in sorted(open_inputs)} for each in ends]


def _symbol(declared: int | ir.SymbolicDim, here: str) -> str:
    """The name of an open dimension: that of the model, which may stand in other inputs too."""
    return str(getattr(declared, "value", None) or here)


def _shapes_at(model: ir.Model, request: Request, values: Sequence[int]) -> ir.Graph:
    """The graph with fixed inputs, and what follows from them."""
    bound = model.clone()
    bind_inputs(bound.graph, request.shapes_at(values))
    for value in bound.graph.outputs:
        value.shape = None  # what the file declares may err
    infer_shapes(bound)
    if any(static_shape(value) is None for value in bound.graph.outputs):
        settle(bound)  # shapes that the model computes are constants now
        infer_shapes(bound)
    unknown = [value for value in bound.graph.outputs if static_shape(value) is None]
    if unknown:
        found = told(ir.to_proto(bound), [value.name or "" for value in unknown])
        for value in unknown:
            opinion = found.get(value.name or "")
            if opinion is not None and opinion.shape is not None:
                value.shape = ir.Shape(opinion.shape)
    return bound.graph


def _input_shapes(
    model: ir.Model, request: Request, values: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    bound = model.clone()
    bind_inputs(bound.graph, request.shapes_at(values))
    return {value.name or "": static_shape(value) or () for value in bound.graph.inputs}


def _info(fit: Fit, points: Sequence[tuple[int, ...]], seen: Sequence[ir.Value]) -> TensorInfo:
    """A tensor, by its shapes at the points of the fit and at some that have to confirm it."""
    name, kind = seen[0].name or "", kind_of(seen[0])
    shapes = [static_shape(value) for value in seen]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or len({len(shape) for shape in known}) != 1:
        return TensorInfo(name, kind, (), known=False)
    if not fit.symbols:
        return TensorInfo(name, kind, known[0])
    count = len(fit.points)
    try:
        dims: list[Count] = [fit.count(sizes) for sizes in zip(*known[:count], strict=True)]
    except Irregular:
        return TensorInfo(name, kind, (), known=False)
    info = TensorInfo.of(name, kind, dims)
    if any(info.shape_at(at) != shape for at, shape in zip(points, known, strict=True)):
        return TensorInfo(name, kind, (), known=False)  # sizes that are rounded up, for instance
    return info
