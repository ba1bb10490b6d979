"""Where operators that move elements move the labels of their channels.

A value has an array of labels of its own rank (`core/labels.py`): an axis along which labels do not
vary has size 1 in it, whatever its size in the value. So sizes of other axes need not be known.
Each rule returns the labels of the node's results, or None where it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from twofour.core.channels import OPAQUE, UNIFORM, Ids
from twofour.onnx_tools.edit import Array, constant, operand

Moved = list[Ids] | None
Rule = Callable[[ir.Node, Ids], Moved]
Size = tuple[int, tuple[str, ...]]


def shrunk(ids: Ids) -> Ids:
    """With size 1 along axes where labels do not vary."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis) if ids.shape[axis] else ids
        if ids.shape[axis] > 1 and (ids == first).all():
            ids = first
    return ids


def varying(ids: Ids) -> list[int]:
    """The axes along which labels vary."""
    return [axis for axis, size in enumerate(ids.shape) if size > 1]


def along(rank: int, axis: int, ids: Ids) -> Ids:
    """Labels that vary along one axis."""
    shape = [1] * rank
    shape[axis] = -1
    return ids.reshape(shape)


def vector(ids: Ids, axis: int) -> Ids | None:
    """The labels along an axis, int64 [C]; None if they vary along others, or not along it."""
    axis %= ids.ndim
    return ids.reshape(-1) if ids.shape[axis] == ids.size else None


def _same(node: ir.Node, ids: Ids) -> Moved:
    return [ids for _ in node.outputs]


def _per_channel(node: ir.Node, ids: Ids) -> Moved:
    """What works on each channel of an image by itself."""
    return [ids] if len(node.outputs) == 1 and set(varying(ids)) <= {0, 1} else None


def _clip(node: ir.Node, ids: Ids) -> Moved:
    """A Clip from 0 to infinity is a Relu."""
    low, high = constant(operand(node, 1)), constant(operand(node, 2))
    open_ended = operand(node, 2) is None or (high is not None and bool((high > 1e30).all()))
    return [ids] if low is not None and not low.any() and open_ended else None


def _transpose(node: ir.Node, ids: Ids) -> Moved:
    return [ids.transpose(node.attributes.get_ints("perm", tuple(range(ids.ndim))[::-1]))]


def _axes(node: ir.Node, rank: int, index: int = 1) -> list[int] | None:
    """The axes that a node names by an input or an attribute; None if that is computed."""
    given = operand(node, index)
    array = constant(given)
    if given is not None and array is None:
        return None
    found = node.attributes.get_ints("axes", ()) if array is None else array.reshape(-1).tolist()
    return [int(axis) % rank for axis in found]


def _squeeze(node: ir.Node, ids: Ids) -> Moved:
    axes = _axes(node, ids.ndim)
    return None if not axes or set(axes) & set(varying(ids)) else [ids.squeeze(tuple(axes))]


def _unsqueeze(node: ir.Node, ids: Ids) -> Moved:
    array = constant(operand(node, 1))
    count = len(node.attributes.get_ints("axes", ())) if array is None else array.size
    axes = _axes(node, ids.ndim + count)
    return [np.expand_dims(ids, tuple(axes))] if axes else None


def _reduce(node: ir.Node, ids: Ids) -> Moved:
    axes = _axes(node, ids.ndim)
    if not axes or set(axes) & set(varying(ids)):
        return None
    return [ids if node.attributes.get_int("keepdims", 1) else ids.squeeze(tuple(axes))]


def _slice(node: ir.Node, ids: Ids) -> Moved:
    starts, ends, steps = (constant(operand(node, index)) for index in (1, 2, 4))
    axes = _axes(node, ids.ndim, 3)
    if axes is None:
        return None
    if not set(axes or range(ids.ndim)) & set(varying(ids)):
        return [ids]
    if starts is None or ends is None or (operand(node, 4) is not None and steps is None):
        return None
    axes = axes or list(range(len(starts)))
    step = [1] * len(axes) if steps is None else steps.tolist()
    for axis, first, end, by in zip(axes, starts.tolist(), ends.tolist(), step, strict=True):
        if ids.shape[axis] > 1:
            if by < 0:
                return None
            ids = ids[(slice(None),) * axis + (slice(first, end, by),)]
    return [shrunk(ids)] if ids.size else None


def _split(node: ir.Node, ids: Ids) -> Moved:
    axis = node.attributes.get_int("axis", 0) % ids.ndim
    if ids.shape[axis] == 1:
        return _same(node, ids)
    sizes = [None if v.shape is None else v.shape[axis] for v in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes) or sum(known) != ids.shape[axis]:
        return None
    return [shrunk(part) for part in np.split(ids, np.cumsum(known)[:-1], axis)]


