"""Sliding windows: the explicit pads of Conv and pooling nodes."""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import reading

Ints = tuple[int, ...]


def explicit_pads(node: ir.Node, kernel: Ints, size: Ints) -> Ints:
    """The pads of a Conv, MaxPool or AveragePool, computed where auto_pad asks for it.

    Args:
        node: says strides, dilations, and pads or auto_pad.
        kernel: window size per spatial axis.
        size: of the input per spatial axis.

    Returns:
        [begin..., end...] per spatial axis.

    Source: ONNX Conv: output = ceil(input / stride), the odd one at the end (SAME_UPPER) or the
        beginning (SAME_LOWER).
    """
    mode = reading.string_attribute(node, "auto_pad", "NOTSET")
    if mode == "NOTSET":
        return reading.ints_attribute(node, "pads", (0,) * (2 * len(kernel)))
    if mode == "VALID":
        return (0,) * (2 * len(kernel))
    strides = reading.ints_attribute(node, "strides", (1,) * len(kernel))
    dilations = reading.ints_attribute(node, "dilations", (1,) * len(kernel))
    begins, ends = [], []
    for length, window, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        outputs = -(-length // stride)
        total = max(0, (outputs - 1) * stride + (window - 1) * dilation + 1 - length)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return (*begins, *ends)
