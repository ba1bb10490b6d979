"""Are the tensor types that meet at each operator allowed by its definition?

`onnx.checker` does not look: a Conv with float activations and int8 weights passes it, and no
runtime takes the file. Types come from shape inference; the rules are the operator schemas of the
`onnx` package.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir


def type_conflicts(model: ir.Model) -> list[str]:
    """One line for each node input whose type its operator does not take.

    Args:
        model: with the types of its values filled in (see `onnx.shape_inference`). Values without a
            type, and operators without a schema (custom domains, functions), are passed over.
    """
    found: list[str] = []
    for node in model.graph.all_nodes():
        opset = model.opset_imports.get(node.domain)
        if opset is not None and onnx.defs.has(node.op_type, opset, node.domain):
            schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
            found.extend(_conflicts(node, schema))
    return found


def _conflicts(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[str]:
    bound: dict[str, tuple[str, str]] = {}
    for index, value in enumerate(node.inputs):
        actual = _type_string(value)
        parameter = _parameter(schema, index)
        if value is None or actual is None or parameter is None:
            continue
        where = f"{node.op_type} {node.name!r}: input {parameter.name} {value.name!r} is {actual}"
        if actual not in parameter.types:
            yield f"{where}, expected {' or '.join(sorted(parameter.types))}"
        elif parameter.is_homogeneous:
            name, first = bound.setdefault(parameter.type_str, (parameter.name, actual))
            if first != actual:
                yield f"{where}, but input {name} is {first}"


def _parameter(schema: onnx.defs.OpSchema, index: int) -> onnx.defs.OpSchema.FormalParameter | None:
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    if index < len(schema.inputs):
        return schema.inputs[index]
    last = schema.inputs[-1] if schema.inputs else None
    return last if last is not None and last.option == variadic else None


def _type_string(value: ir.Value | None) -> str | None:
    if value is None or not isinstance(value.type, ir.TensorType):
        return None
    return f"tensor({value.type.dtype.name.lower()})"
