"""Fuses the shortcut of CIFAR ResNets: take every second pixel, then add channels.

    Pad(Slice(Slice(x, axis 2), axis 3), channels)  ->  twofour.SlicePad<steps, channel_pads>(x, c)

    One or more Slices over whole spatial axes, followed by a Pad of the channels with a constant:
    exactly what the fused operator does in one pass over the result.

Conditions:
    1. x has 4 axes and a known shape
    2. each Slice starts at 0, ends at the end, and steps forward over axes 2 and 3
    3. the Pad is in constant mode, adds to axis 1 alone and removes nothing
    4. the pad value is a constant, or absent (0)
    5. nobody else reads the result of a Slice
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import reading
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_slice_pad"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Pad"):
        return None
    x = reading.data(node)
    first = x.producer()
    if first is None or not reading.is_op(first, "Slice"):
        return None
    pads = _channel_pads(node)
    if pads is None:
        return None
    if isinstance(pads, str):
        return Refused(pads)
    steps = (1, 1)
    while (slicing := x.producer()) is not None and reading.is_op(slicing, "Slice"):
        more = _steps(slicing)
        if isinstance(more, str):
            return Refused(more)
        if isinstance(reader := reading.sole_reader(x), str):
            return Refused(f"Slice {slicing.name!r}: {reader}")
        steps = (steps[0] * more[0], steps[1] * more[1])
        x = reading.data(slicing)
    value = _value(node, x)
    if value is None:
        return Refused("it pads with a value computed at run time")
    attributes = {"steps": steps, "channel_pads": pads}
    new = ops.make_node(ops.Variant("SlicePad"), {"x": x, "value": value}, attributes, node)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _channel_pads(node: ir.Node) -> tuple[int, int] | str | None:
    """Before and after on axis 1, why the Pad is another one, or None if it adds no channels."""
    shape = reading.shape_of(reading.data(node))
    pads = reading.int_list(node, 1)
    given = reading.optional(node, 3)
    axes = (0, 1, 2, 3) if given is None else reading.int_list(node, 3)
    if shape is None or len(shape) != 4 or pads is None or axes is None:
        return None
    width = {axis % 4: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    before, after = width.pop(1, (0, 0))
    if not before and not after:
        return None
    mode = reading.string_attribute(node, "mode", "constant")
    if mode != "constant":
        return f"it pads in mode {mode}; expected constant"
    if any(any(pair) for pair in width.values()) or before < 0 or after < 0:
        return f"its pads {pads} do not add to the channels alone"
    return before, after


def _steps(node: ir.Node) -> tuple[int, int] | str:
    """The steps over axes 2 and 3, or why the Slice is another one."""
    what = f"Slice {node.name!r}"
    shape = reading.shape_of(reading.data(node))
    starts, ends = reading.int_list(node, 1), reading.int_list(node, 2)
    if shape is None or len(shape) != 4 or starts is None or ends is None:
        return f"{what} has unknown bounds, or its input is not known to have 4 axes"
    axes = reading.int_list(node, 3) or tuple(range(len(starts)))
    strides = reading.int_list(node, 4) or (1,) * len(starts)
    steps = [1, 1, 1, 1]
    for axis, start, end, step in zip(axes, starts, ends, strides, strict=True):
        if step < 1 or start not in (0, -shape[axis]) or end < shape[axis]:
            return f"{what} takes {start}:{end}:{step} of axis {axis}, not the whole axis"
        steps[axis] = step
    if steps[:2] != [1, 1]:
        return f"{what} steps over batch or channels"
    return steps[2], steps[3]


def _value(node: ir.Node, x: ir.Value) -> ir.Value | None:
    """The pad value as a scalar of the type of x."""
    given = reading.optional(node, 2)
    contents = reading.array(given)
    if given is not None and contents is None:
        return None
    if given is not None and given.shape is not None and len(given.shape) == 0:
        return given
    dtype = x.dtype.numpy() if x.dtype is not None else np.float32
    contents = contents.reshape(()) if contents is not None else np.zeros((), dtype)
    return reading.constant(f"{node.name}_value", contents)
