"""Decides which tensors of a prepared float model are quantized, and which share a scale.

1. Each Conv, Gemm and MatMul of the main graph with a constant float32 weight takes quantized
   activations and weights. What else has weights stays float, see `eligible.py`.
2. A residual Add takes a quantized shortcut. The convolution that ends in the Add hands over
   floats, so that convolution, Add, ReLU and the rounding after them can be one integer kernel.
   Likewise a layer and its activation, whatever nodes that is written with: only what the next
   layer reads is rounded.
3. An average pooling before a layer of rule 1 takes quantized activations.
4. What only moves data (Slice, Pad with zeros, MaxPool, Concat, Split, Reshape, ...) before a
   quantized tensor moves quantized data: its inputs are quantized with the same scale, so nothing
   is rounded twice. What is joined shares the scale that holds the values of each part.
5. Everything that reads a quantized tensor reads its rounded values, nodes excluded by the user and
   graph outputs excepted: then no kernel has to write the tensor twice.
6. A sum that a normalization of rows reads stays float, and so do its operands: in a transformer
   every block adds to it, and each rounding would stay in it to the end.
7. Both products of an attention take quantized operands: q, k and v symmetric (where they are
   computed, before they are moved and scaled), the softmax with the range 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_ir as ir

from twofour.onnx_tools.attention import Attention, find_attention, is_normalized
from twofour.onnx_tools.edit import constant, is_standard, operand, sole_use
from twofour.onnx_tools.eligible import is_layer, nothing_to_quantize, require_float
from twofour.onnx_tools.histogram import Range
from twofour.onnx_tools.moving import JOINERS, MOVERS, Scales, is_mover
from twofour.onnx_tools.options import QuantizeOptions

# Mul and Div: of an activation that exporters write as x * Sigmoid(x) or x * (1 + Erf(...)) / 2.
_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Mul", "Div")
_POOLINGS = ("GlobalAveragePool", "AveragePool", "ReduceMean")
_PASSED_THROUGH = (*MOVERS, *JOINERS, *_ACTIVATIONS, "Add", *_POOLINGS)


@dataclass(frozen=True)
class Placement:
    """Where quantization goes.

    Attributes:
        layers: nodes whose weight (input 1) becomes int8.
        scale_of: tensor that is quantized -> tensor that its scale is named after (itself, or one
            that data of the same scale was moved from).
        origins: of those that scales are named after: the tensors whose ranges together give it.
        stay_float: nodes that go on reading float tensors.
        symmetric: tensors that are int8 with zero point 0 whatever the options say.
        known: tensors whose range needs no calibration.
    """

    layers: tuple[ir.Node, ...]
    scale_of: dict[ir.Value, ir.Value]
    origins: Mapping[ir.Value, list[ir.Value]]
    stay_float: frozenset[ir.Node]
    symmetric: frozenset[ir.Value] = frozenset()
    known: Mapping[ir.Value, Range] = field(default_factory=dict)

    @property
    def sources(self) -> list[ir.Value]:
        """The tensors that scales are named after, each once."""
        return list(dict.fromkeys(self.scale_of.values()))

    @property
    def calibrated(self) -> list[ir.Value]:
        """The tensors whose ranges the data has to tell."""
        every = [value for source in self.sources for value in self.origins[source]]
        return [value for value in every if value not in self.known]

    def span(self, source: ir.Value, ranges: Mapping[str, Range]) -> Range:
        """The range of a scale.

        Args:
            source: the tensor that it is named after.
            ranges: by the names of `calibrated`.
        """
        every = [self.known.get(value) or ranges[str(value.name)] for value in self.origins[source]]
        return Range(min(r.low for r in every), max(r.high for r in every))


def place(model: ir.Model, options: QuantizeOptions) -> Placement:
    """Applies the rules above to the main graph.

    Args:
        model: prepared (see `prepare.py`).
        options: `exclude`, `add_inputs` and `attention` count here.

    Raises:
        NothingToQuantizeError: the model is quantized already, or has nothing that can be.
    """
    require_float(model)
    excluded = frozenset(node for node in model.graph if _excluded(node, options))
    layers = [node for node in model.graph if node not in excluded and is_layer(node)]
    if not layers:
        raise nothing_to_quantize(model, options.exclude)
    wanted = [node.inputs[0] for node in layers]
    stream = frozenset(node for node in model.graph if is_normalized(node))
    for node in model.graph:
        if node not in excluded and node not in stream:
            wanted += _add_inputs(node, set(layers), options) + _pool_input(node, set(layers))
    found = _attentions(model, excluded) if options.attention else []
    operands = [value for attention in found for value in attention.operands]
    softmaxes = [attention.softmax for attention in found]
    scales = Scales(excluded)
    for value in wanted:
        if value is not None:
            scales.take(value)
    for value in (*operands, *softmaxes):
        scales.alone(value)  # of a joint projection each part has its own range
    scale_of = scales.source_of
    return Placement(
        tuple(layers),
        scale_of,
        scales.origins,
        excluded | stream,
        frozenset(scale_of[value] for value in operands),
        {value: Range(0.0, 1.0) for value in softmaxes},
    )


def _attentions(model: ir.Model, excluded: frozenset[ir.Node]) -> list[Attention]:
    """Rule 7: the attentions whose products are not excluded."""
    found = [find_attention(node) for node in model.graph if node not in excluded]
    return [
        attention
        for attention in found
        if attention is not None and attention.product.producer() not in excluded
    ]


def output_axis(layer: ir.Node) -> int:
    """The axis of a layer's weight that counts its output channels."""
    if layer.op_type == "Conv" or layer.attributes.get_int("transB", 0) == 1:
        return 0
    return 1


