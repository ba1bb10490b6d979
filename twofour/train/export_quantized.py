"""Fake quantizers as QuantizeLinear and DequantizeLinear in an exported graph.

    w -> mark -> Conv -> BatchNorm      =>     w8 -> DQ -> Conv with a bias
    x -> mark -> ...                    =>     x -> Q -> DQ -> ...

While a model is exported its quantizers leave marks. A weight is then rounded here, to the integers
that the model was trained with, and moved as the graph moves it. A BatchNorm after a quantized
convolution goes into scale and bias: round(w g / (s |g|)) = sign(g) round(w / s), so the integers
keep their values, but for the sign. What is written is what `quantize` of a file writes: weights as
int8 with a scale for each output channel, one Q/DQ pair for each rounded tensor.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir
import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.train.export_constants import Array, Rounded, Weights, constant
from twofour.train.fake_quant import MARK, FakeQuant

WeightForm = Literal["int8", "float"]

_LEAST_SCALE = 2.0**-120
_STORED = "_quantized"


def set_marks(model: nn.Module) -> dict[str, FakeQuant]:
    """Lets the quantizers that are on leave marks when the model is exported.

    Args:
        model: a copy that is exported and then dropped.

    Returns:
        Name of a quantizer -> the quantizer.

    Raises:
        InputError: a quantizer has no scale yet, or is still collecting.
    """
    quants = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuant)}
    unready = [n for n, q in quants.items() if q.mode == "collect" or not q.calibrated]
    if unready:
        raise InputError(
            f"cannot export {type(model).__name__}: it is not calibrated",
            [f"{len(unready)} quantizers have no scale yet, first {unready[0]}"],
            "calibrate, or remove the quantizers",
        )
    for name, quant in quants.items():
        quant.mark = name if quant.mode == "on" else None
    return quants


def is_mark(node: onnx_ir.Node) -> bool:
    """Whether the node is what a quantizer left."""
    return f"{node.domain}::{node.op_type}" == MARK


def take_weights(graph: onnx_ir.Graph, quants: Mapping[str, FakeQuant]) -> Weights:
    """Rounds the weights that have marks, and takes those marks out.

    Returns:
        Initializer, which holds the rounded floats -> the integers.
    """
    taken: Weights = {}
    writer = _Writer(graph)
    for node in [node for node in graph if is_mark(node)]:
        source, quant = node.inputs[0], quants[node.attributes.get_string("name")]
        w = constant(source)
        if source is None or w is None or quant.axis is None:
            continue
        rounded = _round(w, quant)
        if len(source.uses()) == 1 and source.is_initializer():
            writer.drop(source)
        made = writer.constant(str(source.name), rounded.floats)
        node.outputs[0].replace_all_uses_with(made)
        graph.remove(node, safe=True)
        taken[made] = rounded
    return taken


def fold_batchnorm(graph: onnx_ir.Graph, weights: Weights) -> None:
    """Conv(x, w8 s, b) -> BatchNorm   =>   Conv(x, (sign(g) w8) (|g| s), (b - mean) g + beta).

    With g = gamma / sqrt(variance + epsilon). Gemm likewise. Where |g| s is 0 the weight is.
    Legal if: 1. the layer's result goes to the BatchNormalization alone; 2. its weight is
    quantized; 3. all parameters are constants.
    """
    writer = _Writer(graph)
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        between = norm.inputs[0]
        layer = None if between is None else between.producer()
        if between is None or layer is None or layer.op_type not in ("Conv", "Gemm"):
            continue
        if len(between.uses()) != 1 or between.is_graph_output() or layer.inputs[1] not in weights:
            continue
        given = [*norm.inputs[1:5], *layer.inputs[2:3]]
        arrays = [a.astype(np.float64) for v in given if (a := constant(v)) is not None]
        if len(arrays) != len([value for value in given if value is not None]):
            continue
        _fold(writer, weights, layer, norm, arrays)


def write_weights(graph: onnx_ir.Graph, weights: Weights, form: WeightForm) -> None:
    """Puts DequantizeLinear before all that read a rounded weight; see the module's docstring.

    Args:
        graph: changed.
        weights: of `take_weights`, as the graph has moved them.
        form: `int8` stores the integers; `float` stores floats and puts QuantizeLinear first.
    """
    writer = _Writer(graph)
    op_types = ("QuantizeLinear", "DequantizeLinear") if form == "float" else ("DequantizeLinear",)
    for value, rounded in weights.items():
        readers = list(value.uses())
        if not readers:
            continue
        axis, scale = rounded.channels(_output_axis(readers[0].node))
        scheme = [
            writer.constant(f"{value.name}_scale", scale),
            writer.constant(f"{value.name}_zero_point", np.zeros(len(scale), np.int8)),
        ]
        stored = value
        if form == "int8":
            stored = writer.constant(f"{value.name}{_STORED}", rounded.w8)
            writer.drop(value)
        for use in readers:
            result = writer.round(use.node, stored, scheme, axis, op_types)
            use.node.replace_input_with(use.idx, result)


def write_activations(graph: onnx_ir.Graph, quants: Mapping[str, FakeQuant]) -> None:
    """Makes each mark that is left a pair of QuantizeLinear and DequantizeLinear.

    A tensor that several marks of one scale round, or one mark after another, has one pair.
    """
    writer = _Writer(graph)
    schemes: dict[tuple[object, ...], list[onnx_ir.Value]] = {}
    rounded: dict[tuple[onnx_ir.Value, int], onnx_ir.Value] = {}
    for mark in [node for node in graph if is_mark(node)]:
        value, name = mark.inputs[0], mark.attributes.get_string("name")
        if value is None or value.dtype != onnx_ir.DataType.FLOAT:
            raise InputError(
                f"cannot export the quantizer {name}",
                [f"expected float32, got {None if value is None else value.dtype}"],
                "export the model in float32: model.float()",
            )
        scale, point = _scheme(quants[name])
        key = (scale.tobytes(), point.tobytes(), point.dtype)
        if key not in schemes:
            named = {f"{value.name}_scale": scale, f"{value.name}_zero_point": point}
            schemes[key] = [writer.constant(n, array) for n, array in named.items()]
        place = (value, id(schemes[key]))
        if place not in rounded:
            result = writer.round(mark, value, schemes[key], quants[name].axis)
            rounded[place] = rounded[result, id(schemes[key])] = result
        _replace(mark, rounded[place])


def free_name(name: str, taken: set[str | None]) -> str:
    """The name, or `name_1`, `name_2`, ... where that is taken."""
    numbered, i = name, 0
    while numbered in taken:
        i += 1
        numbered = f"{name}_{i}"
    return numbered


def _round(w: Array, quant: FakeQuant) -> Rounded:
    integers = quant.integers(torch.from_numpy(w.copy()))
    shape = [1] * w.ndim
    shape[quant.axis or 0] = -1
    scale = quant.trained_scale().detach().cpu().numpy().reshape(shape)
    return Rounded(integers.cpu().numpy().astype(np.int8), np.broadcast_to(scale, w.shape))


def _fold(
    writer: _Writer,
    weights: Weights,
    layer: onnx_ir.Node,
    norm: onnx_ir.Node,
    arrays: list[Array],
) -> None:
    gamma, beta, mean, variance = arrays[:4]
    bias = arrays[4] if len(arrays) > 4 else np.zeros(len(mean))
    g = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    old = layer.inputs[1]
    if old is None or not np.isfinite(g).all():
        raise InputError(
            f"cannot fold {norm.name} into the layer before it",
            ["its factors gamma / sqrt(variance + epsilon) are not all finite"],
            "look for NaN in the weights of the BatchNorm, or reestimate_batchnorm",
        )
    rounded = weights[old]
    shape = [1] * rounded.w8.ndim
    shape[_output_axis(layer)] = -1
    scale = (rounded.scale * np.abs(g).reshape(shape)).astype(np.float32)
    gone = scale < _LEAST_SCALE
    w8 = np.where(gone, 0, rounded.w8 * np.sign(g).reshape(shape)).astype(np.int8)
    folded = Rounded(w8, np.where(gone, 1, scale).astype(np.float32))
    if len(old.uses()) == 1:
        writer.drop(old)
        del weights[old]
    weight = writer.constant(str(old.name), folded.floats)
    weights[weight] = folded
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(1, weight)
    read = [*norm.inputs[1:], layer.inputs[2]]
    added = ((bias - mean) * g + beta).astype(np.float32)
    layer.replace_input_with(2, writer.constant(f"{weight.name}_bias", added))
    between, result = layer.outputs[0], norm.outputs[0]
    kept = result.name
    result.replace_all_uses_with(between, replace_graph_outputs=True)
    writer.graph.remove(norm, safe=True)
    between.name = kept  # what it holds now
    for value in read:
        if value is not None and value.is_initializer() and not value.uses():
            writer.drop(value)


def _replace(mark: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """Takes a mark out: what read it reads the value."""
    result, graph = mark.outputs[0], mark.graph
    if result.is_graph_output():
        value.name, result.name = result.name, None
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    if graph is not None:
        graph.remove(mark, safe=True)


def _output_axis(node: onnx_ir.Node) -> int:
    """The axis of the weight that counts output channels."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return 1 if node.op_type in ("Gemm", "MatMul") and not transposed else 0


