"""Writes operators on quantized tensors as float ones between quantizers.

    QLinearConv(x, sx, zx, w, sw, zw, sy, zy [, b])  ->  Q(Conv(DQ(x), DQ(w), DQ(b)))
    QLinearMatMul(a, sa, za, b, sb, zb, sy, zy)      ->  Q(MatMul(DQ(a), DQ(b)))
    com.microsoft.QLinearAdd, QLinearMul             ->  Q(Add(DQ(a), DQ(b))), ...
    com.microsoft.QLinearSigmoid, QLinearLeakyRelu   ->  Q(Sigmoid(DQ(x))), ...
    com.microsoft.QLinearGlobalAveragePool           ->  Q(GlobalAveragePool(DQ(x)))
    com.microsoft.QLinearConcat(sy, zy, x, sx, zx, ...)  ->  Q(Concat(DQ(x), ...))
    com.microsoft.QuantizeLinear, DequantizeLinear   ->  the standard ones

    A bias is int32 with scale sx * sw. The integer kernels' passes take it from there; a result
    may move by one step where it lies between two.

Conditions:
    1. scales and zero points are constants
    2. one scale for each tensor, or one for each output channel of a weight
    3. QLinearGlobalAveragePool has its channels second
    4. the quantized types are int8 and uint8
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.compiler.passes.unfuse import replaced

NAME = "unfuse_qlinear"
_ONE = ("QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool")
_TWO = ("QLinearAdd", "QLinearMul")
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_contrib(node, "QuantizeLinear", "DequantizeLinear"):
        same = ir.node(node.op_type, list(node.inputs))
        same.attributes.update(node.attributes)
        return replaced(node, same.outputs[0])
    if reading.is_contrib(node, "QLinearConcat"):
        parts = [tuple(node.inputs[at : at + 3]) for at in range(2, len(node.inputs), 3)]
        return _between(node, parts, (node.inputs[0], node.inputs[1]))
    if reading.is_op(node, "QLinearConv", "QLinearMatMul") or reading.is_contrib(node, *_TWO):
        parts = [tuple(node.inputs[:3]), tuple(node.inputs[3:6])]
        return _between(node, parts, (node.inputs[6], reading.optional(node, 7)))
    if reading.is_contrib(node, *_ONE):
        if reading.int_attribute(node, "channels_last", 0):
            return Refused("its channels come last; expected second")
        end = (node.inputs[3], reading.optional(node, 4))
        return _between(node, [tuple(node.inputs[:3])], end)
    return None


def _between(
    node: ir.Node,
    parts: list[tuple[ir.Value | None, ...]],
    end: tuple[ir.Value | None, ir.Value | None],
) -> Replacement | Refused:
    """The float operator between quantizers.

    Args:
        node: the operator.
        parts: tensor, scale and zero point of each operand.
        end: scale and zero point of the result.
    """
    product = node.op_type in ("QLinearConv", "QLinearMatMul")
    numbers = [*(value for part in parts for value in part[1:]), *end]
    if any(value is not None and reading.array(value) is None for value in numbers):
        return Refused("its scales or zero points are computed at run time")
    for index, (x, scale, _) in enumerate(parts):
        if x is None or x.dtype not in _BYTES:
            return Refused(f"an operand is {x.dtype if x else 'absent'}; expected int8 or uint8")
        if _size(scale) > 1 and not (product and index == 1):
            return Refused(f"{x.name!r} has {_size(scale)} scales; expected one")
    if _size(end[0]) > 1:
        return Refused(f"its result has {_size(end[0])} scales; expected one")
    operands: list[ir.Value | None] = [_real(node, *part) for part in parts]
    if (bias := reading.optional(node, 8)) is not None and node.op_type == "QLinearConv":
        operands.append(_bias(bias, parts[0][1], parts[1][1]))
    y = ir.node(node.op_type.removeprefix("QLinear"), operands, name=f"{node.name}_float")
    own = {name: a for name, a in node.attributes.items() if name != "channels_last"}
    y.attributes.update(own)
    return replaced(node, reading.made("QuantizeLinear", [y.outputs[0], *_scalars(*end)]))


def _size(value: ir.Value | None) -> int:
    contents = reading.array(value)
    return 0 if contents is None else contents.size


def _scalars(scale: ir.Value | None, zero: ir.Value | None) -> list[ir.Value | None]:
    """Scale and zero point of one tensor, as scalars."""
    given = [(value, reading.array(value)) for value in (scale, zero) if value is not None]
    return [
        reading.constant(f"{value.name}_scalar", array.reshape(()))
        for value, array in given
        if array is not None
    ]


def _real(node: ir.Node, *part: ir.Value | None) -> ir.Value:
    """An operand as floats."""
    x, scale, zero = part
    if _size(scale) == 1:
        return reading.made("DequantizeLinear", [x, *_scalars(scale, zero)])
    axis = 0 if node.op_type == "QLinearConv" else 1
    values = [value for value in (scale, zero) if value is not None]
    count = _size(scale)
    spread = [
        reading.constant(f"{value.name}_axis", np.broadcast_to(array.reshape(-1), count))
        for value in values
        if (array := reading.array(value)) is not None
    ]
    return reading.made("DequantizeLinear", [x, *spread], axis=axis)


def _bias(bias: ir.Value, x_scale: ir.Value | None, w_scale: ir.Value | None) -> ir.Value:
    """An int32 bias as floats."""
    scales = [np.asarray(reading.array(value), np.float32) for value in (x_scale, w_scale)]
    scale = (scales[0].reshape(-1) * scales[1].reshape(-1)).astype(np.float32)
    stored = reading.array(bias)
    if stored is not None:
        return reading.constant(f"{bias.name}_float", stored.astype(np.float32) * scale)
    return reading.made("Mul", [reading.made("Cast", [bias], to=1), reading.constant("s", scale)])
