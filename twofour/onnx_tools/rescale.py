"""Which channels of a float network can be multiplied by a factor each, the function being kept.

    y = relu(w1 x + b1),  z = w2 y      =>      y * f = relu((f w1) x + f b1),  z = (w2 / f) (y * f)

Labels of channels are carried through the graph, as for permutations (`core/channels.py`): a layer,
a normalization's gamma and beta, or a constant factor begins new ones, an operator with
f(x * s) = f(x) * s for s > 0 hands them on, a layer's weight ends them, and what is added element
by element is one channel. All else pins what it reads, with the reason: those channels keep factor
1. So residual streams, depthwise convolutions, concatenations, channel shuffles and the heads of
an attention need no rules of their own.

Weights are multiplied: zeros stay zeros.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1; Meller et al. 2019, arXiv:1902.01917.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.channels import OPAQUE, UNIFORM, Channels, Ids
from twofour.onnx_tools.edit import Editor, constant, operand, reads, sole_use
from twofour.onnx_tools.eligible import is_layer
from twofour.onnx_tools.moved_labels import RULES, along, concatenated, vector

Results = list[Ids] | None

_NOTHING = np.full(1, UNIFORM)


@dataclass(frozen=True)
class Place:
    """A constant that changes with the factors: array * factor[written] / factor[read].

    Attributes:
        node: that reads it.
        index: which of the node's inputs it is.
        written: labels, broadcast to the array.
        read: likewise.
    """

    node: ir.Node
    index: int
    written: Ids
    read: Ids


@dataclass(frozen=True)
class Read:
    """A layer, and the channels that it multiplies its weight with.

    Attributes:
        layer: a Conv, Gemm or MatMul.
        value: its input.
        axis: of the input, counts the channels.
        ids: int64 [C], their labels.
    """

    layer: ir.Node
    value: ir.Value
    axis: int
    ids: Ids


@dataclass
class Traced:
    """What is known of a model's channels.

    Attributes:
        channels: ties and pins.
        places: constants that write or read channels.
        reads: of layers.
        values: the labels of each value that has any.
        rows: labels that a normalization begins, or that an attention hands on.
    """

    channels: Channels = field(default_factory=Channels)
    places: list[Place] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    values: dict[ir.Value, Ids] = field(default_factory=dict)
    rows: list[Ids] = field(default_factory=list)


def trace(model: ir.Model) -> Traced:
    """Carries labels through the main graph.

    Args:
        model: prepared and float (see `prepare.py`).
    """
    traced = Traced()
    for node in model.graph:
        _visit(traced, node)
    for value in model.graph.outputs:
        if value in traced.values:
            traced.channels.pin(traced.values[value], "an output of the model")
    return traced


def rescale(model: ir.Model, traced: Traced, factors: Mapping[int, float]) -> None:
    """Multiplies channels.

    Args:
        model: that was traced; changed.
        traced: of it.
        factors: channel (`Channels.roots`) -> what it is multiplied by, > 0; 1 for all others.

    Raises:
        ValueError: a channel is pinned.
    """
    if fixed := traced.channels.fixed().keys() & factors.keys():
        raise ValueError(f"channel {min(fixed)} is pinned")
    if not factors:
        return
    editor = Editor(model.graph)
    for place in traced.places:
        written, read = (_of(traced, factors, ids) for ids in (place.written, place.read))
        array = constant(operand(place.node, place.index))
        if array is not None and ((written != 1).any() or (read != 1).any()):
            scaled = array.astype(np.float64) * written / read
            editor.set_constant(place.node, place.index, scaled.astype(array.dtype))


def _of(traced: Traced, factors: Mapping[int, float], ids: Ids) -> NDArray[np.float64]:
    distinct, inverse = np.unique(traced.channels.roots(ids), return_inverse=True)
    found = np.array([factors.get(root, 1.0) for root in distinct.tolist()])
    return found[inverse].reshape(ids.shape)


def _visit(traced: Traced, node: ir.Node) -> None:
    given = {value: traced.values[value] for value in reads(node) if value in traced.values}
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    results: Results = None
    if rule is not None:
        results = rule(traced, node)
    elif given and len(given) == 1 and node.domain == "" and node.op_type in RULES:
        first = operand(node, 0)
        results = None if first not in given else RULES[node.op_type](node, given[first])
    if results is None:
        pin(traced, given, f"{node.op_type} {node.name!r} reads it")
        return
    known = ((v, ids) for v, ids in zip(node.outputs, results, strict=False) if (ids > 0).any())
    traced.values.update(known)


def pin(traced: Traced, values: Iterable[ir.Value], reason: str) -> None:
    """Leaves the channels of these values as they are."""
    for value in values:
        if value in traced.values:
            traced.channels.pin(traced.values[value], reason)


def _layer(traced: Traced, node: ir.Node) -> Results:
    """Reads channels along one axis, and begins those of its output."""
    weight, x, bias = constant(operand(node, 1)), operand(node, 0), operand(node, 2)
    if weight is None and node.op_type == "MatMul":
        return _product(traced, node)
    if weight is None or x is None or not is_layer(node) or not _alone(operand(node, 1)):
        return None
    conv = node.op_type == "Conv"
    rank = weight.ndim if conv else _rank(x)
    if rank is None or (bias is not None and constant(bias) is None):
        return None
    across, axis = conv or node.attributes.get_int("transB", 0) == 1, 1 if conv else -1
    outputs, inputs = weight.shape[:2] if across else weight.shape[::-1]
    groups = node.attributes.get_int("group", 1) if conv else 1
    read = np.full(inputs * groups, UNIFORM)
    if x in traced.values:
        found = vector(traced.values[x], axis)
        if found is None or found.size != read.size:
            return None
        read = found
        traced.reads.append(Read(node, x, axis, read))
    ids = traced.channels.new(outputs)
    rows = read.reshape(groups, 1, inputs).repeat(outputs // groups, 1).reshape(outputs, inputs)
    written = ids[:, None].repeat(inputs, 1)
    taps = (1,) * (weight.ndim - 2)
    both = [each if across else each.T for each in (written, rows)]
    traced.places.append(Place(node, 1, *(each.reshape(each.shape + taps) for each in both)))
    if bias is not None:
        traced.places.append(Place(node, 2, ids, _NOTHING))
    return [along(rank, axis, ids)]


def _alone(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and sole_use(value)


def _normalization(traced: Traced, node: ir.Node) -> Results:
    """Gamma and beta begin the channels of what is normalized along the last axis."""
    x, gamma = operand(node, 0), constant(operand(node, 1))
    bias = operand(node, 2)
    if x is None or x.shape is None or gamma is None or gamma.ndim != 1:
        return None
    if node.attributes.get_int("axis", -1) not in (-1, len(x.shape) - 1):
        return None
    if bias is not None and constant(bias) is None:
        return None
    pin(traced, [x], f"{node.op_type} {node.name!r} normalizes it")
    ids = traced.channels.new(gamma.size)
    traced.rows.append(ids)
    traced.places.append(Place(node, 1, ids, _NOTHING))
    if bias is not None:
        traced.places.append(Place(node, 2, ids, _NOTHING))
    return [along(len(x.shape), -1, ids)]


def _sum(traced: Traced, node: ir.Node) -> Results:
    """What is added is one channel; a constant that is added is multiplied with it."""
    known = [traced.values.get(v) if v is not None else None for v in node.inputs]
    if len(known) != 2 or known[0] is known[1] is None:
        return None
    one, other = known
    if one is not None and other is not None:
        if one.ndim != other.ndim or not _alike(node):
            return None
        grid = np.broadcast_shapes(one.shape, other.shape)
        ones, others = (np.broadcast_to(ids, grid) for ids in (one, other))
        if ((ones == OPAQUE) != (others == OPAQUE)).any():
            return None
        traced.channels.tie(ones, others)
        return [np.where(ones == UNIFORM, others, ones)]  # to zeros, anything can be added
    index, whole = (1, one) if other is None else (0, other)
    array = constant(operand(node, index))
    if array is None or whole is None or array.ndim > whole.ndim:
        return None
    ids = whole
    while ids.ndim > max(array.ndim, 1) and ids.shape[0] == 1:
        ids = ids[0]
    traced.places.append(Place(node, index, ids, _NOTHING))
    return [np.where(whole == UNIFORM, OPAQUE, whole)]  # zeros that are added to are none


def _alike(node: ir.Node) -> bool:
    """Whether both operands are known to have the result's channels: none is broadcast."""
    shapes = [value.shape for value in node.inputs if value is not None]
    return all(shape is not None and len(shape) == len(shapes[0] or ()) for shape in shapes)


