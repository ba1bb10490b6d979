"""Makes one operator of a matrix product that quantizes its input at run time.

    MatMulInteger(x8, w8, 128) * (highest / 127) * w_scale,                    a scale for each row
        highest = Max(ReduceMax(Abs(x), last axis), 2^-100)
        x8 = Cast<uint8>(Round(x * (127 / highest)) + 128)
    ->  twofour.RowGemm(x, w, w_scale, zeros)

    x8, x_scale, x_zero_point = DynamicQuantizeLinear(x)                       one for all of x
    MatMulInteger(x8, w8, x_zero_point, w_zero_point) * x_scale * w_scale
    ->  twofour.TensorGemm(x, w, w_scale, zeros)

    The first is what `onnx_tools/dynamic.py` writes, the second what ONNX Runtime's
    quantize_dynamic does; the factors stand in any order. The same integers and the same sums; the
    factors are multiplied in another order, so results may differ in their last bits. The weight is
    [N, K], transposed, less its zero point.

Conditions:
    1. x is float32 of known shape and at least 2 axes, and what is made of it has that shape
    2. w is a constant matrix of int8 or uint8 with elements, whose zero point is a constant, one
       number or one for each column; w less that fits int8
    3. the left operand is quantized in one of these two ways, and its zero point is that way's
    4. the sums are made float32 and multiplied by the scale of x and by a constant, finite and
       positive, of one number or one for each column; nobody else reads what is in between
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.dynamic import LEAST, ROW_ZERO, STEPS

NAME = "fuse_dynamic"

_Source = tuple[str, ir.Value, ir.Value]
"""The operator, x, and the scale of x."""


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "MatMulInteger"):
        return None
    found = _source(node)
    if isinstance(found, str):
        return Refused(found)
    base, x, x_scale = found
    shape = reading.shape_of(x)
    if x.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2:
        return Refused(f"its input is {x.dtype} {reading.shape_text(x)}; expected float32 rank 2")
    if reading.shape_of(q := reading.data(node)) != shape:
        return Refused(
            f"its left operand has shape {reading.shape_text(q)}, not that of {x.name!r}"
        )
    w = _weight(node)
    if isinstance(w, str):
        return Refused(w)
    end = _scaled(node, x_scale, w.shape[0])
    if isinstance(end, str):
        return Refused(end)
    result, w_scale = end
    name = reading.data(node, 1).name
    inputs = {
        "x": x,
        "w": reading.constant(f"{name}_nk", w),
        "w_scale": reading.constant(f"{name}_scale", w_scale),
        "bias": reading.constant(f"{node.name}_bias", np.zeros(w.shape[0], np.float32)),
    }
    new = ops.make_node(ops.Variant(base), inputs, {}, node)
    return Replacement(result, new.outputs[0], (new,))


def _source(node: ir.Node) -> _Source | str:
    """What the left operand was quantized from, and how; or why it is none of the two ways."""
    q, point = reading.data(node), reading.optional(node, 2)
    producer = q.producer()
    if reading.is_op(producer, "DynamicQuantizeLinear") and producer is not None:
        if point is not producer.outputs[2]:
            return "its left operand has another zero point than DynamicQuantizeLinear gave it"
        return "TensorGemm", reading.data(producer), producer.outputs[1]
    held = reading.array(point)
    if held is None or held.dtype != np.uint8 or held.size != 1 or held.flat[0] != ROW_ZERO:
        return f"the zero point of its left operand is not the constant uint8 {ROW_ZERO}"
    rows = _rows(q)
    return rows or f"its left operand {q.name!r} is not rounded row by row, nor dynamically"


def _rows(q: ir.Value) -> _Source | None:
    """Cast<uint8>(Round(x * (127 / highest)) + 128), and highest / 127."""
    cast = q.producer()
    moved = None if cast is None or not reading.is_op(cast, "Cast") else reading.data(cast)
    rounded = _beside(moved, "Add", ROW_ZERO)
    maker = None if rounded is None else rounded.producer()
    if cast is None or maker is None or not reading.is_op(maker, "Round"):
        return None
    scaled = reading.data(maker).producer()
    if scaled is None or not reading.is_op(scaled, "Mul") or q.dtype != ir.DataType.UINT8:
        return None
    for index in (0, 1):
        x, factor = reading.data(scaled, index), reading.data(scaled, 1 - index)
        highest = _divided(factor, STEPS, by=True)
        if highest is None or not _is_highest(highest, x):
            continue
        scales = (use.node.outputs[0] for use in highest.uses())
        scale = next((s for s in scales if _divided(s, STEPS, by=False) is highest), None)
        return None if scale is None else ("RowGemm", x, scale)
    return None


def _is_highest(value: ir.Value, x: ir.Value) -> bool:
    """Whether the value is Max(ReduceMax(Abs(x)), 2^-100), a number for each row of x."""
    peak = _beside(value, "Max", LEAST)
    reduce = None if peak is None else peak.producer()
    if reduce is None or not reading.is_op(reduce, "ReduceMax"):
        return False
    sizes = reading.data(reduce)
    absolute = sizes.producer()
    rank = len(x.shape or ())
    axes = reading.int_list(reduce, 1) or reading.ints_attribute(reduce, "axes", ())
    last = rank > 0 and [axis % rank for axis in axes] == [rank - 1]
    kept = bool(reading.int_attribute(reduce, "keepdims", 1))
    of_x = reading.is_op(absolute, "Abs") and absolute is not None and reading.data(absolute) is x
    return last and kept and of_x


def _beside(value: ir.Value | None, op_type: str, number: float) -> ir.Value | None:
    """The other operand where the value is op(other, number), in either order."""
    node = None if value is None else value.producer()
    if node is None or not reading.is_op(node, op_type) or len(node.inputs) != 2:
        return None
    for index in (0, 1):
        if _is_number(reading.data(node, 1 - index), number):
            return reading.data(node, index)
    return None


def _divided(value: ir.Value, number: float, *, by: bool) -> ir.Value | None:
    """The v of number / v (`by`) or of v / number."""
    node = value.producer()
    if node is None or not reading.is_op(node, "Div"):
        return None
    given, other = reading.data(node, 1 - by), reading.data(node, int(by))
    return other if _is_number(given, number) else None


def _is_number(value: ir.Value, number: float) -> bool:
    """Whether the value is this constant, of one element."""
    held = reading.array(value)
    return held is not None and held.size == 1 and float(held.flat[0]) == number


def _weight(node: ir.Node) -> reading.Array | str:
    """The weight as int8 [N, K] with zero point 0, or why there is none."""
    value, point = reading.data(node, 1), reading.optional(node, 3)
    w, zero = reading.array(value), reading.array(point)
    if w is None or w.ndim != 2 or w.dtype not in (np.int8, np.uint8):
        return f"its right operand {value.name!r} is not a constant matrix of int8 or uint8"
    if not w.size:
        return f"its right operand {value.name!r} is empty"
    if point is not None and (zero is None or zero.size not in (1, w.shape[1])):
        return f"the zero point {point.name!r} is not a constant, nor one for each column"
    centred = w.astype(np.int32) - (0 if zero is None else zero.reshape(-1).astype(np.int32))
    if centred.min() < -128 or centred.max() > 127:
        return (
            f"the weight {value.name!r}, less its zero point, spans"
            f" {centred.min()}..{centred.max()}; expected what int8 holds"
        )
    return centred.T.astype(np.int8)


def _scaled(
    node: ir.Node, x_scale: ir.Value, channels: int
) -> tuple[ir.Value, reading.Array] | str:
    """The sums times the scale of x and a constant, and that constant as float32 [N]."""
    cast = reading.sole_reader(node.outputs[0])
    if isinstance(cast, str):
        return cast
    value = cast.outputs[0]
    if not reading.is_op(cast, "Cast") or value.dtype != ir.DataType.FLOAT:
        return f"its sums are read by {cast.op_type} {cast.name!r}; expected Cast to float32"
    seen, scale = False, None
    while not seen or scale is None:
        reader = reading.sole_reader(value)
        if isinstance(reader, str) or not reading.is_op(reader, "Mul"):
            return "its sums are not multiplied by the scale of its input and by a constant"
        other = reading.data(reader, int(reader.inputs[0] is value))
        for factor in _factors(other, x_scale):
            held = _columns(factor, channels)
            if factor is x_scale and not seen:
                seen = True
            elif held is not None and scale is None:
                scale = held
            else:
                return f"its sums are multiplied by {factor.name!r}, which is not one of its scales"
        value = reader.outputs[0]
    if reading.shape_of(value) != reading.shape_of(node.outputs[0]):
        return "its scales change the shape of its sums"
    return value, scale


def _factors(value: ir.Value, x_scale: ir.Value) -> list[ir.Value]:
    """The value, or both factors where it is the product of the scale of x and another."""
    node = value.producer()
    if node is None or not reading.is_op(node, "Mul") or x_scale not in node.inputs:
        return [value]
    return [reading.data(node), reading.data(node, 1)]


def _columns(value: ir.Value, channels: int) -> reading.Array | None:
    """A constant as float32 [N], where it is positive and one number or one for each column."""
    held = reading.array(value)
    if held is None or held.dtype != np.float32 or held.size not in (1, channels):
        return None
    if held.size > 1 and held.shape[-1] != channels:
        return None
    fits = bool((np.isfinite(held) & (held > 0)).all())
    return np.broadcast_to(held.reshape(-1), channels) if fits else None
