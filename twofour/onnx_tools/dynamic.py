"""Dynamic quantization: matrix products in int8 whose inputs are rounded as they come.

    y = MatMul(x, w)   =>   highest = Max(ReduceMax(Abs(x), last axis), 2^-100)
                            x8 = Cast<uint8>(Round(x * (127 / highest)) + 128)
                            y = Cast<float>(MatMulInteger(x8, w8, 128)) * (highest / 127) * w_scale

Each row of x, a token, has a scale of its own, so no data is needed and no outlier of one token
costs another its precision. Weights are int8 per output channel, as in `insert.py`; zeros stay
zeros. A Gemm likewise, its bias added behind. What several products read is rounded once. Routed
experts become other operators (`experts.py`).

Standard operators alone, of opset 13 or later. Two things make it the same on every runtime: it
divides numbers of rows only, and what it rounds is a product; and the sums are multiplied by the
scale of the row first, then by that of the weight, both spread by broadcasting (ONNX Runtime takes
a Cast that is multiplied by the product of the two scales for an operator of its own, which reads
one scale for all rows). The integers are uint8 with zero point 128, for which runtimes have fast
products where int8 by int8 has none. Runtimes on CPUs without VNNI may saturate such products, as
they do those of every other file of uint8 and int8; the engine's kernels do not.

`compiler/passes/fuse_dynamic.py` reads this form back; `core/dynamic.py` defines it.

Source: Yao et al. 2022, arXiv:2206.01861 (token-wise quantization of activations).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.core.dynamic import LEAST, ROW_ZERO, STEPS
from twofour.onnx_tools.edit import Array, Editor, constant, operand
from twofour.onnx_tools.eligible import (
    FloatLayer,
    float_layers,
    is_layer,
    nothing_to_quantize,
    require_float,
)
from twofour.onnx_tools.experts import ROUTES, is_float, quantize_node, routers
from twofour.onnx_tools.insert import nearest
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import output_axis
from twofour.onnx_tools.plugins import attach_meanings
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.promises import carry, require_kept
from twofour.onnx_tools.selection import left_float

PRODUCTS = ("MatMul", "Gemm")
FLOAT, INT32, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8
_NUMBERS = (("steps", STEPS), ("least", LEAST))
_ONLY = "at run time only matrix products are quantized"
_AXES_ARE_INPUT = 18
"""The opset from which on ReduceMax has its axes as an input."""


@dataclass(frozen=True)
class Dynamic:
    """A model whose matrix products quantize their inputs at run time.

    Attributes:
        model: with int8 weights.
        float_layers: the layers with weights that stayed float, and why.
    """

    model: ir.Model
    float_layers: tuple[FloatLayer, ...]


def quantize_dynamic(model: ir.Model, options: QuantizeOptions | None = None) -> ir.Model:
    """Quantizes the matrix products of a model, each input at run time, row by row.

    Args:
        model: float32; stays as it is.
        options: `include`, `exclude` and `first_last` count here.

    Returns:
        A new model with int8 weights.

    Raises:
        NothingToQuantizeError: the model is quantized already, or has no product that can be.
        InputError: a weight is not finite, or a pattern of the options matches no node.
        UnsupportedError: the opset cannot be converted.
        GateError: a weight does not have the pattern that the model's metadata promises.
    """
    return quantize_dynamic_with_report(model, options).model


def quantize_dynamic_with_report(
    model: ir.Model, options: QuantizeOptions | None = None
) -> Dynamic:
    """As `quantize_dynamic`, with what stayed float."""
    require_kept(model)
    source, model = model, prepare(model)
    require_float(model)
    carry(source, model)
    layers = [node for node in model.graph if is_layer(node)]
    left = {node: _ONLY for node in layers if node.op_type not in PRODUCTS}
    left |= dict.fromkeys(routers(model.graph) & set(layers), ROUTES)
    routed = [node for node in model.graph if is_float(node)]
    left |= left_float(model, [*layers, *routed], options or QuantizeOptions())
    chosen = {node.name or "": reason for node, reason in left.items()}
    wanted = [node for node in layers if node not in left]
    routed = [node for node in routed if node not in left]
    if not wanted and not routed:
        raise nothing_to_quantize(model, chosen)
    floats = float_layers(model, chosen)
    named = model.clone()  # its nodes have the names that the integer ones get
    writer = _Writer.of(model)
    for layer in wanted:
        writer.replace(layer)
    for node in routed:
        quantize_node(writer.editor, node)
    writer.drop_unread()
    attach_meanings(model)
    common_passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    carry(named, model)
    require_kept(model, "quantization")
    return Dynamic(model, floats)


@dataclass(frozen=True)
class _Chain:
    """Nodes to be, in order.

    Attributes:
        editor: of the graph.
        stem: what they are named after.
        shape: of all their results.
        nodes: so far.
    """

    editor: Editor
    stem: str
    shape: ir.Shape | None
    nodes: list[ir.Node] = field(default_factory=list)

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType = FLOAT,
        **attributes: int | list[int],
    ) -> ir.Value:
        """The result of one more node."""
        name = self.editor.name(f"{self.stem}_{op_type}")
        result = ir.Value(name=name, type=ir.TensorType(dtype), shape=self.shape)
        node_name = self.editor.name(f"{self.stem}/{op_type}")
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[result], name=node_name))
        return result


@dataclass(frozen=True)
class _Rows:
    """A value quantized by rows: the integers, and the scale of each row."""

    q: ir.Value
    scale: ir.Value


@dataclass(frozen=True)
class _Writer:
    """Puts the operators of dynamic quantization into a graph.

    Attributes:
        editor: of the graph.
        opset: of the model.
        rows: what was quantized so far.
        weights: weights that were made so far, by the old one and what is done to it.
        numbers: constants of one number.
    """

    editor: Editor
    opset: int
    rows: dict[ir.Value, _Rows]
    weights: dict[tuple[ir.Value, int, float], tuple[ir.Value, ir.Value]]
    numbers: dict[tuple[str, object], ir.Value]

    @staticmethod
    def of(model: ir.Model) -> _Writer:
        """Nothing is written yet."""
        return _Writer(Editor(model.graph), model.opset_imports[""], {}, {}, {})

    def replace(self, layer: ir.Node) -> None:
        """One product; its result keeps its name."""
        x, result = operand(layer, 0), layer.outputs[0]
        if x is None:
            raise ValueError(f"{layer.name!r} has no input")
        rows, (w8, w_scale) = self._rows(x, layer), self._weight(layer)
        zero = self._number("zero_point", np.array(ROW_ZERO, np.uint8))
        chain = _Chain(self.editor, str(layer.name), result.shape)
        sums = chain.add("MatMulInteger", [rows.q, w8, zero], INT32)
        chain.nodes[0].name, layer.name = layer.name, None
        real = chain.add("Cast", [sums], to=FLOAT)
        value = chain.add("Mul", [chain.add("Mul", [real, rows.scale]), w_scale])
        if (bias := operand(layer, 2)) is not None:
            value = chain.add("Add", [value, self._bias(layer, bias)])
        layer.prepend(chain.nodes)
        name = result.name
        result.replace_all_uses_with(value, replace_graph_outputs=True)
        self.editor.graph.remove(layer, safe=True)
        value.name = name

    def drop_unread(self) -> None:
        """Takes out the float weights and biases that nobody reads any more."""
        graph = self.editor.graph
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]

    def _rows(self, x: ir.Value, layer: ir.Node) -> _Rows:
        """The value quantized, before the first layer that reads it."""
        if x in self.rows:
            return self.rows[x]
        steps, least = (self._number(n, np.float32(v)) for n, v in _NUMBERS)
        each = _Chain(self.editor, str(x.name), x.shape)
        row = _Chain(self.editor, f"{x.name}_row", _of_rows(x.shape), each.nodes)
        sizes = each.add("Abs", [x])
        if self.opset < _AXES_ARE_INPUT:
            peak = row.add("ReduceMax", [sizes], axes=[-1], keepdims=1)
        else:
            axes = self._number("last_axis", np.array([-1], np.int64))
            peak = row.add("ReduceMax", [sizes, axes], keepdims=1)
        highest = row.add("Max", [peak, least])
        factor, scale = row.add("Div", [steps, highest]), row.add("Div", [highest, steps])
        rounded = each.add("Round", [each.add("Mul", [x, factor])])
        moved = each.add("Add", [rounded, self._number("zero", np.float32(ROW_ZERO))])
        q = each.add("Cast", [moved], UINT8, to=UINT8)
        layer.prepend(each.nodes)
        self.rows[x] = _Rows(q, scale)
        return self.rows[x]

    def _weight(self, layer: ir.Node) -> tuple[ir.Value, ir.Value]:
        """The weight as int8 [K, N] and its scale [N]; alpha of a Gemm is part of them."""
        weight, axis = layer.inputs[1], output_axis(layer)
        alpha = layer.attributes.get_float("alpha", 1.0)
        if weight is None:
            raise ValueError(f"{layer.name!r} has no weight")
        key = (weight, axis, alpha)
        if key not in self.weights:
            w8, scale = nearest(layer)
            w8 = (w8 if axis == 1 else w8.T) * np.int8(np.sign(alpha))
            scale = scale * np.float32(abs(alpha) or 1.0)
            self.weights[key] = (
                self.editor.initializer(f"{weight.name}_quantized", np.ascontiguousarray(w8)),
                self.editor.initializer(f"{weight.name}_scale", scale),
            )
        return self.weights[key]

    def _bias(self, layer: ir.Node, bias: ir.Value) -> ir.Value:
        """What a Gemm adds: beta * c."""
        beta, held = layer.attributes.get_float("beta", 1.0), constant(bias)
        if beta == 1.0:
            return bias
        if held is not None:
            return self.editor.initializer(f"{bias.name}_scaled", held * np.float32(beta))
        chain = _Chain(self.editor, f"{layer.name}_bias", bias.shape)
        scaled = chain.add("Mul", [bias, self._number("beta", np.float32(beta))])
        layer.prepend(chain.nodes)
        return scaled

    def _number(self, name: str, number: Array | np.float32) -> ir.Value:
        """A constant of one number, once."""
        array = np.asarray(number)
        key = (name, array.item())
        if key not in self.numbers:
            self.numbers[key] = self.editor.initializer(f"dynamic_{name}", array)
        return self.numbers[key]


def _of_rows(shape: ir.Shape | None) -> ir.Shape | None:
    """One number a row."""
    return None if shape is None else ir.Shape((*shape[:-1], 1))
