"""Spells a convolution over one axis as one over two, of images one row high.

    Conv(x [N, C, L], w [M, C, K] [, b])  ->  Squeeze(Conv(Unsqueeze(x), w [M, C, 1, K] [, b]))

Conditions:
    1. the shapes of input and result are known
    2. the weight is a float32 constant, or a DequantizeLinear of constants
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_conv_1d"

_ROW = {"strides": (1,), "dilations": (1,)}
_AXIS = 2


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Conv"):
        return None
    x, y = reading.data(node), node.outputs[0]
    before, after = reading.shape_of(x), reading.shape_of(y)
    w = reading.data(node, 1)
    if w.shape is None or len(w.shape) != 3:
        return None
    if before is None or after is None:
        return Refused("the shape of its input or result is not known")
    found = _wide(w)
    if found is None:
        return Refused(f"its weight {w.name!r} is not a float32 constant")
    made, weight = found
    axes = reading.constant("row_axis", np.array([_AXIS], np.int64))
    image = _typed(ir.node("Unsqueeze", [x, axes]), x, (*before[:2], 1, before[2]))
    inputs = [image.outputs[0], weight, *node.inputs[2:]]
    conv = _typed(
        ir.node("Conv", inputs, _attributes(node), name=node.name), y, (*after[:2], 1, after[2])
    )
    row = _typed(ir.node("Squeeze", [conv.outputs[0], axes]), y, after)
    return Replacement(y, row.outputs[0], (*made, image, conv, row))


def _wide(w: ir.Value) -> tuple[tuple[ir.Node, ...], ir.Value] | None:
    """The weight with a second axis of one row, and what computes it."""
    contents = reading.array(w)
    if contents is not None:
        return (), reading.constant(f"{w.name}_row", np.expand_dims(contents, _AXIS))
    stored = quantizers.quantized_constant(w)
    if stored is None:
        return None
    values = {"": np.expand_dims(stored.q, _AXIS), "_scale": stored.scale}
    values["_zero_point"] = stored.zero_point
    inputs = [reading.constant(f"{w.name}_row{end}", array) for end, array in values.items()]
    axis = stored.axis + (stored.axis >= _AXIS)
    new = ir.node("DequantizeLinear", inputs, {"axis": axis})
    return (_typed(new, w, values[""].shape),), new.outputs[0]


def _typed(node: ir.Node, like: ir.Value, shape: tuple[int, ...]) -> ir.Node:
    node.outputs[0].type, node.outputs[0].shape = like.type, ir.Shape(shape)
    return node


def _attributes(node: ir.Node) -> dict[str, tuple[int, ...] | int | str]:
    """Those of the node, with a first axis of one row."""
    found: dict[str, tuple[int, ...] | int | str] = {
        name: (1, *reading.ints_attribute(node, name, usual)) for name, usual in _ROW.items()
    }
    before, behind = reading.ints_attribute(node, "pads", (0, 0))
    found["group"] = reading.int_attribute(node, "group", 1)
    mode = reading.string_attribute(node, "auto_pad", "NOTSET")
    return found | ({"pads": (0, before, 0, behind)} if mode == "NOTSET" else {"auto_pad": mode})
