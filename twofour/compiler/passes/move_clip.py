"""Moves Relu and Clip above a quantizer, next to the operator that can do them for free.

    Clip(DQ(Q(x)))  ->  DQ(Q(Clip(x))), likewise Relu

    Q and DQ are monotone. Where DQ(Q(bound)) = bound, Clip(DQ(Q(x))) = DQ(Q(Clip(x))); the zero of
    Relu is such a bound. A bound beyond what Q can hold does nothing on either side. Bounds within
    a thousandth of a step of those are taken for them.

Conditions:
    1. Q and DQ are per tensor and have equal parameters
    2. nobody else reads Q(x) or DQ(Q(x))
    3. the bounds of Clip are multiples of the scale, or beyond what Q can hold
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import activations, quantizers, reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.functions import Activation

NAME = "move_clip"
_CLOSE = 1e-3


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    clip = activations.read(node) if reading.is_op(node, "Relu", "Clip") else None
    if not isinstance(clip, Activation):
        return None
    dequantize = reading.data(node).producer()
    if dequantize is None or not reading.is_op(dequantize, "DequantizeLinear"):
        return None
    quantize = reading.data(dequantize).producer()
    if quantize is None or not reading.is_op(quantize, "QuantizeLinear"):
        return None
    down, up = quantizers.per_tensor(quantize), quantizers.per_tensor(dequantize)
    if isinstance(down, str) or isinstance(up, str):
        return Refused(down if isinstance(down, str) else str(up))
    if not down.same_as(up):
        return Refused(f"{quantize.name!r} and {dequantize.name!r} have different scales")
    for between in (down.result, up.result):
        if isinstance(reader := reading.sole_reader(between), str):
            return Refused(reader)
    if reason := _off_grid(clip, down):
        return Refused(reason)
    above = activations.write(clip, down.source, node.name)
    new_down = ir.node("QuantizeLinear", [above.outputs[0], down.scale, down.zero_point])
    new_up = ir.node("DequantizeLinear", [new_down.outputs[0], up.scale, up.zero_point])
    new_down.outputs[0].shape, new_down.outputs[0].type = down.result.shape, down.result.type
    return Replacement(node.outputs[0], new_up.outputs[0], (above, new_down, new_up))


def _off_grid(clip: Activation, q: quantizers.PerTensor) -> str:
    """Which bound lies between two values that Q can hold; "" for none."""
    info = np.iinfo(q.dtype.numpy())
    for side, bound in zip((1, -1), clip.bounds(), strict=True):
        step = bound / q.scale_number + q.zero_point_number
        first, last = (info.min, info.max)[::side]
        beyond = (first - step) * side >= -_CLOSE
        whole = abs(step - np.rint(np.clip(step, info.min, info.max))) <= _CLOSE
        if not beyond and not (whole and (last - step) * side >= -_CLOSE):
            return f"its bound {bound:.6g} lies between two values of {q.node.name!r}"
    return ""
