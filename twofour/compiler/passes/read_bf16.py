"""Lets operators read bfloat16 where a value is held in it.

    Cast<bfloat16>(Cast<float>(b))               ->  b
    twofour.BConvAdd...(..., res: Cast<float>(b))  ->  twofour.BConvAdd...(..., b), likewise BGemm
    twofour.[B]Conv...(Cast<float>(b), w, bias)  ->  twofour.BConv...(b, w, bias), where depthwise
    MaxPool(Cast<float>(b))                      ->  Cast<float>(twofour.BMaxPool(b))
    twofour.SlicePad(Cast<float>(b), value)      ->  Cast<float>(twofour.BSlicePad(b, value))
    GlobalAveragePool(Cast<float>(b))            ->  twofour.BGlobalAveragePoolF(b), or, where all
                                                     who read it can, Cast<float>(... without F)
    twofour.Attention(Cast<float>(q), ...(k), ...(v) [, mask])
                                                 ->  twofour.BAttention[F](q, k, v [, mask])
    op(Cast<float>(b))                           ->  Cast<float>(op(b)), where op only moves
    Concat(Cast<float>(a), Cast<float>(b))       ->  Cast<float>(Concat(a, b))
    Resize(Cast<float>(b))                       ->  Cast<float>(twofour.BRepeat(b))

    All but attention are exact, a padding value aside: to float32 and back nothing is lost.
    Attention multiplies its probabilities in bfloat16 too.

Conditions:
    1. MaxPool has two axes, no dilation and no ceil_mode; the average is over the whole image
    2. q, k and v of an attention, or all operands of a Concat, are held in bfloat16
    3. the Resize repeats rows and columns of images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import bfloats, reading
from twofour.compiler.passes.hold_bf16 import rounded
from twofour.compiler.passes.rewrite import Replacement

NAME = "read_bf16"


def rule(node: ir.Node) -> Replacement | None:
    """See the module."""
    if bfloats.is_rounding(node):
        source = bfloats.held(node.inputs[0])
        return None if source is None else Replacement(node.outputs[0], source)
    base = bfloats.base_of(node)
    if base in ("Conv", *bfloats.PRODUCTS):
        return _product(node)
    if base == bfloats.ATTENTION:
        return _attention(node)
    x = bfloats.held(node.inputs[0]) if node.inputs else None
    if x is None:
        return None
    if bfloats.is_mover(node):
        return _moved(node, [x, *node.inputs[1:]])
    if reading.is_op(node, "Concat"):
        parts = [bfloats.held(value) for value in node.inputs]
        return None if None in parts else _moved(node, parts)
    if factors := bfloats.repeats(node):
        return rounded(
            node, ops.make_node(ops.Variant("BRepeat"), {"x": x}, {"factors": factors}, node)
        )
    if bfloats.is_max(node):
        return _maximum(node, x)
    if base == "SlicePad":
        op = ops.parse_op(node)
        inputs = {**op.inputs, "x": x}
        return rounded(node, ops.make_node(ops.Variant("BSlicePad"), inputs, op.attributes, node))
    return _mean(node, x) if bfloats.is_mean(node) else None


def _product(node: ir.Node) -> Replacement | None:
    """A product that adds a held residual, or a depthwise one of held inputs."""
    op = ops.parse_op(node)
    names = ["res"] if op.has_add and op.base != "Conv" else []
    names += ["x"] if bfloats.is_depthwise(op) else []
    parts = {name: bfloats.held(op.inputs[name]) for name in names}
    found = {name: value for name, value in parts.items() if value is not None}
    if not found:
        return None
    variant = ops.parse_type(node.op_type)
    if op.base == "Conv":
        variant = replace(variant, base="BConv", float_out=True)
    new = ops.make_node(variant, {**op.inputs, **found}, op.attributes, node)
    return Replacement(op.output, new.outputs[0], (new,))


def _attention(node: ir.Node) -> Replacement | None:
    """An attention of held operands."""
    op = ops.parse_op(node)
    parts = {name: bfloats.held(op.inputs[name]) for name in "qkv"}
    found = {name: value for name, value in parts.items() if value is not None}
    if len(found) < len(parts):
        return None
    return _stored(node, ops.Variant("BAttention", mask=op.mask), {**op.inputs, **found})


def _stored(
    node: ir.Node, variant: ops.Variant, inputs: dict[str, ir.Value], **more: int
) -> Replacement:
    """The operator with a result in bfloat16 where that is wanted, else in float32."""
    attributes = more or ops.parse_op(node).attributes
    if bfloats.is_wanted(node.outputs[0]):
        return rounded(node, ops.make_node(variant, inputs, attributes, node))
    variant = ops.Variant(variant.base, mask=variant.mask, float_out=True)
    new = ops.make_node(variant, inputs, attributes, node)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _maximum(node: ir.Node, x: ir.Value) -> Replacement:
    """Maxima of bfloat16."""
    attributes = {
        "kernel_shape": reading.ints_attribute(node, "kernel_shape", ()),
        "strides": reading.ints_attribute(node, "strides", (1, 1)),
        "pads": reading.ints_attribute(node, "pads", (0, 0, 0, 0)),
    }
    return rounded(node, ops.make_node(ops.Variant("BMaxPool"), {"x": x}, attributes, node))


def _mean(node: ir.Node, x: ir.Value) -> Replacement:
    """Averages of bfloat16."""
    keepdims = node.op_type != "ReduceMean" or reading.int_attribute(node, "keepdims", 1)
    variant = ops.Variant("BGlobalAveragePool")
    return _stored(node, variant, {"x": x}, keepdims=int(keepdims))


def _moved(node: ir.Node, inputs: Sequence[ir.Value | None]) -> Replacement:
    """The same operator on bfloat16, its results made float32."""
    count = len(node.outputs)
    new = ir.node(node.op_type, inputs, domain=node.domain, name=node.name, num_outputs=count)
    for attribute in node.attributes.values():
        new.attributes.add(attribute)
    backs = []
    for before, after in zip(node.outputs, new.outputs, strict=True):
        after.shape, after.type = before.shape, ir.TensorType(bfloats.BFLOAT16)
        backs.append(bfloats.cast(after, bfloats.FLOAT))
    pairs = [(old, back.outputs[0]) for old, back in zip(node.outputs, backs, strict=True)]
    return Replacement(*pairs[0], nodes=(new, *backs), more=tuple(pairs[1:]))
