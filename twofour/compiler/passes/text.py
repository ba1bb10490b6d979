"""A graph in ONNX text form, short enough to read: large constants by type and shape alone."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_MAX_ELEMENTS = 8


def graph_text(model: ir.Model) -> str:
    """The main graph as ONNX text; constants of more than 8 elements without their contents."""
    proto = ir.serde.serialize_model(model)
    graph = proto.graph
    shown = []
    for tensor in graph.initializer:
        elements = 1
        for dim in tensor.dims:
            elements *= dim
        if elements <= _MAX_ELEMENTS:
            shown.append(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.value_info.append(info)
    short = onnx.GraphProto()
    short.CopyFrom(graph)
    del short.initializer[:]
    short.initializer.extend(shown)
    return str(onnx.printer.to_text(short)) + "\n"
