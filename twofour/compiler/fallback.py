"""The stretches no native kernel covers, as ONNX models for ONNX Runtime."""

from __future__ import annotations

import onnx
from onnx import helper

from twofour.compiler.lower import Section


def subgraph(model: onnx.ModelProto, section: Section) -> bytes:
    """A model of the section's nodes, from the plain values it reads to those it writes.

    Bodies of If, Loop and Scan may read constants of the model and values of the section: both are
    carried along.

    Args:
        model: the fused model, with the types of all values.
        section: a fallback section of it.
    """
    own = {value.name for node in section.nodes for value in node.outputs if value.name}
    nodes = [node for node in model.graph.node if not own.isdisjoint(node.output)]
    read = {name for node in nodes for name in _names_read(node)}
    infos = {v.name: v for part in ("input", "output", "value_info") for v in _values(model, part)}
    inner = own.difference(section.outputs).intersection(infos)
    graph = helper.make_graph(
        nodes,
        model.graph.name or "fallback",
        [infos[name] for name in section.inputs],
        [infos[name] for name in section.outputs],
        initializer=[tensor for tensor in model.graph.initializer if tensor.name in read],
        value_info=[infos[name] for name in sorted(inner)],
    )
    called = {(node.domain, node.op_type) for node in nodes}
    part = helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        functions=[f for f in model.functions if (f.domain, f.name) in called],
    )
    data: bytes = part.SerializeToString()
    return data


def _values(model: onnx.ModelProto, part: str) -> list[onnx.ValueInfoProto]:
    """The graph's inputs, outputs or inner values."""
    return list(getattr(model.graph, part))


def _names_read(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, in its subgraphs too; those of the subgraphs' own values among them."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {*node.input, *(n for body in bodies for inner in body.node for n in _names_read(inner))}
