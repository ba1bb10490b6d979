"""Operators that move, repeat or choose elements, as walks (native_nd.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
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
    require_kinds,
    value_of,
    whole,
)
from twofour.compiler.native_nd_pad import read_pad
from twofour.compiler.native_resize import read_nearest
from twofour.core.sizes import Count

Axes = tuple[tuple[int, Count], ...]


def _ends(node: ir.Node) -> tuple[NdValue, NdValue]:
    return value_of(node.inputs[0]), value_of(node.outputs[0])


def _origin(value: NdValue) -> tuple[int, ...]:
    return (0,) * len(value.shape)


def _move(node: ir.Node, dims: Sequence[int], x: tuple[Axes, tuple[int, ...]], y: Axes) -> NdOp:
    """One copy.

    Args:
        node: reads its first input, writes its output.
        dims: of the walk.
        x: axes and start of the input.
        y: axes of the output.
    """
    source, result = _ends(node)
    to = Look(1, y, _origin(result))
    return nd_op(node, [source], [Part("copy", tuple(dims), to, (Look(0, *x),))])


def _transpose(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    perm = node.attributes.get_ints("perm", tuple(reversed(range(len(x.shape)))))
    order = tuple((int(axis), 1) for axis in perm or ())
    return _move(node, y.shape, (order, _origin(x)), whole(1, y).axes)


def _slice(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    starts, ends = (constant(value).reshape(-1) for value in node.inputs[1:3])
    rest = [constant(v).reshape(-1) if v is not None else None for v in node.inputs[3:]]
    axes, steps = (*rest, None, None)[:2]
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    first, step = [0] * len(x.shape), [1] * len(x.shape)
    for start, end, axis, move in zip(starts, ends, axes, steps, strict=True):
        bounds = slice(int(start), int(end), int(move))
        first[axis], _, step[axis] = bounds.indices(x.shape[axis])
    return _move(node, y.shape, (tuple(enumerate(step)), tuple(first)), whole(1, y).axes)


def _concat(node: ir.Node) -> NdOp:
    inputs, y = [value_of(value) for value in node.inputs], value_of(node.outputs[0])
    require_kinds(inputs, [y.kind])
    axis = node.attributes["axis"].as_int() % len(y.shape)
    parts, done = [], 0
    for index, value in enumerate(inputs):
        start = tuple(done if a == axis else 0 for a in range(len(y.shape)))
        to = replace(whole(len(inputs), y), start=start)
        parts.append(Part("copy", value.shape, to, (whole(index, value),)))
        done += value.shape[axis]
    return nd_op(node, inputs, parts)


def _split(node: ir.Node) -> NdOp:
    x, outputs = value_of(node.inputs[0]), [value_of(value) for value in node.outputs]
    axis = node.attributes.get_int("axis", 0) or 0
    axis %= len(x.shape)
    parts, done = [], 0
    for index, value in enumerate(outputs):
        start = tuple(done if a == axis else 0 for a in range(len(x.shape)))
        source = replace(whole(0, x), start=start)
        parts.append(Part("copy", value.shape, whole(1 + index, value), (source,)))
        done += value.shape[axis]
    return nd_op(node, [x], parts)


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _gather(node: ir.Node) -> NdOp:
    """Rows by index; one that is out of range becomes the nearest that exists."""
    x, at, y = value_of(node.inputs[0]), value_of(node.inputs[1]), value_of(node.outputs[0])
    axis = (node.attributes.get_int("axis", 0) or 0) % len(x.shape)
    require_kinds([at], ["int64", "int32"])
    chosen = range(axis, axis + len(at.shape))
    kept = [a for a in range(len(x.shape)) if a != axis]
    order = iter((a, 1) for a in kept)
    axes = tuple(BROADCAST if i in chosen else next(order) for i in range(len(y.shape)))
    if at.constant is not None and at.constant.size == 1 and x.name:
        row = int(np.clip(_wrapped(at.constant, x.shape[axis]), 0, x.shape[axis] - 1).item())
        start = tuple(row if a == axis else 0 for a in range(len(x.shape)))
        return _move(node, y.shape, (axes, start), whole(1, y).axes)
    rows = tuple((i - axis, 1) if i in chosen else BROADCAST for i in range(len(y.shape)))
    looks = (Look(0, axes, _origin(x)), Look(1, rows, _origin(at)))
    part = Part("gather", y.shape, whole(2, y), looks, rows_axis=axis)
    return nd_op(node, [x, at], [part])


def _wrapped(index: Any, count: int) -> Any:
    return np.where(index < 0, index + count, index)


def _gather_elements(node: ir.Node) -> NdOp:
    """One index for each element of y; out of range as in `_gather`."""
    x, at, y = value_of(node.inputs[0]), value_of(node.inputs[1]), value_of(node.outputs[0])
    axis = (node.attributes.get_int("axis", 0) or 0) % len(x.shape)
    require_kinds([at], ["int64", "int32"])
    axes = tuple(BROADCAST if i == axis else (i, 1) for i in range(len(y.shape)))
    looks = (Look(0, axes, _origin(x)), whole(1, at))
    return nd_op(node, [x, at], [Part("gather", y.shape, whole(2, y), looks, rows_axis=axis)])


def _reshape(node: ir.Node) -> NdOp:
    """A copy over the finest axes that both shapes are made of."""
    x, y = _ends(node)
    sizes = sorted({*_suffixes(x.shape), *_suffixes(y.shape)})
    if any(above % below for below, above in pairwise(sizes)):
        raise NotNative(f"the reshape from {list(x.shape)} to {list(y.shape)} splits axes unevenly")
    dims = [above // below for below, above in pairwise(sizes)][::-1]
    steps = sizes[:-1][::-1]
    return _move(node, dims, (_regrouped(x.shape, steps), _origin(x)), _regrouped(y.shape, steps))


def _suffixes(dims: Sequence[int]) -> list[int]:
    """Elements from one step along each axis to the next, and of all."""
    return [math.prod(dims[axis:]) for axis in range(len(dims) + 1)]


def _regrouped(dims: Sequence[int], steps: Sequence[int]) -> Axes:
    """For steps of so many elements: the axis of `dims` that they are along, and how far."""
    sizes = _suffixes(dims)
    axes = []
    for step in steps:
        axis = max(a for a in range(len(dims)) if sizes[a + 1] <= step < sizes[a])
        axes.append((axis, step // sizes[axis + 1]))
    return tuple(axes)


def _tile(node: ir.Node) -> NdOp:
    x = value_of(node.inputs[0])
    repeats = [int(n) for n in constant(node.inputs[1]).reshape(-1)]
    dims = [n for pair in zip(repeats, x.shape, strict=True) for n in pair]
    source = tuple(entry for axis in range(len(x.shape)) for entry in (BROADCAST, (axis, 1)))
    to = tuple(e for axis, n in enumerate(x.shape) for e in ((axis, n), (axis, 1)))
    return _move(node, dims, (source, _origin(x)), to)


def _depth_to_space(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    size, channels = node.attributes["blocksize"].as_int(), y.shape[1]
    dims = (x.shape[0], channels, x.shape[2], size, x.shape[3], size)
    columns_first = node.attributes.get_string("mode", "DCR") == "CRD"
    c, i, j = (size * size, size, 1) if columns_first else (1, size * channels, channels)
    source = ((0, 1), (1, c), (2, 1), (1, i), (3, 1), (1, j))
    return _move(node, dims, (source, _origin(x)), _blocks(size))


def _space_to_depth(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    size, channels = node.attributes["blocksize"].as_int(), x.shape[1]
    dims = (y.shape[0], channels, y.shape[2], size, y.shape[3], size)
    to = ((0, 1), (1, 1), (2, 1), (1, size * channels), (3, 1), (1, channels))
    return _move(node, dims, (_blocks(size), _origin(x)), to)


def _blocks(size: int) -> Axes:
    """An image walked as [N, C, H, size, W, size]."""
    return ((0, 1), (1, 1), (2, size), (2, 1), (3, size), (3, 1))


def _reduction(op: str, *kinds: str) -> Callable[[ir.Node], NdOp]:
    """A reader of reductions."""

    def read(node: ir.Node) -> NdOp:
        x, y = _ends(node)
        require_kinds([x], kinds)
        rank, axes = len(x.shape), _reduced_axes(node, len(x.shape))
        if node.attributes.get_int("keepdims", 1):
            kept = [(a, 1) for a in range(rank)]
        else:
            places = iter(range(len(y.shape)))
            kept = [BROADCAST if a in axes else (next(places), 1) for a in range(rank)]
        looks = tuple(BROADCAST if a in axes else kept[a] for a in range(rank))
        part = Part(op, x.shape, Look(1, looks, _origin(y)), (whole(0, x),))
        return nd_op(node, [x], [part])

    return read


def _reduced_axes(node: ir.Node, rank: int) -> set[int]:
    """The axes of a reduction: an attribute, or from opset 18 on an input; by default all."""
    given = node.attributes.get("axes")
    axes: Sequence[int] = list(given.as_ints()) if given is not None else []
    if _given(node, 1):
        axes = [int(a) for a in constant(node.inputs[1]).reshape(-1)]
    none_is_all = node.attributes.get_int("noop_with_empty_axes", 0) == 0
    if not axes and not none_is_all:
        return set()
    return {a % rank for a in axes} or set(range(rank))


def _global_max(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    axes = tuple((a, 1) if a < 2 else BROADCAST for a in range(len(x.shape)))
    part = Part("reduce_max", x.shape, Look(1, axes, _origin(y)), (whole(0, x),))
    require_kinds([x], ["float32"])
    return nd_op(node, [x], [part])


def _softmax(node: ir.Node) -> NdOp:
    x, y = _ends(node)
    require_kinds([x], ["float32"])
    axis = (-1 if (given := node.attributes.get_int("axis")) is None else given) % len(x.shape)
    order = [*(a for a in range(len(x.shape)) if a != axis), axis]
    axes, dims = tuple((a, 1) for a in order), tuple(x.shape[a] for a in order)
    part = Part("softmax", dims, Look(1, axes, _origin(y)), (Look(0, axes, _origin(x)),))
    return nd_op(node, [x], [part])


_NUMBERS = ("float32", "int64", "int32")

READERS: dict[str, Callable[[ir.Node], NdOp]] = {
    "Transpose": _transpose,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Pad": read_pad,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Tile": _tile,
    "Resize": read_nearest,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Softmax": _softmax,
    "GlobalMaxPool": _global_max,
    "ReduceMean": _reduction("mean", "float32"),
    "ReduceSum": _reduction("sum", *_NUMBERS),
    "ReduceMax": _reduction("reduce_max", *_NUMBERS),
    "ReduceMin": _reduction("reduce_min", *_NUMBERS),
    "ReduceProd": _reduction("prod", *_NUMBERS),
    "ReduceL1": _reduction("l1", "float32"),
    "ReduceL2": _reduction("l2", "float32"),
    "ReduceSumSquare": _reduction("sumsquare", "float32"),
}
