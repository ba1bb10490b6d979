"""A graph in ONNX text form, short enough to read: large constants by type and shape alone."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir

_MAX_ELEMENTS = 8


def graph_text(model: ir.Model) -> str:
    """The main graph as ONNX text; constants of more than 8 elements without their contents."""
    graph = ir.serde.serialize_model(model).graph
    constants = {tensor.name for tensor in graph.initializer}
    infos = [info for info in graph.value_info if info.name not in constants]
    shown = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= _MAX_ELEMENTS]
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _MAX_ELEMENTS]
    del graph.value_info[:], graph.initializer[:]
    graph.initializer.extend(shown)
    for tensor in large:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        graph.value_info.append(info)
    graph.value_info.extend(infos)
    return str(onnx.printer.to_text(graph)) + "\n"
