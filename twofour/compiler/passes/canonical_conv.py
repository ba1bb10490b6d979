"""Spells every 2-D convolution of a constant weight the same way.

    Conv(x, w [, b])  ->  twofour.Conv<strides, pads, dilations, group>(x, w, bias)

    auto_pad becomes explicit pads, absent attributes their defaults, an absent bias zeros, and a
    bias that is a dequantized constant (int32 with scale x_scale * w_scale) float32. The weight may
    be a constant or a DequantizeLinear of one.

Conditions:
    1. two spatial axes, and the shapes of input and result are known
    2. x is float32
    3. the weight is a constant, or a DequantizeLinear of constants
    4. the bias is absent, a constant, or a DequantizeLinear of constants
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import quantizers, reading, windows
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_conv"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Conv"):
        return None
    x, w_value = reading.data(node), reading.data(node, 1)
    if w_value.shape is not None and len(w_value.shape) != 4:
        return Refused(f"it convolves over {len(w_value.shape) - 2} axes; expected 2")
    shape = reading.shape_of(x)
    if shape is None or reading.shape_of(node.outputs[0]) is None:
        return Refused("the shape of its input or result is not known")
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    w_shape = quantizers.float_shape(w_value)
    if w_shape is None:
        return Refused(f"its weight {w_value.name!r} is not a float32 constant")
    bias = bias_constant(node, w_shape[0])
    if isinstance(bias, str):
        return Refused(bias)
    if reading.int_attribute(node, "group", 1) < 1:
        return Refused(f"its group is {reading.int_attribute(node, 'group', 1)}")
    attributes: dict[str, int | tuple[int, ...]] = {
        "strides": reading.ints_attribute(node, "strides", (1, 1)),
        "pads": windows.explicit_pads(node, w_shape[2:], shape[2:]),
        "dilations": reading.ints_attribute(node, "dilations", (1, 1)),
        "group": reading.int_attribute(node, "group", 1),
    }
    inputs = {"x": x, "w": w_value, "bias": bias}
    new = ops.make_node(ops.Variant("Conv"), inputs, attributes, node)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def bias_constant(node: ir.Node, channels: int) -> ir.Value | str:
    """The bias, input 2, as float32 [channels]; zeros where it is absent."""
    given = reading.optional(node, 2)
    if given is None:
        return reading.constant(f"{node.name}_bias", np.zeros(channels, np.float32))
    bias = quantizers.float_constant(given)
    if bias is None:
        return f"its bias {given.name!r} is not a float32 constant"
    if given.is_initializer() and bias.shape == (channels,):
        return given
    if bias.size not in (1, channels) or bias.shape[-1:] not in ((), (bias.size,)):
        return f"its bias {given.name!r} has shape {reading.shape_text(given)}; expected {channels}"
    spread = np.broadcast_to(bias.reshape(-1), channels)
    return reading.constant(f"{given.name}_f32", spread)
