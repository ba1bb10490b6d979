"""Folds an inference BatchNormalization into the weights before it.

    BatchNormalization(twofour.Conv(x, w, bias), gamma, beta, mean, var)
        ->  twofour.Conv(x, f * w, f * (bias - mean) + beta),  f = gamma / sqrt(var + epsilon)

    The normalization is y = f * (z - mean) + beta per output channel, and z is linear in w and
    bias. The same for twofour.Gemm. A dequantized weight scale * q keeps its integers: the scale
    takes |f|, q takes the sign of f, so no weight is rounded again.

Conditions:
    1. the parameters are float32 constants and the node is in inference mode
    2. nobody else reads the result of the Conv or Gemm
    3. the channels of the normalization are those of the weight
    4. a quantized weight is int8 with zero point 0, holds no -128 where its sign changes, and its
       scale is per tensor or per output channel
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading
from twofour.compiler.passes.fold_bias import plain
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fold_batchnorm"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "BatchNormalization"):
        return None
    producer = reading.data(node).producer()
    if producer is None or not plain(producer):
        return None
    constants = [reading.array(value) for value in node.inputs[1:5]]
    parameters = [c for c in constants if c is not None and c.dtype == np.float32]
    if len(parameters) < 4 or reading.int_attribute(node, "training_mode", 0):
        return Refused("its parameters are not float32 constants, or it is in training mode")
    if isinstance(reader := reading.sole_reader(producer.outputs[0]), str):
        return Refused(reader)
    op = ops.parse_op(producer)
    bias = reading.array(op.inputs["bias"])
    result = op.output
    if bias is None or parameters[0].shape != bias.shape or len(result.shape or ()) not in (2, 4):
        return Refused(f"it does not normalize the output channels of {producer.name!r}")
    gamma, beta, mean, var = (parameter.astype(np.float64) for parameter in parameters)
    factor = gamma / np.sqrt(var + reading.float_attribute(node, "epsilon", 1e-5))
    scaled = _scaled(op.inputs["w"], factor, producer.name or "")
    if isinstance(scaled, str):
        return Refused(scaled)
    nodes, w = scaled
    shifted = (factor * (bias - mean) + beta).astype(np.float32)
    inputs = {**op.inputs, "w": w, "bias": reading.constant(f"{producer.name}_bias", shifted)}
    new = ops.make_node(ops.Variant(op.base), inputs, op.attributes, producer)
    return Replacement(node.outputs[0], new.outputs[0], (*nodes, new))


def _scaled(
    w: ir.Value, factor: reading.Array, name: str
) -> tuple[tuple[ir.Node, ...], ir.Value] | str:
    """The weight times one factor per output channel, or why that cannot be."""
    contents = reading.array(w)
    if contents is not None:
        along = factor.reshape(-1, *[1] * (contents.ndim - 1))
        return (), reading.constant(f"{w.name}_bn", (contents * along).astype(np.float32))
    stored = quantizers.quantized_constant(w)
    if stored is None or stored.q.dtype != np.int8 or stored.zero_point.any():
        return f"its quantized weight {w.name!r} is not int8 with zero point 0"
    if stored.axis != 0:
        return f"its weight {w.name!r} is not quantized per output channel"
    sign = np.sign(factor).reshape(-1, *[1] * (stored.q.ndim - 1))
    flipped = stored.q.astype(np.int32) * sign.astype(np.int32)
    if flipped.max() > 127:
        return f"its weight {w.name!r} holds -128 in a channel whose sign changes"
    # A factor of 0 leaves only the shift: the integers become 0, and the scale must stay positive.
    scales = np.where(factor == 0, 1.0, np.abs(factor)) * stored.scale
    inputs = [
        reading.constant(f"{w.name}_bn", flipped.astype(np.int8)),
        reading.constant(f"{w.name}_bn_scale", scales.astype(np.float32)),
        reading.constant(f"{w.name}_bn_zero_point", np.zeros(factor.shape, np.int8)),
    ]
    new = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=stored.node.name)
    new.outputs[0].type, new.outputs[0].shape = w.type, w.shape
    return (new,), new.outputs[0]
