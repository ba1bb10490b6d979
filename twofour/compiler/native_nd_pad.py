"""Padding as walks (native_nd.py): the inside is copied, borders are filled or copied from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import NotNative, constant
from twofour.compiler.native_nd import (
    BROADCAST,
    Look,
    NdOp,
    NdValue,
    Part,
    nd_op,
    scalar_of,
    value_of,
    whole,
)


def read_pad(node: ir.Node) -> NdOp:
    """The inside is copied, the borders are filled or copied from it: no element twice."""
    x, y = value_of(node.inputs[0]), value_of(node.outputs[0])
    begins, ends = _pads(node, len(x.shape))
    mode = node.attributes.get_string("mode", "constant") or ""
    if mode != "constant":
        return nd_op(node, [x], _mirrored(mode, x, y, (begins, ends)))
    value = scalar_of(node.inputs[2] if len(node.inputs) > 2 else None, 0.0)
    low, cut = np.maximum(begins, 0), np.maximum(-begins, 0)
    count = np.array(x.shape) - cut - np.maximum(-ends, 0)
    if count.min(initial=1) < 1:
        raise NotNative("padding removes all of the input")
    to = replace(whole(1, y), start=_ints(low))
    parts = [Part("copy", _ints(count), to, (replace(whole(0, x), start=_ints(cut)),))]
    for axis in range(len(x.shape)):
        for first, extra in ((0, low[axis]), (low[axis] + count[axis], max(ends[axis], 0))):
            if extra > 0:
                start = np.where(np.arange(len(low)) < axis, low, 0)
                dims = np.where(np.arange(len(low)) < axis, count, y.shape)
                start[axis], dims[axis] = first, extra
                border = replace(whole(1, y), start=_ints(start))
                parts.append(Part("fill", _ints(dims), border, (), (value,)))
    return nd_op(node, [x], parts)


_Span = tuple[int, int, int, int]
"""Of one axis: first element of y, how many, the element of x that the first is, and its step."""


_MOST_PARTS = 27


def _mirrored(mode: str, x: NdValue, y: NdValue, pads: tuple[Any, Any]) -> list[Part]:
    """Each border and corner is a copy of a part of x: backwards, of one element, or wrapped."""
    spans: list[list[_Span]] = []
    for n, before, behind in zip(x.shape, *pads, strict=True):
        before, behind, n = int(before), int(behind), int(n)
        if min(before, behind) < 0 or max(before, behind) > n - (mode == "reflect"):
            raise NotNative("native padding of this kind is as wide as its input at most")
        edges = {
            "edge": ((0, 0), (n - 1, 0)),
            "reflect": ((before, -1), (n - 2, -1)),
            "wrap": ((n - before, 1), (0, 1)),
        }.get(mode)
        if edges is None:
            raise NotNative(f"native padding has no mode {mode}")
        ends = ((0, before, *edges[0]), (before, n, 0, 1), (before + n, behind, *edges[1]))
        spans.append([span for span in ends if span[1]])
    corners = list(product(*spans))
    if len(corners) > _MOST_PARTS:
        raise NotNative("native padding of this kind is along three axes at most")
    return [_part_of(corner, x, y) for corner in corners]


def _part_of(corner: Sequence[_Span], x: NdValue, y: NdValue) -> Part:
    """The copy of one part of y."""
    to = replace(whole(1, y), start=tuple(span[0] for span in corner))
    axes = tuple((axis, span[3]) if span[3] else BROADCAST for axis, span in enumerate(corner))
    source = Look(0, axes, tuple(span[2] for span in corner))
    return Part("copy", tuple(span[1] for span in corner), to, (source,))


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _pads(node: ir.Node, rank: int) -> tuple[Any, Any]:
    """Elements to add (or, where negative, to take away) before and after each axis."""
    given = constant(node.inputs[1]).reshape(2, -1).astype(np.int64)
    axes = (
        constant(node.inputs[3]).reshape(-1)
        if len(node.inputs) > 3 and node.inputs[3] is not None
        else np.arange(rank)
    )
    begins, ends = np.zeros((2, rank), np.int64)
    begins[axes], ends[axes] = given
    return begins, ends
