"""Operators of plugins in a model: their meanings as its functions, and the shapes they give.

    node without a function, operator installed   -> gets the function
    function that is an installed operator's       -> stays whole where functions are inlined
    function of that name with another body        -> is inlined: what the file says counts
    operator with a meaning in numpy               -> shapes and types by the plugin's own rule

So a file with such nodes runs wherever ONNX functions do, and every tool here takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, cast

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.core.errors import InputError, UnsupportedError
from twofour.core.plugins import Attribute, Attributes, Operator, Typed, find
from twofour.onnx_tools.plugins_quantized import QuantizedOperator, base_name, quantized_form

_STEADY = 13
_MOST_RESULTS = 64
_NO_PLUGINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "twofour")
_SIMPLE: dict[ir.AttributeType, Callable[[Any], Attribute]] = {
    ir.AttributeType.FLOAT: float,
    ir.AttributeType.INT: int,
    ir.AttributeType.STRING: str,
    ir.AttributeType.INTS: tuple,
    ir.AttributeType.FLOATS: tuple,
}


def plugin_of(node: ir.Node) -> Operator | None:
    """The installed operator of a node, or its quantized form; None where there is none."""
    return _operator(node.domain, node.op_type)


@cache
def _operator(domain: str, op_type: str) -> Operator | None:
    if domain in _NO_PLUGINS:
        return None
    found = find(domain, op_type)
    if found is not None:
        return found
    for name, float_out in base_name(op_type):
        base = find(domain, name)
        if base is not None and base.is_function and base.quantized:
            return quantized_of(base, float_out)
    return None


def quantized_of(base: Operator, float_out: bool) -> QuantizedOperator:
    """The quantized form of an operator whose meaning is a function."""
    return quantized_form(base, _proto(base).SerializeToString(), float_out)


def quantizers(node: ir.Node) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
    """The quantized operands of a quantized form's node, each with its scale and zero point."""
    operator = plugin_of(node)
    if not isinstance(operator, QuantizedOperator):
        return []
    ends = [value.name or "" for value in _function(operator).outputs]
    operands = dict(zip(operator.inputs, node.inputs, strict=False))
    operands |= dict(zip(ends, node.outputs, strict=True))
    numbers = iter(node.inputs[len(operator.inputs) :])
    found = []
    for name, scale, zero_point in zip(operator.scaled, numbers, numbers, strict=True):
        value = operands[name]
        if value is not None and scale is not None and zero_point is not None:
            found.append((value, scale, zero_point))
    return found


def attributes_of(node: ir.Node, operator: Operator) -> Attributes:
    """The attributes of a node, with the meaning's own values where it gives none.

    Raises:
        InputError: one is neither a number, a text nor a list of numbers.
    """
    given = dict(node.attributes)
    if operator.is_function:
        own = _function(operator).attributes
        given = {**{name: attr for name, attr in own.items() if attr.value is not None}, **given}
    found: dict[str, Attribute] = {}
    for name, attribute in given.items():
        read = _SIMPLE.get(attribute.type)
        if read is None:
            raise InputError(
                f"attribute {name!r} of {operator} {node.name!r} is of a kind that plugins do not"
                " take",
                ["expected a number, a text or a list of numbers", f"got {attribute.type.name}"],
            )
        found[name] = read(attribute.value)
    return found


def names_of(operator: Operator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the meaning calls its inputs and its results; those of numpy are y0, y1 and so on."""
    if operator.is_function:
        function = _function(operator)
        inputs, outputs = (
            [v.name or "" for v in part] for part in (function.inputs, function.outputs)
        )
        return tuple(inputs), tuple(outputs)
    given = signature(cast(Callable[..., Any], operator.meaning)).parameters
    return tuple(given), tuple(f"y{i}" for i in range(_MOST_RESULTS))


def attach_meanings(model: ir.Model) -> None:
    """Gives a model the functions of installed operators that it uses and does not define.

    Raises:
        UnsupportedError: a meaning does not fit the model's opset.
    """
    opset = model.graph.opset_imports.get("", 0)
    waiting = [node for graph in model.graphs() for node in graph]
    while waiting:
        node = waiting.pop()
        operator, key = plugin_of(node), node.op_identifier()
        if operator is None or not operator.is_function or key in model.functions:
            continue
        model.functions[key] = function = function_at(operator, opset)
        for domain, version in function.opset_imports.items():
            model.graph.opset_imports.setdefault(domain, version)
        model.graph.opset_imports.setdefault(node.domain, 1)
        waiting += list(function)


def quantized_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that an operator of a plugin takes quantized; none where it needs them float."""
    operator = plugin_of(node)
    if operator is None or not operator.is_function or isinstance(operator, QuantizedOperator):
        return []
    inputs = [value.name for value in _function(operator).inputs]
    wanted = [i for i, name in enumerate(inputs) if name in operator.quantized]
    values = [node.inputs[i] if i < len(node.inputs) else None for i in wanted]
    found = [value for value in values if value is not None and value.const_value is None]
    return found if len(found) == len(wanted) else []


def function_at(operator: Operator, opset: int) -> ir.Function:
    """The meaning for a model of that opset.

    Raises:
        UnsupportedError: an operator in it is another one in that opset.
    """
    proto = onnx.FunctionProto()
    proto.CopyFrom(_proto(operator))
    written = next((o for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset and written is not None and written.version != opset:
        before, written.version = written.version, opset
        if reason := _why_invalid(proto) or _why_too_old(min(before, opset)):
            raise UnsupportedError(
                f"the meaning of {operator} does not fit this model",
                [f"it is written for opset {before}, the model has {opset}: {reason}"],
                f"export the model with opset {before}",
            )
    return ir.serde.deserialize_function(proto)


def inline(model: ir.Model, stays: Callable[[Operator], bool] = lambda operator: True) -> None:
    """Puts the bodies of functions in the place of their calls, in place.

    Args:
        model: the model.
        stays: of which plugins' operators nodes stay whole, where the model means the same by them.
    """
    attach_meanings(model)
    whole = {key for key, function in model.functions.items() if _is_whole(function, stays)}
    if len(whole) < len(model.functions):
        common_passes.InlinePass(lambda function: function.identifier() not in whole)(model)
    for key in [key for key in model.functions if key not in whole]:
        del model.functions[key]


def infer_plugins(graph: ir.Graph) -> None:
    """Types and shapes of what operators with a rule of their own give, as far as it can be known.

    Raises:
        InputError: a plugin's rule refuses what a node reads.
    """
    for node in graph:
        operator = plugin_of(node)
        if operator is None or operator.shapes is None:
            continue
        if all(value.dtype is not None and value.shape is not None for value in node.outputs):
            continue
        inputs = [_typed(value) for value in node.inputs]
        if any(typed is None for typed in inputs):
            continue
        known = [typed for typed in inputs if typed is not None]
        for value, (shape, dtype) in zip(node.outputs, _ruled(operator, node, known), strict=False):
            value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType[_NAMES[dtype]])


_NAMES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    **{
        name: name.upper()
        for name in ("float16", "bfloat16", "bool", "int8", "int16", "int32", "int64", "uint8",
                     "uint16", "uint32", "uint64")
    },
}  # fmt: skip


def _typed(value: ir.Value | None) -> Typed | None:
    """Shape and type of a value where both are known; one that is left out has neither."""
    if value is None:
        return (), ""
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape.numpy()), value.dtype.numpy().name


