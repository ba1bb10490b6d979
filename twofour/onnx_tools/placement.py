"""Decides which tensors of a prepared float model are quantized, and which share a scale.

1. Each Conv, Gemm and MatMul of the main graph with a constant float32 weight takes quantized
   activations and weights. What else has weights stays float, see `eligible.py`.
2. A residual Add takes a quantized shortcut. The convolution that ends in the Add hands over
   floats, so that convolution, Add, ReLU and the rounding after them can be one integer kernel;
   so does one whose activation ends in it.
   Where no convolution ends in it, an Add takes integers only if its sum is rounded as well: that
   is an integer Add. Others, as in the state of an LSTM or the boxes of a detector, stay float.
   Likewise a layer and its activation, whatever nodes that is written with: only what the next
   layer reads is rounded.
3. An average pooling before a layer of rule 1 takes quantized activations.
4. What only moves data (Slice, Pad with zeros, MaxPool, Concat, Split, Reshape, ...) before a
   quantized tensor moves quantized data: its inputs are quantized with the same scale, so nothing
   is rounded twice. What is joined shares the scale that holds the values of each part.
5. Everything that reads a quantized tensor reads its rounded values, nodes that the user leaves
   float and graph outputs excepted: then no kernel has to write the tensor twice.
6. A sum that a normalization of rows reads stays float, and so do its operands: in a transformer
   every block adds to it, and each rounding would stay in it to the end.
7. Both products of an attention take quantized operands: q, k and v symmetric (where they are
   computed, before they are moved and scaled), the softmax with the range 0 to 1. By choice the
   first product alone.
8. An operator of a plugin takes quantized operands where the plugin names them: symmetric ones.

What the user chooses comes before all of it: nodes (`selection.py`) and tensors (`overrides.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from twofour.core.ranges import Activation, Affine, Range, affine
from twofour.onnx_tools.attention import find_attention, is_normalized
from twofour.onnx_tools.edit import constant, is_standard, operand, sole_use
from twofour.onnx_tools.eligible import LAYERS, is_layer, nothing_to_quantize, require_float
from twofour.onnx_tools.moving import JOINERS, MOVERS, Scales, is_mover
from twofour.onnx_tools.options import QuantizeOptions, TensorChoice
from twofour.onnx_tools.overrides import resolve
from twofour.onnx_tools.plugins import quantized_inputs
from twofour.onnx_tools.selection import left_float

# Mul and Div: of an activation that exporters write as x * Sigmoid(x) or x * (1 + Erf(...)) / 2.
_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Mul", "Div")
# Those that kernels may add a residual behind; Mul: of x * Sigmoid(x).
_NOT_CLAMPING = ("Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu")
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
        kinds: of those that scales are named after: whose type is not that of the options.
        known: tensors whose range needs no calibration.
        left: nodes that the user leaves float -> why.
    """

    layers: tuple[ir.Node, ...]
    scale_of: dict[ir.Value, ir.Value]
    origins: Mapping[ir.Value, list[ir.Value]]
    stay_float: frozenset[ir.Node]
    kinds: Mapping[ir.Value, Activation] = field(default_factory=dict)
    known: Mapping[ir.Value, Range] = field(default_factory=dict)
    left: Mapping[ir.Node, str] = field(default_factory=dict)

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

    def schemes(self, ranges: Mapping[str, Range], activation: Activation) -> dict[str, Affine]:
        """Scale and zero point of each tensor that scales are named after, by its name.

        Args:
            ranges: by the names of `calibrated`.
            activation: of all but `kinds`.
        """
        return {
            str(source.name): affine(self.span(source, ranges), self.kinds.get(source, activation))
            for source in self.sources
        }


def place(model: ir.Model, options: QuantizeOptions) -> Placement:
    """Applies the rules above to the main graph.

    Args:
        model: prepared (see `prepare.py`).
        options: what it says about placement counts here.

    Raises:
        NothingToQuantizeError: the model is quantized already, or has nothing that can be.
        InputError: a pattern of the options matches nothing.
    """
    require_float(model)
    candidates = [
        node
        for node in model.graph
        if is_standard(node, *LAYERS, "Add", *_POOLINGS) or quantized_inputs(node)
    ]
    left = left_float(model, candidates, options)
    found = _Tensors.found(model, left, options, frozenset())
    names = {str(value.name): value for value in found.scales.source_of}
    sources = {name: str(found.scales.source_of[value].name) for name, value in names.items()}
    chosen = resolve(options.tensors, sources) if found.layers else {}
    floats = frozenset(names[name] for name, choice in chosen.items() if choice.stays_float)
    if floats:
        left |= {
            node: "what it reads was chosen to stay float"
            for node in found.layers
            if node.inputs[0] in floats
        }
        found = _Tensors.found(model, left, options, floats)
    if not found.layers:
        raise nothing_to_quantize(model, {str(node.name): why for node, why in left.items()})
    ranges = {names[name]: choice for name, choice in chosen.items() if not choice.stays_float}
    return found.placement(left, ranges)


