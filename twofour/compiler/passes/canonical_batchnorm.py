"""Spells a normalization that no weight could take as what it is: one factor a channel.

    BatchNormalization(x, gamma, beta, mean, var)
        ->  twofour.Conv<group = C>(x, f, beta - f * mean)       of images
        ->  Add(Mul(x, f), beta - f * mean)                      of other ranks
    f = gamma / sqrt(var + epsilon)

    Networks that normalize before a convolution (DenseNet, pre-activation ResNets) have one in
    front of each. As a convolution of one tap it takes the activation that follows.

Conditions:
    1. the parameters are float32 constants and the node is in inference mode
    2. x is float32 and its shape is known
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "canonical_batchnorm"

_IMAGES = 4


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "BatchNormalization"):
        return None
    constants = [reading.array(value) for value in node.inputs[1:5]]
    parameters = [c for c in constants if c is not None and c.dtype == np.float32]
    if len(parameters) < 4 or reading.int_attribute(node, "training_mode", 0):
        return Refused("its parameters are not float32 constants, or it is in training mode")
    x, y = reading.data(node), node.outputs[0]
    shape = reading.shape_of(x)
    if x.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2:
        return Refused(f"its input is {x.dtype} [{reading.shape_text(x)}]; expected known float32")
    gamma, beta, mean, var = (parameter.astype(np.float64) for parameter in parameters)
    factor = gamma / np.sqrt(var + reading.float_attribute(node, "epsilon", 1e-5))
    shift = (beta - factor * mean).astype(np.float32)
    factor = factor.astype(np.float32)
    if len(shape) == _IMAGES:
        inputs = {
            "x": x,
            "w": reading.constant(f"{node.name}_factor", factor.reshape(-1, 1, 1, 1)),
            "bias": reading.constant(f"{node.name}_shift", shift),
        }
        window = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
        conv = ops.make_node(ops.Variant("Conv"), inputs, {**window, "group": shape[1]}, node)
        return Replacement(y, conv.outputs[0], (conv,))
    along = reading.broadcast_shape(len(shape), 1)
    scaled = ir.node("Mul", [x, reading.constant(f"{node.name}_factor", factor.reshape(along))])
    scaled.outputs[0].shape, scaled.outputs[0].type = y.shape, y.type
    moved = reading.constant(f"{node.name}_shift", shift.reshape(along))
    added = ir.node("Add", [scaled.outputs[0], moved], name=node.name)
    return Replacement(y, added.outputs[0], (scaled, added))
