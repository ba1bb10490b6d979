"""Turns a product of a quantized tensor into one operator on bytes.

    Q(Mul(DQ(a), DQ(b)))  ->  twofour.QMul(a, ..., b, ..., y_scale, y_zero_point)
    Q(Mul(DQ(a), b))      ->  twofour.QMulFloat(a, a_scale, a_zero_point, b, y_scale, ...)

    By the meaning of the fused operator nothing changes; its kernel multiplies by a_scale / y_scale
    where Q divides: a result between two steps may be the other one. b may be a factor for each
    channel of an image, as a squeeze-and-excite block computes it.

Conditions:
    1. a is dequantized per tensor from int8 or uint8; b likewise, or float32
    2. both are computed while running
    3. they have equal shapes, or a is [N, C, H, W] and b is [N, C, 1, 1]
    4. the product is read by one per-tensor quantizer alone
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.quantizers import PerTensor
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_integer_mul"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Mul"):
        return None
    operands = [reading.data(node, index) for index in (0, 1)]
    if not any(reading.is_op(value.producer(), "DequantizeLinear") for value in operands):
        return None
    pair = _ordered(*operands)
    if isinstance(pair, str):
        return Refused(pair)
    a, b = quantizers.dequantizer(pair[0]), quantizers.dequantizer(pair[1])
    if isinstance(a, str):
        return Refused(a)
    if reason := _not_computed(a, pair[1] if isinstance(b, str) else b.source):
        return Refused(reason)
    y = quantizers.sole_quantizer(node.outputs[0])
    if isinstance(y, str):
        return Refused(y)
    inputs = {"a": a.source, "a_scale": a.scale, "a_zero_point": a.zero_point, "b": pair[1]}
    if isinstance(b, PerTensor):
        inputs |= {"b": b.source, "b_scale": b.scale, "b_zero_point": b.zero_point}
    inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
    variant = ops.Variant("QMul" if isinstance(b, PerTensor) else "QMulFloat")
    new = ops.make_node(variant, inputs, {}, node)
    return Replacement(y.result, new.outputs[0], (new,))


def _ordered(a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value] | str:
    """The operands, the one that is broadcast last; or why kernels do not broadcast so."""
    one, two = reading.shape_of(a), reading.shape_of(b)
    if one is not None and one == two:
        bytes_first = reading.is_op(a.producer(), "DequantizeLinear")
        return (a, b) if bytes_first else (b, a)
    for image, factor, pair in ((one, two, (a, b)), (two, one, (b, a))):
        if image is not None and len(image) == 4 and factor == (*image[:2], 1, 1):
            return pair
    shapes = f"{reading.shape_text(a)} and {reading.shape_text(b)}"
    return f"its operands have shapes {shapes}; expected equal ones, or a factor per channel"


def _not_computed(a: PerTensor, b: ir.Value) -> str:
    """Which operand is a constant, or of another type; "" for none."""
    for value in (a.source, b):
        if reading.array(value) is not None:
            return f"{value.name!r} is a constant"
    if b.dtype not in (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8):
        return f"{b.name!r} is {b.dtype}; expected float32"
    return ""
