"""Small questions to, and changes of, an onnx_ir graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or of a Constant node's output; None for any other value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of the node; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_standard(node: ir.Node | None, *op_types: str) -> bool:
    """Whether the node is one of these operators of the ONNX domain."""
    return node is not None and node.domain == "" and node.op_type in op_types


def sole_use(value: ir.Value) -> bool:
    """Whether one node input, and no graph output, takes the value."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone takes the value, as one of its inputs; None where others do, or none."""
    return next(iter(value.uses())).node if sole_use(value) else None


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads from its graph, in its subgraphs too, however deep."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            found += [v for n in inner for v in reads(n) if v.graph is not inner]
            found += [v for v in inner.outputs if v.graph is not inner]
    return found


def bypass(after: ir.Value, before: ir.Value) -> None:
    """Takes the node that makes `after` out of the graph; `before` serves instead.

    A graph output keeps its name.
    """
    node = after.producer()
    if node is None or not isinstance(node.graph, ir.Graph):
        raise ValueError(f"value {after.name!r} is not made by a node of a graph")
    name, is_output = after.name, after.is_graph_output()
    after.replace_all_uses_with(before, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    if is_output:
        before.name = name


class Editor:
    """Adds constants and nodes with names that are still free.

    Args:
        graph: the graph that is changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Collects the names in use, those of subgraphs too."""
        self.graph = graph
        self._taken: set[str | None] = set()
        for part in (graph, *graph.subgraphs()):
            self._taken.update(value.name for value in part.inputs)
            self._taken.update(part.initializers)
        for node in graph.all_nodes():
            self._taken.add(node.name)
            self._taken.update(value.name for value in node.outputs)

    def name(self, base: str) -> str:
        """Takes and returns `base`, or `base_1`, `base_2`, ... where that is taken."""
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def initializer(self, base: str, array: Array) -> ir.Value:
        """Adds a constant."""
        name = self.name(base)
        tensor = ir.tensor(array, name=name)
        value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def set_constant(self, node: ir.Node, index: int, array: Array) -> None:
        """Makes a constant an input of the node.

        Args:
            node: its input is replaced in place where nobody else reads it, else by a new
                initializer.
            index: of the input; one that the node does not have yet is called the bias of what
                input 1 is called.
            array: the constant.
        """
        old = operand(node, index)
        if old is not None and old.is_initializer() and sole_use(old):
            old.const_value = ir.tensor(array, name=old.name)
            old.shape = ir.Shape(array.shape)
            return
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        base = str(node.name) if old is None else str(old.name)
        if old is None and (weight := operand(node, 1)) is not None:
            stem, _, last = str(weight.name).rpartition(".")
            base = f"{stem}.bias" if last == "weight" else f"{weight.name}_bias"
        node.replace_input_with(index, self.initializer(base, array))

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        base: str,
        like: ir.Value,
        dtype: ir.DataType,
        axis: int | None = None,
    ) -> ir.Node:
        """Makes a node that is not in the graph yet, with one output shaped like `like`."""
        output = ir.Value(name=self.name(base), type=ir.TensorType(dtype), shape=like.shape)
        attributes = {} if axis is None else {"axis": axis}
        name = self.name(f"{like.name}_{op_type}")
        return ir.node(op_type, inputs, attributes, outputs=[output], name=name)
