"""Spells gathers at constant places the simplest way.

    GatherND(x, i)             ->  Gather<axis = 0>(Reshape(x), j)
    GatherElements(c, i)       ->  a constant
    Gather(c, i), Expand(c)    ->  a constant

    i [..., k] of GatherND counts in the first k axes of x, j [...] in their product. Exporters
    write it for masks that are indexed by position, and the others for position ids.

Conditions:
    1. the indices are constants
    2. the shape of x is known
    3. GatherND has no batch axes
    4. what becomes a constant is small
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_gather"

_MOST_ELEMENTS = 1 << 20


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "GatherND", "GatherElements", "Gather", "Expand"):
        return None
    held, indices = reading.array(node.inputs[0]), reading.array(node.inputs[1])
    if node.op_type == "GatherND":
        return (
            Refused("its indices are computed") if indices is None else _by_position(node, indices)
        )
    size = int(np.prod(reading.shape_of(node.outputs[0]) or (_MOST_ELEMENTS + 1,)))
    if held is None or indices is None or size > _MOST_ELEMENTS:
        return None
    axis = reading.int_attribute(node, "axis", 0)
    if node.op_type == "GatherElements":
        found = _elements(held, indices, axis % held.ndim)
    elif node.op_type == "Gather":
        found = held.take(indices, axis)
    else:
        found = held * np.ones(indices, held.dtype)
    return Replacement(node.outputs[0], reading.constant(node.outputs[0].name or "", found))


def _by_position(node: ir.Node, indices: reading.Array) -> Replacement | Refused:
    """GatherND as a Gather of one axis."""
    x = reading.data(node)
    shape = reading.shape_of(x)
    if shape is None:
        return Refused(f"the shape of {x.name!r} is not known")
    if reading.int_attribute(node, "batch_dims", 0):
        return Refused("it has batch axes")
    count = indices.shape[-1]
    outer = shape[:count]
    places = np.ravel_multi_index(tuple(np.moveaxis(indices % outer, -1, 0)), outer)
    joined = (int(np.prod(outer)), *shape[count:])
    to = reading.constant("shape", np.array(joined, np.int64))
    reshape = ir.node("Reshape", [x, to])
    reshape.outputs[0].shape, reshape.outputs[0].type = ir.Shape(joined), x.type
    rows = reading.constant("places", np.asarray(places, np.int64))
    gather = ir.node("Gather", [reshape.outputs[0], rows], {"axis": 0}, name=node.name)
    return Replacement(node.outputs[0], gather.outputs[0], (reshape, gather))


def _elements(held: reading.Array, indices: reading.Array, axis: int) -> reading.Array:
    """GatherElements."""
    window = tuple(
        slice(None) if i == axis else slice(0, size) for i, size in enumerate(indices.shape)
    )
    return np.take_along_axis(held[window], indices % held.shape[axis], axis)