def _add_inputs(
    node: ir.Node, layers: set[ir.Node], options: QuantizeOptions
) -> list[ir.Value | None]:
    """Rule 2: the inputs of a residual Add that are quantized; none for any other node."""
    if not is_standard(node, "Add"):
        return []
    inputs = [value for value in node.inputs if value is not None and constant(value) is None]
    if len(inputs) != 2 or not _may_be_equal(*inputs) or inputs[0] is inputs[1]:
        return []
    if _power_of(inputs[0], inputs[1]) or _power_of(inputs[1], inputs[0]):
        return []  # x + c * x**3, part of an activation
    if not any(_from_layer(value, layers) for value in inputs):
        return []
    ends = [value for value in inputs if value.producer() in layers and sole_use(value)]
    if options.add_inputs == "both" or not ends:
        return [*inputs]
    fused = max(ends, key=_sum_length)
    return [value for value in inputs if value is not fused]


def _pool_input(node: ir.Node, layers: set[ir.Node]) -> list[ir.Value | None]:
    """Rule 3: the input of an average pooling whose result a layer takes."""
    x = operand(node, 0)
    if x is None or x.shape is None or not _is_pooling(node):
        return []
    readers = node.outputs[0].consumers()
    while len(readers) == 1 and is_mover(readers[0]):
        readers = readers[0].outputs[0].consumers()
    return [x] if any(node in layers for node in readers) else []


def _is_pooling(node: ir.Node) -> bool:
    """Whether the node is an average pooling, or a ReduceMean over height and width."""
    if is_standard(node, "GlobalAveragePool", "AveragePool"):
        return True
    x = operand(node, 0)
    if not is_standard(node, "ReduceMean") or x is None or x.shape is None or len(x.shape) != 4:
        return False
    from_input = constant(operand(node, 1))
    axes = node.attributes.get_ints("axes", ()) if from_input is None else from_input.tolist()
    return sorted(axis % 4 for axis in axes) == [2, 3]


def _from_layer(value: ir.Value, layers: set[ir.Node]) -> bool:
    """Whether the first input's chain of activation, pooling, moving, adding starts at a layer."""
    producer = value.producer()
    while producer is not None and producer not in layers:
        source = operand(producer, 0)
        if not is_standard(producer, *_PASSED_THROUGH) or source is None:
            return False
        producer = source.producer()
    return producer is not None


def _power_of(value: ir.Value, base: ir.Value) -> bool:
    """Whether the value is `base` times itself and constants."""
    node = value.producer()
    if node is None or not is_standard(node, "Mul", "Pow"):
        return False
    given = {v for v in node.inputs if v is not None and constant(v) is None}
    return all(v is base or _power_of(v, base) for v in given)


def _may_be_equal(a: ir.Value, b: ir.Value) -> bool:
    """Whether nothing that is known about the shapes tells them apart."""
    if a.shape is None or b.shape is None:
        return True
    known = [
        (m, n)
        for m, n in zip(a.shape.dims, b.shape.dims, strict=False)
        if isinstance(m, int) and isinstance(n, int)
    ]
    return len(a.shape) == len(b.shape) and all(m == n for m, n in known)


def _sum_length(value: ir.Value) -> int:
    """How many products the layer that made the value sums for one output."""
    layer = value.producer()
    weight = None if layer is None else constant(layer.inputs[1])
    if layer is None or weight is None:
        return 0
    return int(weight.size // weight.shape[output_axis(layer)])


def _excluded(node: ir.Node, options: QuantizeOptions) -> bool:
    return any(fnmatchcase(node.name or "", pattern) for pattern in options.exclude)
