"""Operators of this package in an exported graph: weights as they want them, meanings as functions.

    MixtureOfExperts (x, logits, E weights of fc1, E biases, ...; experts = E)
        => MixtureOfExperts (x, logits, w1 [E, inner, hidden], b1 [E, inner], w2, b2)

With its functions the file runs wherever ONNX does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.experts import DOMAIN, FLOAT_WEIGHTS
from twofour.core.experts_text import BY_NAME, function_text
from twofour.core.plugins import find
from twofour.train.experts import COUNT
from twofour.train.export_constants import constant

_WEIGHTS_FROM = 2
_FILTERS = (2, 4)  # inputs that are matrices


def stack_experts(graph: onnx_ir.Graph, *, quantized: bool) -> None:
    """Gives the nodes of experts one weight for all of them.

    Args:
        graph: changed.
        quantized: the model has quantizers that are on.

    Raises:
        InputError: it has, or a weight is computed in forward().
    """
    for node in _experts(graph):
        if quantized:
            raise InputError(
                f"cannot export {node.op_type} of a model with quantizers",
                ["experts are quantized row by row while running, not with scales of a Quantizer"],
                "export the float model, then: twofour quantize --dynamic",
            )
        count = node.attributes.pop(COUNT).as_int()
        values = list(node.inputs[_WEIGHTS_FROM:])
        arrays = [constant(value) for value in values]
        if any(array is None for array in arrays):
            raise InputError(
                f"cannot export {node.op_type}: its weights are no constants",
                ["a weight is computed in forward()"],
                "remove parametrizations from the experts before exporting",
            )
        found = [array for array in arrays if array is not None]
        per = len(found) // len(FLOAT_WEIGHTS)
        stem = _stem(values[0], count)
        for index, name in enumerate(FLOAT_WEIGHTS):
            part = found[index * per : (index + 1) * per]
            array = np.stack(part) if count else part[0]
            made = onnx_ir.Value(
                name=f"{stem}{name}",
                const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=f"{stem}{name}"),
                shape=onnx_ir.Shape(array.shape),
                type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            )
            graph.register_initializer(made)
            node.replace_input_with(_WEIGHTS_FROM + index, made)
        node.resize_inputs(_WEIGHTS_FROM + len(FLOAT_WEIGHTS))
        for value in values:
            if value is not None and not value.uses() and value.is_initializer():
                graph.initializers.pop(str(value.name), None)


def attach_functions(model: onnx_ir.Model, opset: int) -> None:
    """Adds the meanings of the nodes of installed operators, those of this package among them.

    Args:
        model: changed.
        opset: of the file.
    """
    for node in _experts(model.graph):
        key = node.op_identifier()
        if key not in model.functions:
            base, activation, quantized = BY_NAME[node.op_type]
            text = function_text(base, activation, quantized=quantized, opset=opset)
            proto = onnx.parser.parse_function(text)
            model.functions[key] = onnx_ir.serde.deserialize_function(proto)
    for node in model.graph:
        operator, key = find(node.domain, node.op_type), node.op_identifier()
        if operator is None or not isinstance(operator.meaning, str) or key in model.functions:
            continue
        proto = onnx.parser.parse_function(operator.meaning)
        if {each.version for each in proto.opset_import if not each.domain} - {opset}:
            continue  # not its operators: whoever reads the file has the function
        model.functions[key] = onnx_ir.serde.deserialize_function(proto)


def expert_weights(
    graph: onnx_ir.Graph,
) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Value, NDArray[np.generic]]]:
    """Each matrix of experts [N, C], with its node and the value that holds it."""
    for node in _experts(graph):
        for index in _FILTERS:
            value = node.inputs[index]
            array = constant(value)
            if value is None or array is None:
                continue
            for matrix in array if array.ndim > 2 else array[None]:
                yield node, value, matrix


def _experts(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    return [node for node in graph if node.domain == DOMAIN and node.op_type in BY_NAME]


def _stem(first: onnx_ir.Value | None, count: int) -> str:
    """What the weights are called after: `moe.` of `moe.experts.0.fc1.weight`."""
    name = str(first.name if first is not None else "")
    end = "experts.0.fc1.weight" if count else "fc1.weight"
    return name.removesuffix(end) if name.endswith(end) else f"{name}."