def _ruled(operator: Operator, node: ir.Node, inputs: list[Typed]) -> list[Typed]:
    """What a plugin's rule says."""
    assert operator.shapes is not None
    try:
        found = [
            (tuple(shape), dtype)
            for shape, dtype in operator.shapes(inputs, attributes_of(node, operator))
        ]
        if wrong := [dtype for _, dtype in found if dtype not in _NAMES]:
            raise ValueError(f"it gives the type {wrong[0]!r}")
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
        given = ", ".join(f"{dtype} {list(shape)}" for shape, dtype in inputs)
        raise InputError(
            f"{operator} {node.name!r} does not take what it reads",
            [f"it reads {given}", f"its rule for shapes: {error}"],
        ) from error
    return found


def _is_whole(function: ir.Function, stays: Callable[[Operator], bool]) -> bool:
    """Whether calls of a function stay nodes."""
    operator = _operator(*function.identifier()[:2])
    if operator is None or not operator.is_function or not stays(operator):
        return False
    return _outline(function) == _outline(_function(operator))


def _outline(function: ir.Function) -> list[object]:
    """What a function computes, whatever its inner values are called."""
    numbers: dict[str, int] = {}

    def number(value: ir.Value | None) -> int:
        name = "" if value is None else value.name or ""
        return numbers.setdefault(name, len(numbers)) if name else -1

    def line(node: ir.Node) -> list[object]:
        plain = [a for a in node.attributes.values() if a.type != ir.AttributeType.GRAPH]
        attributes = sorted(ir.to_proto(a).SerializeToString(deterministic=True) for a in plain)
        inputs, outputs = ([number(v) for v in part] for part in (node.inputs, node.outputs))
        bodies = [
            [name, *body(attribute.as_graph())]
            for name, attribute in sorted(node.attributes.items())
            if attribute.type == ir.AttributeType.GRAPH
        ]
        return [node.domain, node.op_type, inputs, outputs, attributes, bodies]

    def body(graph: ir.Graph | ir.Function) -> list[object]:
        lines: list[object] = [[number(value) for value in graph.inputs]]
        lines += [line(node) for node in graph]
        return [*lines, [number(value) for value in graph.outputs]]

    return body(function)


def _why_invalid(proto: onnx.FunctionProto) -> str:
    """What the onnx package finds wrong with a function in its opsets; "" for nothing."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = onnx.IR_VERSION
    context.opset_imports = {opset.domain: opset.version for opset in proto.opset_import}
    try:
        onnx.checker.check_function(proto, context)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return ""


def _why_too_old(opset: int) -> str:
    """Before that, operators changed what they mean without a change of how they are written."""
    return "" if opset >= _STEADY else f"it would have to be at least {_STEADY}"


@cache
def _function(operator: Operator) -> ir.Function:
    return ir.serde.deserialize_function(_proto(operator))


@cache
def _proto(operator: Operator) -> onnx.FunctionProto:
    """The meaning, parsed and checked against the operator's name.

    Raises:
        UnsupportedError: it cannot be read.
    """
    try:
        if isinstance(operator.meaning, str):
            proto = onnx.parser.parse_function(operator.meaning)
        else:
            proto = onnx.FunctionProto.FromString(operator.meaning)
        if (proto.domain, proto.name) != (operator.domain, operator.name):
            raise ValueError(f"it defines {proto.domain}.{proto.name}")
    except (ValueError, TypeError, RuntimeError, onnx.parser.ParseError) as error:
        raise UnsupportedError(
            f"the meaning of the plugin operator {operator} cannot be read",
            str(error).strip().splitlines()[:3],
            "mend the plugin",
        ) from error
    return proto