def _factor(traced: Traced, node: ir.Node) -> Results:
    """One operand hands on its channels, whatever it is multiplied with or divided by."""
    a, b = operand(node, 0), operand(node, 1)
    if a is None or b is None:
        return None
    one, other = traced.values.get(a), traced.values.get(b)
    if one is not None and other is not None:
        if a is b or one.ndim < other.ndim:
            return None
        pin(traced, [b], f"{node.op_type} {node.name!r} reads it as a factor")
        return [one]
    if one is not None:
        return [one] if _rank(b) is not None and one.ndim >= (_rank(b) or 0) else None
    if other is not None and node.op_type == "Mul":
        return [other] if _rank(a) is not None and other.ndim >= (_rank(a) or 0) else None
    return _constant_factor(traced, node) if node.op_type == "Mul" and other is None else None


def _constant_factor(traced: Traced, node: ir.Node) -> Results:
    """The last step of a normalization that is written in small operators: n * gamma."""
    index = 0 if constant(operand(node, 1)) is None else 1
    array, computed = constant(operand(node, index)), operand(node, 1 - index)
    if array is None or computed is None or array.dtype != np.float32:
        return None
    rank = _rank(computed)
    if constant(computed) is not None or rank is None or rank < array.ndim:
        return None
    if array.size < 2 or array.size != max(array.shape):
        return None
    ids = traced.channels.new(array.size).reshape(array.shape)
    traced.rows.append(ids.reshape(-1))
    traced.places.append(Place(node, index, ids, _NOTHING))
    return [ids.reshape((1,) * (rank - ids.ndim) + ids.shape)]


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _product(traced: Traced, node: ir.Node) -> Results:
    """Of two activations: the columns of the second are those of the result."""
    a, b = operand(node, 0), operand(node, 1)
    if a is None or b is None or b not in traced.values:
        return None
    ids = traced.values[b]
    if ids.ndim < 2 or ids.shape[-2] > 1 or _rank(a) is None or (_rank(a) or 0) > ids.ndim:
        return None
    pin(traced, [a], f"MatMul {node.name!r} reads it as the first operand")
    traced.rows.append(ids[ids > 0])
    return [ids]


def _concat(traced: Traced, node: ir.Node) -> Results:
    parts = [traced.values.get(v) if v is not None else None for v in node.inputs]
    if all(part is None for part in parts):
        return None
    joined = concatenated(node, parts)
    if joined is not None:
        return [joined]
    first = next(part for part in parts if part is not None)
    for part in parts:
        if part is None or part.shape != first.shape:
            return None
        traced.channels.tie(first, part)
    return [first]


def _prelu(traced: Traced, node: ir.Node) -> Results:
    x, slope = operand(node, 0), constant(operand(node, 1))
    return None if x is None or slope is None or x not in traced.values else [traced.values[x]]


_RULES = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), _layer),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalization),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _factor),
    "Concat": _concat,
    "PRelu": _prelu,
}
"""Of operators that begin or end channels, or read several values."""