def _scheme(quant: FakeQuant) -> tuple[Array, Array]:
    scale = quant.trained_scale().detach().cpu().numpy()
    unsigned = quant.bounds[0] == 0
    return scale, quant.zero_point.cpu().numpy().astype(np.uint8 if unsigned else np.int8)


class _Writer:
    """Adds constants and nodes to a graph, with names that are still free.

    Args:
        graph: changed.
    """

    def __init__(self, graph: onnx_ir.Graph) -> None:
        """Collects the names in use."""
        self.graph = graph
        self._taken = {value.name for value in graph.inputs} | set(graph.initializers)
        for node in graph:
            self._taken |= {node.name, *(value.name for value in node.outputs)}

    def name(self, wanted: str) -> str:
        """Takes a name, or one like it."""
        name = free_name(wanted, self._taken)
        self._taken.add(name)
        return name

    def constant(self, wanted: str, array: Array) -> onnx_ir.Value:
        """Adds an initializer."""
        tensor = onnx_ir.tensor(np.array(array, order="C"), name=self.name(wanted))
        value = onnx_ir.val(tensor.name, tensor.dtype, array.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def drop(self, value: onnx_ir.Value) -> None:
        """Removes an initializer that nothing reads, or that is about to be replaced."""
        del self.graph.initializers[str(value.name)]
        self._taken.discard(value.name)

    def round(
        self,
        before: onnx_ir.Node,
        value: onnx_ir.Value,
        scheme: list[onnx_ir.Value],
        axis: int | None,
        op_types: Sequence[str] = ("QuantizeLinear", "DequantizeLinear"),
    ) -> onnx_ir.Value:
        """Adds the operators before a node; returns what the last of them makes."""
        attributes = {} if axis is None else {"axis": axis}
        stem = str(value.name).removesuffix(_STORED)
        for op_type in op_types:
            first = op_type == "QuantizeLinear"
            dtype = scheme[1].dtype if first else onnx_ir.DataType.FLOAT
            output = onnx_ir.Value(
                name=self.name(stem + (_STORED if first else "_dequantized")),
                type=onnx_ir.TensorType(dtype or onnx_ir.DataType.INT8),
                shape=value.shape,
            )
            node = onnx_ir.node(
                op_type,
                [value, *scheme],
                attributes,
                outputs=[output],
                name=self.name(f"{stem}_{op_type}"),
            )
            self.graph.insert_before(before, node)
            value = output
        return value
