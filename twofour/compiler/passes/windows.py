"""Sliding windows: the explicit pads of Conv and pooling nodes."""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.passes import reading

Ints = tuple[int, ...]


def explicit_pads(node: ir.Node, kernel: Ints) -> Ints | str:
    """The pads of a Conv, MaxPool or AveragePool, computed where auto_pad asks for it.

    Args:
        node: with static input shape if auto_pad is SAME_UPPER or SAME_LOWER.
        kernel: window size per spatial axis.

    Returns:
        [begin..., end...] per spatial axis, or why they are not known.

    Source: ONNX Conv: output = ceil(input / stride), the odd one at the end (SAME_UPPER) or the
        beginning (SAME_LOWER).
    """
    mode = reading.string_attribute(node, "auto_pad", "NOTSET")
    if mode == "NOTSET":
        return reading.ints_attribute(node, "pads", (0,) * (2 * len(kernel)))
    if mode == "VALID":
        return (0,) * (2 * len(kernel))
    shape = reading.shape_of(reading.data(node))
    if shape is None:
        return f"auto_pad {mode} needs the shape of {reading.data(node).name!r}, which is not known"
    strides = reading.ints_attribute(node, "strides", (1,) * len(kernel))
    dilations = reading.ints_attribute(node, "dilations", (1,) * len(kernel))
    begins, ends = [], []
    for size, window, stride, dilation in zip(shape[2:], kernel, strides, dilations, strict=True):
        outputs = -(-size // stride)
        total = max(0, (outputs - 1) * stride + (window - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return (*begins, *ends)
