"""bfloat16 in a graph: Casts to and from it, and which values are held in it.

A value is held in bfloat16 if its producer can store that and whoever reads it can read that: then
half the bytes move, and the only loss is that a residual, too, has 8 bits of significand. A value
that anybody reads as float32 (a layer normalization, an output of the model, an operator without a
form for bfloat16) stays float32, and others read it through a Cast.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
PRODUCTS = ("BConv", "BGemm")
ATTENTION = "Attention"
_MOVERS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice")
_MEANS = ("GlobalAveragePool", "ReduceMean")


def array_of(values: reading.Array) -> reading.Array:
    """Float32 values as an array of bfloat16."""
    return np.asarray(values, np.float32).astype(BFLOAT16.numpy())


def cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """A new Cast of a value."""
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
    return node


def is_rounding(node: ir.Node | None) -> bool:
    """Whether the node is a Cast from float32 to bfloat16."""
    return (
        node is not None
        and reading.is_op(node, "Cast")
        and reading.int_attribute(node, "to", 0) == int(BFLOAT16)
        and reading.data(node).dtype == FLOAT
    )


def held(value: ir.Value | None) -> ir.Value | None:
    """The bfloat16 value of which `value` is the float32; None if it is no such."""
    producer = value.producer() if value is not None else None
    if producer is None or not reading.is_op(producer, "Cast"):
        return None
    source = reading.data(producer)
    return source if source.dtype == BFLOAT16 else None


def base_of(node: ir.Node | None) -> str:
    """The base of a fused operator, "" for any other node."""
    return ops.parse_type(node.op_type).base if node is not None and ops.is_fused(node) else ""


def is_mover(node: ir.Node | None) -> bool:
    """Whether the node only gives elements other places, and has a form for any type."""
    return reading.is_op(node, *_MOVERS) or base_of(node) == "Tokens"


def is_max(node: ir.Node) -> bool:
    """Whether the node is a MaxPool that BMaxPool stands for."""
    return (
        reading.is_op(node, "MaxPool")
        and len(reading.ints_attribute(node, "kernel_shape", ())) == 2
        and set(reading.ints_attribute(node, "dilations", (1, 1))) == {1}
        and not reading.int_attribute(node, "ceil_mode", 0)
        and reading.string_attribute(node, "auto_pad", "NOTSET") == "NOTSET"
        and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    )


def is_mean(node: ir.Node) -> bool:
    """Whether the node averages whole images."""
    shape = reading.shape_of(reading.data(node)) if reading.is_op(node, *_MEANS) else None
    if shape is None or len(shape) != 4:
        return False
    axes = reading.ints_attribute(node, "axes", ()) or reading.int_list(node, 1) or ()
    return node.op_type == "GlobalAveragePool" or sorted(a % 4 for a in axes) == [2, 3]


def repeats(node: ir.Node) -> tuple[int, int] | None:
    """How often a Resize repeats the rows and columns of images; None where it does not."""
    if not reading.is_op(node, "Resize"):
        return None
    form = reading.string_attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = reading.string_attribute(node, "nearest_mode", "round_prefer_floor")
    if reading.string_attribute(node, "mode", "nearest") != "nearest" or (form, rounding) not in (
        ("asymmetric", "floor"),
        ("half_pixel", "round_prefer_floor"),
    ):
        return None
    before, after = (reading.shape_of(v) for v in (reading.data(node), node.outputs[0]))
    if before is None or after is None or len(before) != 4 or before[:2] != after[:2]:
        return None
    (down, rest), (across, more) = (
        divmod(b, a) for a, b in zip(before[2:], after[2:], strict=True)
    )
    return (down, across) if down and across and not rest and not more else None


def is_wanted(value: ir.Value) -> bool:
    """Whether all who read a value can read it in bfloat16, and what is held with it likewise."""
    waiting, seen = [value], {value}
    while waiting:
        one = waiting.pop()
        uses = one.uses()
        if one.is_graph_output() or not uses or reading.shape_of(one) is None:
            return False
        for use in uses:
            more = _held_with(use.node, one) if use.node.graph is one.graph else None
            if more is None:
                return False
            waiting += [v for v in more if v not in seen]
            seen.update(more)
    return True


def _held_with(node: ir.Node, value: ir.Value) -> list[ir.Value] | None:
    """What has to be held too if a node reads one of its inputs in bfloat16; None if it cannot."""
    if is_rounding(node) or is_mean(node):
        return []
    if reading.is_op(node, "Concat"):
        parts = [part for part in node.inputs if part is not None]
        return [*parts, node.outputs[0]] if all(map(_is_made, parts)) else None
    if is_mover(node) or is_max(node) or repeats(node) or base_of(node) == "SlicePad":
        return [v for v in node.outputs if v.uses()] if value is node.inputs[0] else None
    return [] if _reads(node, value) else None


def _reads(node: ir.Node, value: ir.Value) -> bool:
    """Whether a product or an attention can read one of its inputs in bfloat16."""
    base = base_of(node)
    if base in ("Conv", *PRODUCTS):
        op = ops.parse_op(node)
        residual = base != "Conv" and op.has_add and value is op.inputs["res"]
        return residual or (is_depthwise(op) and value is op.inputs["x"])
    return base == ATTENTION and can_attend(node) and any(v is value for v in node.inputs[:3])


def _is_made(value: ir.Value) -> bool:
    """Whether what computes a value could store it in bfloat16."""
    node = value.producer()
    if held(value) is not None or base_of(node) in PRODUCTS:
        return True
    if node is None or node.graph is not value.graph:
        return False
    if reading.is_op(node, "Concat"):
        return all(_is_made(v) for v in node.inputs if v is not None)
    moves = is_mover(node) or is_max(node) or repeats(node) is not None
    return moves and _is_made(reading.data(node))


def is_depthwise(op: ops.FusedOp) -> bool:
    """Whether a convolution has one input channel for each output channel."""
    w = op.inputs["w"].shape
    return "Conv" in op.base and w is not None and op.attributes["group"] == w[0] and w[1] == 1


def can_attend(node: ir.Node) -> bool:
    """Whether q, k and v of a float32 attention all are parts of products in bfloat16."""
    for value in node.inputs[:3]:
        source = value
        while source is not None and is_mover(source.producer()):
            source = reading.data(source.producer())  # type: ignore[arg-type]
        producer = source.producer() if source is not None else None
        if held(value) is None and held(source) is None and base_of(producer) not in PRODUCTS:
            return False
    return True
