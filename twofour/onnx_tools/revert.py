"""Switches single layers of a quantized or pruned model back: to floats, or to dense weights.

    x -> Q -> DQ -> Conv(DQ(w8))     =>     x -> Conv(w)                to floats
    x -> Q -> DQ -> Conv(DQ(w8))     =>     x -> Q -> DQ -> Conv(DQ(dense w8))

A layer's own rounding is that of its weight and of what it reads, followed up through what only
moves data. Other layers with int8 weights that read the same tensor go on reading it rounded; nodes
without a weight (a residual Add, say) read its floats. Such a node is a layer of its own where it
reads a rounding that no layer with a weight has.

The float weight of a quantized one comes from a float model. Where that is the dense model of a
pruned one, the zeros stay; where it is another network (before fine-tuning, say), the weights stay
rounded, and only what the layer reads is switched back. Where the float model is known to be the
one that was quantized, `float_switches` asks no such questions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.core.patterns import is_pattern
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.edit import Array, Editor, constant, is_standard, operand
from twofour.onnx_tools.inspect import patterns_of
from twofour.onnx_tools.moving import moved_from
from twofour.onnx_tools.placement import output_axis
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.weights import Weight, find_weight, layer_weights

INT8 = "int8"
_SAME_SHARE = 0.99
"""Of weights that are a float model's, rounded: all but what a bad scale cut off."""


@dataclass(frozen=True, eq=False)
class Switch:
    """A layer that can be switched back.

    Attributes:
        layer: name of the node.
        op: its operator.
        kind: "int8", or the pattern that is given up, such as "2:4".
        values: the layer's weight in its other form, float32 laid out as `Weight.values`; None
            where only what it reads changes.
        roundings: (before, after): names of the values that it reads, unrounded and rounded.
        weight_noise: energy of the weight's change over that of the other form.
    """

    layer: str
    op: str
    kind: str
    values: Array | None
    roundings: tuple[tuple[str, str], ...] = ()
    weight_noise: float = 0.0


@dataclass(frozen=True)
class Switches:
    """All layers of a model that can be switched back.

    Attributes:
        rounded: to floats.
        sparse: to dense weights.
        weights_stay_rounded: the float model is no float form of this one.
        without_dense: layers with a pattern for which no dense weight was found.
    """

    rounded: tuple[Switch, ...]
    sparse: tuple[Switch, ...]
    weights_stay_rounded: bool
    without_dense: tuple[str, ...]


def find_switches(model: ir.Model, others: Sequence[ir.Model]) -> Switches:
    """What can be switched back.

    Args:
        model: what the engine was built from.
        others: float models of the same network, dense ones among them; the first that has a
            layer's weight in the right shape is taken.
    """
    known = [_Weights.of(other) for other in others]
    weights = {str(layer.name): (layer, weight) for layer, weight in layer_weights(model)}
    floats = {name: _float_form(*pair, known) for name, pair in weights.items()}
    shares = [_same_share(weights[name][1], found) for name, found in floats.items()]
    is_form = bool(shares) and float(np.median(shares)) >= _SAME_SHARE
    rounded = tuple(_rounded(model, floats if is_form else {}))
    sparse, without = [], []
    for name, pattern in patterns_of(model).items():
        layer, weight = weights[name]
        dense = _dense_form(layer, weight, known, pattern)
        if dense is None:
            without.append(name)
        else:
            noise = _noise(dense, _dequantized(weight))
            sparse.append(Switch(name, layer.op_type, pattern, dense, (), noise))
    stay = bool(rounded) and not is_form
    return Switches(rounded, tuple(sparse), stay, tuple(without))


def float_switches(model: ir.Model, floats: ir.Model) -> tuple[Switch, ...]:
    """What can be switched back to floats in a model that was quantized here.

    Args:
        model: with Q/DQ pairs.
        floats: the model that they were put into: its nodes have the same names.
    """
    values = {
        str(layer.name): weight.values.astype(np.float32)
        for layer, weight in layer_weights(floats)
        if weight.scale is None
    }
    return tuple(_rounded(model, values))


