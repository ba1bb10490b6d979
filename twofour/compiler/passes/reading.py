"""What a node or value says: constants, shapes, readers, attributes. All functions only read."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these standard operators."""
    return node is not None and node.domain == "" and node.op_type in op_types


def data(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.op_type} {node.name!r} lacks input {index}")
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def array(value: ir.Value | None) -> Array | None:
    """The contents of an initializer, None for any other value."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def constant(name: str, contents: Array) -> ir.Value:
    """A new constant; it becomes an initializer with the replacement that uses it."""
    contents = np.ascontiguousarray(contents).reshape(contents.shape)
    return ir.Value(
        name=name,
        const_value=ir.tensor(contents, name=name),
        shape=ir.Shape(contents.shape),
        type=ir.TensorType(ir.DataType.from_numpy(contents.dtype)),
    )


def shape_of(value: ir.Value) -> tuple[int, ...] | None:
    """The static shape, None where a dimension is not known."""
    if value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


def shape_text(value: ir.Value) -> str:
    """The shape for messages: 1x16x32x32."""
    shape = value.shape
    return "unknown" if shape is None else "x".join(str(dim) for dim in shape) or "scalar"


def sole_reader(value: ir.Value) -> ir.Node | str:
    """The one node that reads the value once, or why there is none."""
    if value.is_graph_output():
        return f"its result {value.name!r} is an output of the model"
    uses = value.uses()
    if len(uses) != 1:
        names = ", ".join(repr(use.node.name) for use in uses) or "nobody"
        return f"its result has {len(uses)} readers: {names}"
    reader = next(iter(uses)).node
    if reader.graph is not value.graph:
        return f"its result is read inside the body of a branch or loop, by {reader.name!r}"
    return reader


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An int attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def ints_attribute(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list of ints attribute."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    return node.attributes[name].as_float() if name in node.attributes else default


def floats_attribute(node: ir.Node, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A list of floats attribute."""
    return tuple(node.attributes[name].as_floats()) if name in node.attributes else default


def string_attribute(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    return node.attributes[name].as_string() if name in node.attributes else default


def int_list(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """A constant integer input such as axes or pads; None where it is absent or computed."""
    contents = array(optional(node, index))
    return None if contents is None else tuple(int(item) for item in contents.reshape(-1))


def broadcast_shape(ndim: int, axis: int) -> tuple[int, ...]:
    """The shape in which a scale of one axis, or of one element, broadcasts to `ndim` axes."""
    return tuple(-1 if d == axis % ndim else 1 for d in range(ndim))


def precedes(first: ir.Node, second: ir.Node) -> bool:
    """Whether `first` comes before `second` in their graph."""
    for node in first.graph or ():
        if node is first or node is second:
            return node is first
    raise ValueError(f"{first.name!r} is in no graph")


def is_contrib(node: ir.Node, *op_types: str) -> bool:
    """Whether the node is one of these operators of ONNX Runtime's own domain."""
    return node.domain == "com.microsoft" and node.op_type in op_types


def made(op_type: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
    """The result of a new standard node; what it leaves open, shape inference fills in."""
    return ir.node(op_type, inputs, attributes).outputs[0]


def nodes_behind(value: ir.Value, known: tuple[ir.Value, ...]) -> tuple[ir.Node, ...]:
    """The nodes that compute the value from known ones, in order."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        node = value.producer() if value is not None else None
        if node is None or value in known or node in found:
            return
        for source in node.inputs:
            visit(source)
        found[node] = None

    visit(value)
    return tuple(found)
