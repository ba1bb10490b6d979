"""What the onnx package must not be given: it would never end, or fill the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx

from twofour.onnx_tools.stored import all_graphs

MAX_OPERATORS = 50_000
"""Of a model once each call of a function is replaced by its body."""

_SHOWN = 8
_MOST_AXES = 1 << 16
_AXES = {"axis": -_MOST_AXES, "batch_dims": 0, "num_scan_inputs": 0}  # the lowest of each
_STANDARD = ("", "ai.onnx")
_Key = tuple[str, str, str]


def problems(proto: onnx.ModelProto) -> list[str]:
    """What is wrong, one line each.

    Functions that call each other more often than memory holds, or without end; counts beyond what
    a node has; negative dimensions; inputs without a shape; texts that are none.

    Args:
        proto: as parsed.
    """
    found = _calls(proto)
    graphs = all_graphs(proto)
    passed = _passed(proto)
    for function in proto.functions:
        found.extend(_bounds(f"function {function.name}", function.attribute_proto, passed))
    ends = {_key_of(f): (len(f.input), len(f.output)) for f in proto.functions}
    for node in (node for owner in (*graphs, *proto.functions) for node in owner.node):
        found.extend(_attributes(node))
        if node.domain not in _STANDARD:
            found.extend(_bounds(f"{node.op_type} {node.name!r}", node.attribute, passed))
        most = ends.get(_key(node))
        if most is not None and (len(node.input) > most[0] or len(node.output) > most[1]):
            has = f"{len(node.input)} inputs and {len(node.output)} outputs"
            found.append(f"{node.op_type} {node.name!r}: the function takes {most}, it has {has}")
    for graph in graphs:
        for info in (*graph.input, *graph.output, *graph.value_info):
            dims = [d.dim_value for d in info.type.tensor_type.shape.dim if d.HasField("dim_value")]
            if any(dim < 0 for dim in dims):
                found.append(f"{info.name!r} has a negative dimension: {dims}")
    for info in proto.graph.input:
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            found.append(f"input {info.name!r} has no shape, not even a number of dimensions")
    return found[:_SHOWN]


def _calls(proto: onnx.ModelProto) -> list[str]:
    """Whether calls of functions end, and after how many operators."""
    bodies = {_key_of(f): f.node for f in proto.functions}
    sizes: dict[_Key, int] = {}
    waiting: list[tuple[_Key, bool]] = [(key, False) for key in bodies]
    inside: set[_Key] = set()
    while waiting:  # each function twice: before and after those that it calls
        key, called = waiting.pop()
        if key in sizes:
            continue
        if called:
            inside.discard(key)
            sizes[key] = _expanded(bodies[key], sizes)
            continue
        if key in inside:
            return [f"function {key[0]}.{key[1]} calls itself"]
        inside.add(key)
        waiting.append((key, True))
        callees = {_key(node) for node in _all_nodes(bodies[key])}.intersection(bodies)
        if callees & inside:
            return [f"function {key[0]}.{key[1]} calls itself"]
        waiting += [(callee, False) for callee in callees if callee not in sizes]
    total = _expanded(proto.graph.node, sizes)
    if total > MAX_OPERATORS:
        return [f"expected at most {MAX_OPERATORS} operators, functions included; got {total}"]
    return []


def _expanded(nodes: Iterable[onnx.NodeProto], sizes: dict[_Key, int]) -> int:
    return sum(sizes.get(_key(node), 1) for node in _all_nodes(nodes))


def _key_of(function: onnx.FunctionProto) -> _Key:
    return function.domain, function.name, function.overload


def _key(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type, node.overload


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These and those of their subgraphs."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _attributes(node: onnx.NodeProto) -> Iterator[str]:
    where = f"{node.op_type} {node.name!r}"
    if node.op_type == "Constant" and node.domain in _STANDARD and len(node.attribute) != 1:
        yield f"{where}: expected one value, it has {len(node.attribute)}"
    for attribute in node.attribute:
        if attribute.name == "num_scan_inputs" and not 0 <= attribute.i <= len(node.input):
            yield f"{where}: {attribute.name} is {attribute.i}, but it has {len(node.input)} inputs"
        if node.domain not in _STANDARD:
            continue
        if attribute.name == "num_outputs" and attribute.i != len(node.output):
            yield f"{where}: num_outputs is {attribute.i}, but it has {len(node.output)} outputs"
        yield from _bounds(where, [attribute], _AXES)
        if node.op_type != "Constant":
            for text in (attribute.s, *attribute.strings):
                if not _is_text(text):
                    yield f"{where}: attribute {attribute.name!r} is not UTF-8: {text[:20]!r}"


def _passed(proto: onnx.ModelProto) -> dict[str, int]:
    """Attributes that functions hand on as those of `_AXES`, each with its lowest value."""
    found, size = dict(_AXES), 0
    nodes = [node for function in proto.functions for node in _all_nodes(function.node)]
    while len(found) > size:  # through functions that call each other
        size = len(found)
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            if attribute.ref_attr_name and attribute.name in found:
                found.setdefault(attribute.ref_attr_name, found[attribute.name])
    return found


def _bounds(
    where: str, attributes: Iterable[onnx.AttributeProto], lowest: Mapping[str, int]
) -> Iterator[str]:
    for attribute in attributes:
        name, number = attribute.name, attribute.i
        if name in lowest and not lowest[name] <= number <= _MOST_AXES:
            yield f"{where}: {name} is {number}, no tensor has such a dimension"


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
