"""Turns the pixels of an image into a sequence, which channels-last memory holds already.

    Transpose<0, 2, 1>(Reshape(x, [N, C, H * W]))        ->  twofour.Tokens(x)
    Reshape(Transpose<0, 2, 3, 1>(x), [N, H * W, C])     ->  twofour.Tokens(x)

    and whatever else moves [N, C, H, W] to [N, H * W, C], also with Flatten.

Conditions:
    1. all shapes are known
    2. the elements come to lie pixel by pixel, with the channels of a pixel together
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading, tracing
from twofour.compiler.passes.rewrite import Replacement

NAME = "fuse_tokens"


def rule(node: ir.Node) -> Replacement | None:
    """See the module."""
    if not reading.is_op(node, "Transpose", "Reshape", "Flatten"):
        return None
    y = node.outputs[0]
    after = reading.shape_of(y)
    if after is None or len(after) != 3:
        return None
    for step in tracing.way_up(y):
        before = reading.shape_of(step.value)
        plain = step.factor == 1.0 and step.quantizer is None
        if not plain or before is None or len(before) != 4 or len(step.below) < 2:
            continue
        if before[1] == 1 or before[2] * before[3] == 1:
            continue  # a Reshape does it
        index = step.index()
        if index is not None and np.array_equal(index, tracing.images_as_rows(before)):
            new = ops.make_node(ops.Variant("Tokens"), {"x": step.value}, {}, node)
            return Replacement(y, new.outputs[0], (new,))
    return None