def _gather(node: ir.Node, ids: Ids) -> Moved:
    indices, axis = constant(operand(node, 1)), node.attributes.get_int("axis", 0) % ids.ndim
    if indices is None:
        return None
    size = ids.shape[axis]
    return [shrunk(np.take(ids, indices % size if size > 1 else indices * 0, axis))]


def _pad(node: ir.Node, ids: Ids) -> Moved:
    pads, fill = constant(operand(node, 1)), operand(node, 2)
    filled = constant(fill)
    if node.attributes.get_string("mode", "constant") != "constant" or operand(node, 3) is not None:
        return None
    if pads is None or (fill is not None and (filled is None or filled.any())):
        return None
    ends = pads.reshape(2, -1)
    if (ends < 0).any() or ends.shape[1] != ids.ndim:
        return None
    both = zip(ids.shape, ends.T.tolist(), strict=True)
    added = [(first, last) if size > 1 else (0, 0) for size, (first, last) in both]
    return [np.pad(ids, added, constant_values=UNIFORM)]


def _resize(node: ir.Node, ids: Ids) -> Moved:
    """Interpolation along other axes than those of channels."""
    after = node.outputs[0].shape
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return None
    same = after is not None and all(after[axis] == ids.shape[axis] for axis in varying(ids))
    return [ids] if same else None


def _reshape(node: ir.Node, ids: Ids) -> Moved:
    """Finds the axes that hold what the varying axes held, counted from either end."""
    before, after = (_sizes(value) for value in (node.inputs[0], node.outputs[0]))
    found = varying(ids)
    if before is None or after is None or not found:
        return None
    for end in range(max(found) + 1, len(before) + 1):
        for start in range(min(found), -1, -1):
            block = [size[0] for size in before[start:end] if not size[1]]
            fits = len(block) == end - start and _fits(ids.shape[start:end], block)
            place = _place(before, after, (start, end)) if fits else None
            if place is not None:
                full = np.broadcast_to(ids.reshape(ids.shape[start:end]), block)
                sizes = [size[0] for size in after[slice(*place)]]
                rest = len(after) - place[1]
                return [shrunk(full.reshape([1] * place[0] + sizes + [1] * rest))]
    return None


def _fits(shape: Sequence[int], block: Sequence[int]) -> bool:
    """Whether labels of this shape can lie along axes of these sizes."""
    return all(size in (1, whole) for size, whole in zip(shape, block, strict=True))


def _place(
    before: Sequence[Size], after: Sequence[Size], block: tuple[int, int]
) -> tuple[int, int] | None:
    """The axes after a reshape that hold exactly what a block of axes held; None if none do."""
    product = _product(before[slice(*block)])
    left, right = _product(before[: block[0]]), _product(before[block[1] :])
    for start in range(len(after)):
        for end in range(start + 1, len(after) + 1):
            known = all(not size[1] for size in after[start:end])
            if known and _product(after[start:end]) == product:
                if _product(after[:start]) == left or _product(after[end:]) == right:
                    return start, end
    return None


def _product(sizes: Sequence[Size]) -> Size:
    names = sorted(name for size in sizes for name in size[1])
    return math.prod(size[0] for size in sizes), tuple(names)


def _sizes(value: ir.Value | None) -> list[Size] | None:
    """Each dimension as a number, or 1 and a name."""
    if value is None or value.shape is None:
        return None
    return [
        (dim, ()) if isinstance(dim, int) else (1, (str(dim.value) if dim.value else f"?{i}",))
        for i, dim in enumerate(value.shape)
    ]


def concatenated(node: ir.Node, parts: Sequence[Ids | None]) -> Ids | None:
    """The labels of a Concat; None where labels do not vary along its axis.

    Args:
        node: of two or more values of one rank.
        parts: the labels of each; None for values that have none.
    """
    rank = next(part.ndim for part in parts if part is not None)
    axis = node.attributes.get_int("axis", 0) % rank
    if not any(part is not None and part.shape[axis] > 1 for part in parts):
        return None
    spread: list[Array] = []
    for value, part in zip(node.inputs, parts, strict=True):
        ids = np.full((1,) * rank, OPAQUE) if part is None else part
        size = None if value is None or value.shape is None else value.shape[axis]
        if not isinstance(size, int):
            return None
        shape = [size if a == axis else n for a, n in enumerate(ids.shape)]
        if not _fits(ids.shape, shape):
            return None
        spread.append(np.broadcast_to(ids, shape))
    others = [tuple(n for a, n in enumerate(ids.shape) if a != axis) for ids in spread]
    grid = list(np.broadcast_shapes(*others))
    grid.insert(axis, -1)
    return np.concatenate(
        [np.broadcast_to(s, [s.shape[axis] if n < 0 else n for n in grid]) for s in spread], axis
    )


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity", "Neg", "Abs"), _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _per_channel),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    "Clip": _clip,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Shape": lambda node, ids: [],
}
"""Of operators f with f(x * s) = f(x) * s for factors s > 0, one a channel."""