@dataclass(frozen=True)
class _Tensors:
    """What the rules take, before the user's word on single tensors.

    Attributes:
        layers: of rule 1.
        scales: of all tensors that are quantized.
        operands: q, k and v of rule 7, and those of rule 8.
        softmaxes: of rule 7.
        stream: of rule 6.
    """

    layers: tuple[ir.Node, ...]
    scales: Scales
    operands: tuple[ir.Value, ...]
    softmaxes: tuple[ir.Value, ...]
    stream: frozenset[ir.Node]

    @classmethod
    def found(
        cls,
        model: ir.Model,
        left: Mapping[ir.Node, str],
        options: QuantizeOptions,
        floats: frozenset[ir.Value],
    ) -> _Tensors:
        """Applies the rules to all nodes but those left float, and to no tensor of `floats`."""
        layers = tuple(node for node in model.graph if node not in left and is_layer(node))
        stream = frozenset(node for node in model.graph if is_normalized(node))
        scales = Scales(frozenset(left), floats)
        for layer in layers:
            _take(scales, [layer.inputs[0]])
        for node in model.graph:
            if node not in left and node not in stream:
                inputs = _add_inputs(node, set(layers), options)
                _take(scales, inputs + _pool_input(node, set(layers)))
                if options.add_inputs == "one_scale":
                    scales.share([value for value in inputs if value is not None])
        operands, softmaxes = _attentions(model, left, options)
        operands += tuple(v for n in model.graph if n not in left for v in quantized_inputs(n))
        for value in (*operands, *softmaxes):
            scales.alone(value)  # of a joint projection each part has its own range
        return cls(layers, scales, operands, softmaxes, stream)

    def placement(
        self, left: Mapping[ir.Node, str], chosen: Mapping[ir.Value, TensorChoice]
    ) -> Placement:
        """With what the user chose for single tensors."""
        source_of, origins = self.scales.source_of, self.scales.origins
        quantized = [value for value in self.operands if value in source_of]
        kinds: dict[ir.Value, Activation] = {source_of[value]: "int8" for value in quantized}
        known = {value: Range(0.0, 1.0) for value in self.softmaxes}
        for value, choice in chosen.items():
            if value in source_of and choice.activation is not None:
                kinds[source_of[value]] = choice.activation
            if value in source_of and choice.span is not None:
                known |= dict.fromkeys(origins[source_of[value]], choice.span)
        stay = frozenset(left) | self.stream
        return Placement(self.layers, source_of, origins, stay, kinds, known, left)


def _take(scales: Scales, values: list[ir.Value | None]) -> None:
    for value in values:
        if value is not None:
            scales.take(value)


def _attentions(
    model: ir.Model, left: Mapping[ir.Node, str], options: QuantizeOptions
) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
    """Rule 7: operands and softmaxes of the products that are quantized."""
    operands: list[ir.Value] = []
    softmaxes: list[ir.Value] = []
    for node in model.graph:
        found = find_attention(node) if options.attention and node not in left else None
        if found is None or not left.keys().isdisjoint(found.products):
            continue
        operands += found.operands if options.softmax else found.operands[:2]
        softmaxes += [found.softmax] if options.softmax else []
    return tuple(operands), tuple(softmaxes)


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
    ends = [value for value in inputs if sole_use(value) and _layer_of(value, layers) is not None]
    if not ends and not _is_rounded(node.outputs[0], layers):
        return []
    if options.add_inputs != "shortcut" or not ends:
        return [*inputs]
    fused = max(ends, key=lambda value: _sum_length(_layer_of(value, layers)))
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


def _is_rounded(value: ir.Value, layers: set[ir.Node]) -> bool:
    """Whether a layer, a pooling before one or another sum takes the value, moved or activated."""
    for reader in value.consumers():
        if reader in layers or is_standard(reader, "Add"):
            return True
        passes = is_mover(reader) or is_standard(reader, *JOINERS, *_POOLINGS)
        if passes or (is_standard(reader, *_ACTIVATIONS) and _is_activation_of(reader, value)):
            if any(_is_rounded(result, layers) for result in reader.outputs):
                return True
    return False


def _is_activation_of(node: ir.Node, value: ir.Value) -> bool:
    """Whether all that the node reads comes from the value alone, through activations."""
    for operand_of in node.inputs:
        source = operand_of
        while source is not None and source is not value and constant(source) is None:
            maker = source.producer()
            if maker is None or not is_standard(maker, *_ACTIVATIONS):
                return False
            source = operand(maker, 0)
    return True


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


def _layer_of(value: ir.Value, layers: set[ir.Node]) -> ir.Node | None:
    """The layer that makes a value, or the convolution of whose result it is an activation."""
    maker = value.producer()
    if maker in layers:
        return maker
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        maker = waiting.pop().producer()
        if maker in layers:
            found.add(maker)
        elif maker is None or not is_standard(maker, *_NOT_CLAMPING):
            return None
        else:
            waiting += [v for v in maker.inputs if v is not None and constant(v) is None]
    layer = found.pop() if len(found) == 1 else None
    return layer if layer is not None and layer.op_type == "Conv" else None


def _sum_length(layer: ir.Node | None) -> int:
    """How many products a layer sums for one output."""
    weight = None if layer is None else constant(layer.inputs[1])
    if layer is None or weight is None:
        return 0
    return int(weight.size // weight.shape[output_axis(layer)])