def with_biases_of(model: ir.Model, floats: ir.Model) -> tuple[ir.Model, int]:
    """A copy with the float model's biases, where a correction of the int8 model changed them.

    A correction takes back what rounding shifts in one network; where some of its layers become
    float again, it would shift them.

    Args:
        model: with Q/DQ pairs.
        floats: the model that they were put into: its nodes have the same names.

    Returns:
        The copy, and how many constants were changed.
    """
    model = model.clone()
    editor, changed = Editor(model.graph), 0
    nodes = {str(node.name): node for node in floats.graph}
    for node in model.graph:
        given = nodes.get(str(node.name))
        for index, value in enumerate(node.inputs if given is not None else ()):
            now, before = constant(value), constant(operand(given, index)) if given else None
            if now is None or before is None or now.shape != before.shape:
                continue
            if now.dtype == np.float32 and not np.array_equal(now, before):
                name = f"{node.name}_bias_before_{index}"
                node.replace_input_with(index, editor.initializer(name, before))
                changed += 1
    common_passes.RemoveUnusedNodesPass()(model)
    return model, changed


def switched(model: ir.Model, switches: Sequence[Switch]) -> ir.Model:
    """A copy of the model in which these layers have their other form."""
    model = model.clone()
    editor = Editor(model.graph)
    nodes = {str(node.name): node for node in model.graph.all_nodes()}
    free = {nodes[switch.layer] for switch in switches if switch.kind == INT8}
    for switch in switches:
        layer = nodes[switch.layer]
        if switch.kind == INT8:
            for dq in _roundings(layer):
                _unround(dq, free)
        if switch.values is not None:
            _set_weight(editor, layer, switch)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def is_quantized(model: ir.Model) -> bool:
    """Whether there are Q/DQ pairs in the main graph."""
    return any(is_standard(node, "QuantizeLinear", "DequantizeLinear") for node in model.graph)


# Rounding.


def _rounded(model: ir.Model, floats: Mapping[str, Array | None]) -> Iterator[Switch]:
    """Layers with a weight first, then nodes that read a rounding which none of those has."""
    taken: set[tuple[str, str]] = set()
    others = []
    for node in model.graph:
        if is_standard(node, "QuantizeLinear", "DequantizeLinear") or moved_from(node):
            continue
        weight = find_weight(node)
        names = tuple(_named(dq) for dq in _roundings(node))
        if weight is None or weight.scale is None:
            others.append((node, names))
            continue
        taken.update(names)
        values = floats.get(str(node.name))
        kept = _dequantized(weight)
        noise = 0.0 if values is None else _noise(values, kept)
        yield Switch(str(node.name), node.op_type, INT8, values, names, noise)
    for node, names in others:
        own = tuple(name for name in names if name not in taken)
        if own:
            taken.update(own)
            yield Switch(str(node.name), node.op_type, INT8, None, own)


def _roundings(node: ir.Node) -> list[ir.Node]:
    """The DequantizeLinear nodes of the Q/DQ pairs that round what a node reads."""
    found: list[ir.Node] = []
    for value in node.inputs:
        _follow(value, found)
    return found


def _follow(value: ir.Value | None, found: list[ir.Node]) -> None:
    """Adds the pair that makes a value, and those before it with the same scale."""
    dq = None if value is None else value.producer()
    if dq is None or not is_standard(dq, "DequantizeLinear") or dq in found:
        return
    q = _quantizer(dq)
    if q is None:
        return
    found.append(dq)
    before = operand(q, 0)
    for moved in moved_from(None if before is None else before.producer()):
        earlier = moved.producer()
        if is_standard(earlier, "DequantizeLinear") and earlier is not None:
            if _same_scale(earlier, dq):
                _follow(moved, found)


def _quantizer(dq: ir.Node) -> ir.Node | None:
    """The QuantizeLinear of a pair that rounds an activation; None for a weight."""
    value = operand(dq, 0)
    q = None if value is None else value.producer()
    if q is None or not is_standard(q, "QuantizeLinear") or constant(operand(q, 0)) is not None:
        return None
    return q


def _same_scale(a: ir.Node, b: ir.Node) -> bool:
    x, y = constant(operand(a, 1)), constant(operand(b, 1))
    return x is not None and y is not None and np.array_equal(x, y)


def _named(dq: ir.Node) -> tuple[str, str]:
    q = _quantizer(dq)
    before = None if q is None else operand(q, 0)
    return (str(before.name) if before is not None else "", str(dq.outputs[0].name))


def _unround(dq: ir.Node, free: Collection[ir.Node]) -> None:
    """Hands readers what the pair rounds: x -> Q -> DQ -> y becomes x -> y.

    Layers with int8 weights that are not `free` stay behind the pair, to be integer layers.
    """
    q = _quantizer(dq)
    before = None if q is None else operand(q, 0)
    for node, index in list(dq.outputs[0].uses()):
        if before is not None and (node in free or not _is_integer(node)):
            node.replace_input_with(index, before)


def _is_integer(node: ir.Node) -> bool:
    weight = find_weight(node)
    return weight is not None and weight.scale is not None


