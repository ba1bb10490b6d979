"""Resizing: linear for images, with a kernel of its own; to nearest neighbours as a walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import NativeOp, NotNative, constant, name_of, operand, shape
from twofour.compiler.native_nd import BROADCAST, Look, NdOp, Part, nd_op, value_of
from twofour.compiler.ops import FusedOp
from twofour.kernels.cpu.resize import Tap


@dataclass(frozen=True)
class ResizeOp(NativeOp):
    """Linear resizing of images, see kernels/cpu/resize.py.

    Attributes:
        rows: of the result.
        columns: of the result.
    """

    rows: tuple[Tap, ...] = ()
    columns: tuple[Tap, ...] = ()


def read_linear(node: ir.Node) -> ResizeOp:
    """Resize with mode "linear", of images of float32."""
    x, y = value_of(node.inputs[0]), value_of(node.outputs[0])
    get = node.attributes
    if get.get_string("mode", "nearest") != "linear":
        raise NotNative("it is not linear")
    if x.kind != "float32" or len(x.shape) != 4 or x.shape[:2] != y.shape[:2]:
        raise NotNative("native linear resizing is of height and width, in float32")
    if get.get_int("antialias", 0):
        raise NotNative("native resizing has no antialiasing")
    taps = []
    for axis in (2, 3):
        before, after = x.shape[axis], y.shape[axis]
        places = np.clip(_places(node, axis, before, after), 0, before - 1)
        first = np.floor(places)
        taps.append(
            tuple(
                Tap(int(a), min(int(a) + 1, before - 1), float(place - a))
                for a, place in zip(first, places, strict=True)
            )
        )
    name = node.name or ""
    return ResizeOp(name, "Resize", "resize", operand(node.inputs[0]), name_of(node.outputs[0]),
                    rows=taps[0], columns=taps[1])  # fmt: skip


def read_nearest(node: ir.Node) -> NdOp:
    """Nearest neighbours where each axis repeats its elements, or takes every k-th."""
    x, y = value_of(node.inputs[0]), value_of(node.outputs[0])
    if (mode := node.attributes.get_string("mode", "nearest")) != "nearest":
        raise NotNative(f"no native kernel for Resize with mode {mode} of these operands")
    dims: list[int] = []
    source: list[tuple[int, int]] = []
    to: list[tuple[int, int]] = []
    start = [0] * len(x.shape)
    for axis, (before, after) in enumerate(zip(x.shape, y.shape, strict=True)):
        rows = _nearest(node, axis, before, after)
        factor = after // before
        if factor and (rows == np.arange(after) // factor).all():
            dims += [before, factor]
            source += [(axis, 1), BROADCAST]
            to += [(axis, factor), (axis, 1)]
        elif len(steps := {*np.diff(rows)}) <= 1:
            dims.append(after)
            start[axis] = int(rows[0])
            source.append((axis, int(steps.pop()) if steps else 1))
            to.append((axis, 1))
        else:
            raise NotNative(f"axis {axis} is not resized by a whole factor")
    begin = Look(1, tuple(to), (0,) * len(y.shape))
    part = Part("copy", tuple(dims), begin, (Look(0, tuple(source), tuple(start)),))
    return nd_op(node, [x], [part])


def read_repeat(op: FusedOp) -> NdOp:
    """Rows and columns of images, each so many times."""
    x, y = value_of(op.inputs["x"]), value_of(op.output)
    factors = op.attributes["factors"]
    if not isinstance(factors, tuple) or len(x.shape) != 4:
        raise NotNative("it repeats rows and columns of images")
    down, across = factors
    dims = (*x.shape[:3], down, x.shape[3], across)
    source = ((0, 1), (1, 1), (2, 1), BROADCAST, (3, 1), BROADCAST)
    to = ((0, 1), (1, 1), (2, down), (2, 1), (3, across), (3, 1))
    start = (0,) * 4
    part = Part("copy", dims, Look(1, to, start), (Look(0, source, start),))
    return NdOp(op.name, "Resize", "nd", x.name, y.name, values=(x, y), parts=(part,))


def _nearest(node: ir.Node, axis: int, before: int, after: int) -> Any:
    """Which element of the axis each element of the result is."""
    places = _places(node, axis, before, after)
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    rounded = {
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
        "floor": np.floor(places),
        "ceil": np.ceil(places),
    }[rounding or ""]
    return np.clip(rounded, 0, before - 1).astype(np.int64)


def _places(node: ir.Node, axis: int, before: int, after: int) -> Any:
    """Where along the axis each element of the result lies, in elements of the input.

    Source: ONNX Resize, coordinate_transformation_mode.
    """
    get = node.attributes
    if get.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotNative("native resizing does not keep an aspect ratio")
    scale, i = _scale(node, axis, before, after), np.arange(after, dtype=np.float64)
    centres = (i + 0.5) / scale - 0.5
    mode = get.get_string("coordinate_transformation_mode", "half_pixel")
    places = {
        "half_pixel": centres,
        "pytorch_half_pixel": centres if after > 1 else 0 * i,
        "asymmetric": i / scale,
        "align_corners": i * ((before - 1) / max(after - 1, 1)),
    }.get(mode or "")
    if places is None:
        raise NotNative(f"native resizing has no coordinates {mode}")
    return places


def _scale(node: ir.Node, axis: int, before: int, after: int) -> float:
    """How much longer the axis gets."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None or not constant(given).size:
        return after / before
    scales = constant(given).reshape(-1)
    rank = len(shape(node.outputs[0]))
    axes = [int(a) % rank for a in node.attributes.get_ints("axes", tuple(range(rank))) or ()]
    return float(scales[axes.index(axis)]) if axis in axes else 1.0
