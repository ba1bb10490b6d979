"""The stretches no native kernel covers, as ONNX models for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir
from onnx import helper

from twofour.compiler.lower import Section
from twofour.compiler.passes.pipeline import Fused
from twofour.compiler.schedule import Schedule
from twofour.engine import Layer, TensorInfo


def subgraph(model: onnx.ModelProto, section: Section, plain: Mapping[str, TensorInfo]) -> bytes:
    """A model of the section's nodes, from the plain values it reads to those it writes.

    Bodies of If, Loop and Scan may read constants of the model and values of the section: both are
    carried along.

    Args:
        model: the fused model, with the types of all values.
        section: a fallback section of it.
        plain: what it reads and writes by name; open dimensions have no size in the model.
    """
    own = {value.name for node in section.nodes for value in node.outputs if value.name}
    nodes = [node for node in model.graph.node if not own.isdisjoint(node.output)]
    read = {name for node in nodes for name in _names_read(node)}
    infos = {v.name: v for part in ("input", "output", "value_info") for v in _values(model, part)}
    for name in (*section.inputs, *section.outputs):
        if plain[name].sizes:
            infos[name] = _opened(infos[name], plain[name])
    opened = any(plain[name].sizes for name in (*section.inputs, *section.outputs))
    inner = set() if opened else own.difference(section.outputs).intersection(infos)
    graph = helper.make_graph(
        nodes,
        model.graph.name or "fallback",
        [infos[name] for name in section.inputs],
        [infos[name] for name in section.outputs],
        initializer=[tensor for tensor in model.graph.initializer if tensor.name in read],
        value_info=[infos[name] for name in sorted(inner)],
    )
    part = helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        functions=_called(model, nodes),
    )
    data: bytes = part.SerializeToString()
    return data


def host_layer(node: ir.Node, order: Schedule, fused: Fused) -> Layer:
    """A node that stays on ONNX Runtime, with all known reasons."""
    name = node.name or node.op_type
    notes = [order.reasons.get(node, "")]
    notes += [f"{r.rule}: {r.reason}" for r in fused.refusals if r.node == name]
    return Layer(name, node.op_type, "onnxruntime", notes=tuple(filter(None, notes)))


def _called(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The functions that nodes call, and those that these call."""
    called: set[tuple[str, str]] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        key = (node.domain, node.op_type)
        if key not in called:
            called.add(key)
            waiting += [n for f in model.functions if (f.domain, f.name) == key for n in f.node]
    return [f for f in model.functions if (f.domain, f.name) in called]


def _opened(info: onnx.ValueInfoProto, tensor: TensorInfo) -> onnx.ValueInfoProto:
    """The value without numbers for its open dimensions."""
    dims = [dim if isinstance(dim, int) else None for dim in tensor.dims]
    return helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, dims)


def _values(model: onnx.ModelProto, part: str) -> list[onnx.ValueInfoProto]:
    """The graph's inputs, outputs or inner values."""
    return list(getattr(model.graph, part))


def _names_read(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, in its subgraphs too; those of the subgraphs' own values among them."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {*node.input, *(n for body in bodies for inner in body.node for n in _names_read(inner))}
