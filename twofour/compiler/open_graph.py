"""A graph whose shapes are open: read at several shapes, node by node the same.

The passes see numbers only. So the model is imported and fused once for each point of a `Fit`, and
the graphs, which must have the same nodes, are read together: `dims` are the shapes of all values,
and `read` gives operators whose numbers are sizes. Constants must be equal, but for those of small
operators: one that grows with a symbol, such as positions 0, 1, ..., is read from the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.compiler.fit import Fit, Irregular
from twofour.compiler.lower import Dims
from twofour.compiler.native import (
    AttentionOp,
    ConvOp,
    NativeOp,
    NotNative,
    PoolOp,
    ViewOp,
    static_shape,
)
from twofour.compiler.native_nd import NdOp, NdValue
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.passes.pipeline import Fused
from twofour.compiler.requests import Request, Shape
from twofour.compiler.schedule import read_twins
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.sizes import Count, Size, value

_STATIC = "build fixed shapes instead, as several profiles: --shapes NAME:SHAPE for each"


@dataclass(frozen=True)
class OpenGraph:
    """A graph at several shapes.

    Attributes:
        fused: at the largest shape.
        fit: the shapes.
        twins: of each node of `fused`, it and its twins at the other shapes.
        dims: the shapes of all values of `fused` by name.
        irregular: values whose shapes are no sizes, with the reason.
    """

    fused: Fused
    fit: Fit
    twins: dict[ir.Node, tuple[ir.Node, ...]]
    dims: Dims
    irregular: dict[str, str]

    @staticmethod
    def of(
        request: Request,
        imported: Callable[[dict[str, Shape]], ir.Model],
        fused: Callable[[ir.Model], Fused],
    ) -> OpenGraph:
        """Reads the model at every point.

        Args:
            request: the profile.
            imported: the model with these shapes of its inputs.
            fused: such a model after the passes.

        Raises:
            UnsupportedError: the network is another one at another shape.
        """
        fit = Fit.of(request.symbols)
        models = [_imported(request, values, fit, imported) for values in fit.points]
        _require_smallest(imported, request, [_shapes(model) for model in models], fit)
        points = [fused(model) for model in models]
        graphs = [point.model.graph for point in points]
        nodes = list(zip(*(list(graph) for graph in graphs), strict=False))
        if len({len(graph) for graph in graphs}) > 1 or any(_differ(twins) for twins in nodes):
            raise UnsupportedError(
                "the network has other operators at other shapes",
                [f"seen at {', '.join(map(str, fit.points))}"],
                _STATIC,
            )
        values = [v for twins in nodes for v in zip(*(n.outputs for n in twins), strict=True)]
        values += list(zip(*(graph.inputs for graph in graphs), strict=True))
        dims, irregular = _dims(values, fit)
        return OpenGraph(points[0], fit, {n[0]: n for n in nodes}, dims, irregular)

    def read(self, node: ir.Node) -> NativeOp | str:
        """The node as an operator with open sizes, or why it is none."""
        return read_twins(self.twins[node], self._joined)

    def require_plain(self, node: ir.Node) -> None:
        """Refuses a node for ONNX Runtime that is another one at another shape.

        Raises:
            UnsupportedError: names the tensor.
        """
        for place, read in enumerate((*node.inputs, *node.outputs)):
            if read is None:
                continue
            name = read.name or ""
            reason = self.irregular.get(name, "")
            twins = [(*twin.inputs, *twin.outputs)[place] for twin in self.twins[node]]
            held = [twin.const_value.numpy() for twin in twins if twin and twin.const_value]
            if not all(np.array_equal(held[0], array) for array in held[1:]):
                reason = "a constant that depends on the open sizes"
            if reason:
                raise _unsupported(name, node.op_type, reason)
        if len({_attributes(twin) for twin in self.twins[node]}) > 1:
            name = node.outputs[0].name or ""
            raise _unsupported(name, node.op_type, "its attributes depend on the open sizes")

    def _joined(self, ops: Sequence[NativeOp]) -> NativeOp:
        """One operator of those at all points.

        Raises:
            NotNative: there is none.
            UnsupportedError: the sizes within its images are open.
        """
        if isinstance(ops[0], PluginOp):
            raise NotNative("kernels of plugins are for fixed shapes")
        try:
            op: NativeOp = _join(ops, self.fit)
        except Irregular as e:
            raise NotNative(f"its sizes are no products of the open ones: {e}") from e
        for name in (*op.reads, *op.writes):
            if name in self.irregular:
                raise NotNative(self.irregular[name])
        if isinstance(op, ViewOp) and isinstance(op.image_step, Size):
            raise NotNative("the rows it chooses do not lie at even distances")
        if not isinstance(op, NdOp):
            self._require_rows(op)
        return op

    def _require_rows(self, op: NativeOp) -> None:
        """Refuses open sizes other than the number of images or rows."""
        names = (*op.reads, *op.writes)
        if isinstance(op, AttentionOp):
            names = (*op.reads[:3], *op.writes)  # its mask has its own sizes
        for name in names:
            dims = self.dims.get(name, ())
            inner = dims[1:] if len(dims) == 4 else dims[-1:]
            if all(isinstance(dim, int) for dim in inner):
                continue
            if isinstance(op, (ConvOp, PoolOp, AttentionOp)):
                reason = "more than the number of its images or rows is open"
                raise _unsupported(name, f"{op.op_type} {op.name!r}", reason)
            raise NotNative(f"of {name} more than the number of images or rows is open")


def _unsupported(name: str, user: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"tensor {name!r} cannot have these open sizes", [f"{user}: {reason}"], _STATIC
    )


def _attributes(node: ir.Node) -> tuple[bytes, ...]:
    """The attributes as something that can be compared."""
    return tuple(a.SerializeToString() for a in ir.to_proto(node).attribute)


def _imported(
    request: Request,
    values: Sequence[int],
    fit: Fit,
    imported: Callable[[dict[str, Shape]], ir.Model],
) -> ir.Model:
    """The model at one point."""
    try:
        return imported(request.shapes_at(values))
    except (InputError, UnsupportedError) as e:
        if values == fit.points[0]:
            raise
        shown = ", ".join(f"{s.name} {n}" for s, n in zip(request.symbols, values, strict=True))
        raise InputError(
            f"the model does not take all shapes in the ranges: not {shown}",
            [str(e).splitlines()[0], *e.reasons],
            "give dimensions that are always equal one name in the model, or build fixed shapes",
        ) from e


def _shapes(model: ir.Model) -> dict[str, Shape]:
    """The shapes of all values that have one."""
    shapes = {value.name or "": static_shape(value) for n in model.graph for value in n.outputs}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _require_smallest(
    imported: Callable[[dict[str, Shape]], ir.Model],
    request: Request,
    points: Sequence[dict[str, Shape]],
    fit: Fit,
) -> None:
    """Refuses a model in which something has another shape at the smallest one than its size says.

    So it is where a dimension of 1 is dropped, or where at most so many elements are taken.
    """
    least = tuple(symbol.least for symbol in request.symbols)
    for name, shape in _shapes(imported(request.shapes_at(least))).items():
        known = [point.get(name, ()) for point in points]
        try:
            dims = [fit.count(sizes) for sizes in zip(*known, strict=True)]
        except (Irregular, ValueError):
            continue  # refused where it is used
        expected = tuple(value(dim, least) for dim in dims)
        if all(name in point for point in points) and shape != expected:
            reason = f"at the smallest shape it is {list(shape)}, not {list(expected)}"
            raise _unsupported(name, "within the network", reason)


def _differ(twins: Sequence[ir.Node]) -> bool:
    """Whether nodes are not the same operator."""
    seen = {(n.domain, n.op_type, len(n.inputs), tuple(v.name for v in n.outputs)) for n in twins}
    return len(seen) > 1


def _dims(values: Sequence[Sequence[ir.Value]], fit: Fit) -> tuple[Dims, dict[str, str]]:
    """The shapes of values, and those that have none of the kind."""
    dims, irregular = {}, {}
    for twins in values:
        name, shapes = twins[0].name or "", [static_shape(twin) for twin in twins]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(twins):
            continue
        try:
            dims[name] = tuple(fit.count(sizes) for sizes in zip(*known, strict=True))
        except (Irregular, ValueError):
            irregular[name] = f"{name} has the shapes {known} at {list(fit.points)}"
    return dims, irregular


def _join(twins: Sequence[Any], fit: Fit) -> Any:
    """One value of those at all points; numbers that differ become sizes."""
    first = twins[0]
    if isinstance(first, NdValue) and first.constant is not None:
        return _join_constants(twins, fit)
    if is_dataclass(first) and not isinstance(first, type):
        if len({type(twin) for twin in twins}) > 1:
            raise Irregular(f"{[type(twin).__name__ for twin in twins]}")
        parts = {
            f.name: _join([getattr(twin, f.name) for twin in twins], fit) for f in fields(first)
        }
        return replace(first, **parts)
    if isinstance(first, tuple):
        if len({len(twin) for twin in twins}) > 1:
            raise Irregular(f"{list(twins)}")
        return tuple(_join(items, fit) for items in zip(*twins, strict=True))
    if isinstance(first, np.ndarray):
        if not all(_equal(first, twin) for twin in twins[1:]):
            raise Irregular("a constant depends on the open sizes")
        return first
    if type(first) is int:
        return fit.count(twins)
    if any(twin != first and not (twin != twin and first != first) for twin in twins):
        raise Irregular(f"{list(twins)}")
    return first


def _join_constants(twins: Sequence[NdValue], fit: Fit) -> NdValue:
    """A constant whose smaller forms are corners of the largest."""
    arrays = [twin.constant for twin in twins if twin.constant is not None]
    whole = arrays[0]
    dims: list[Count] = [fit.count(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True)]
    if len(arrays) < len(twins) or any(
        math.prod(a.shape) > whole.size or not _equal(whole[tuple(map(slice, a.shape))], a)
        for a in arrays[1:]
    ):
        raise Irregular("a constant depends on the open sizes")
    return replace(twins[0], dims=tuple(dims))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