# Weights, all as `Weight.values`: output channels first.


@dataclass(frozen=True)
class _Weights:
    """The float weights of a model, by the names of nodes and of what they compute."""

    by_name: Mapping[str, Sequence[Array]]

    @staticmethod
    def of(model: ir.Model) -> _Weights:
        """As the model has them, and with its normalizations folded in."""
        found: dict[str, list[Array]] = {}
        for form in (prepare(model), model):
            for layer, weight in layer_weights(form):
                if weight.scale is None and weight.values.dtype.kind == "f":
                    for name in (f"node {layer.name}", f"value {layer.outputs[0].name}"):
                        found.setdefault(name, []).append(weight.values)
        return _Weights(found)

    def candidates(self, layer: ir.Node, shape: tuple[int, ...]) -> list[Array]:
        """Weights of this shape for a layer of another model."""
        names = (f"node {layer.name}", f"value {layer.outputs[0].name}")
        every = [array for name in names for array in self.by_name.get(name, ())]
        return [array.astype(np.float32) for array in every if array.shape == shape]


def _dequantized(weight: Weight) -> Array:
    if weight.scale is None:
        return weight.values.astype(np.float32)
    return (weight.values * _along_outputs(weight.scale, weight.values)).astype(np.float32)


def _along_outputs(scale: Array, values: Array) -> Array:
    """One scale for all, or shaped to one for each output channel."""
    return scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale


def _nearest(weight: Weight, found: Sequence[Array]) -> Array | None:
    """The one that points most in the weight's direction."""
    kept = _dequantized(weight)

    def likeness(values: Array) -> float:
        norm = float(np.linalg.norm(values))
        return float(np.vdot(values, kept)) / norm if norm else -np.inf

    return max(found, key=likeness, default=None)


def _float_form(layer: ir.Node, weight: Weight, known: Sequence[_Weights]) -> Array | None:
    """A quantized weight before it was rounded, its pattern kept."""
    if weight.scale is None:
        return None
    found = [array for each in known for array in each.candidates(layer, weight.values.shape)]
    kept = _dequantized(weight)
    values = _nearest(weight, [array for array in found if not np.array_equal(array, kept)])
    zeros = weight.values == 0
    if values is None or zeros.mean() < 0.5:  # no pattern: what is zero was small
        return values
    return np.where(zeros, np.float32(0), values)


def _same_share(weight: Weight, values: Array | None) -> float:
    """Of the weights that are not zero, how many are these values rounded."""
    if values is None or weight.scale is None:
        return 0.0
    near = np.abs(values - _dequantized(weight)) <= 0.75 * _along_outputs(weight.scale, values)
    return float(near[weight.values != 0].mean()) if weight.values.any() else 1.0


def _dense_form(
    layer: ir.Node, weight: Weight, known: Sequence[_Weights], pattern: str
) -> Array | None:
    """A weight of the same layer without the pattern."""
    for each in known:
        found = each.candidates(layer, weight.values.shape)
        dense = _nearest(weight, [array for array in found if not is_pattern(array, pattern)])
        if dense is not None:
            return dense
    return None


def _noise(other: Array, kept: Array) -> float:
    """Energy of the change over that of the other form."""
    signal = float(np.vdot(other, other))
    return float(np.vdot(other - kept, other - kept)) / signal if signal else 0.0


def _set_weight(editor: Editor, layer: ir.Node, switch: Switch) -> None:
    """Gives a layer a weight in its other form: float32, or int8 again where it was."""
    old, values = layer.inputs[1], switch.values
    if old is None or values is None:
        return
    weight = find_weight(layer)
    flat = output_axis(layer) == 1 and values.ndim == 2
    stored = np.ascontiguousarray(values.T if flat else values)
    base = f"{layer.name}_{'float' if switch.kind == INT8 else 'dense'}"
    if switch.kind == INT8 or weight is None or weight.scale is None:
        layer.replace_input_with(1, editor.initializer(base, stored))
        return
    axis = output_axis(layer)
    w8, scale = quantize_weight(stored, axis)
    zero_point = np.zeros(len(scale), np.int8)
    inputs = [
        editor.initializer(f"{base}_quantized", w8),
        editor.initializer(f"{base}_scale", scale),
        editor.initializer(f"{base}_zero_point", zero_point),
    ]
    name = f"{base}_dequantized"
    dq = editor.node("DequantizeLinear", inputs, name, inputs[0], ir.DataType.FLOAT, axis)
    layer.prepend(dq)
    layer.replace_input_with(1, dq.outputs[0])
