"""Operators of plugins as native ones: what a tactic is asked, and which nodes none takes.

A node stays whole if a tactic of its operator takes it. One that none takes is inlined where its
meaning is a function, so the rest of the compiler has it; where its meaning is numpy it runs in
Python (python_calls.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.native import NativeOp, NotNative, constant, name_of, shape
from twofour.compiler.native_nd import NdValue
from twofour.core.errors import Error, UnsupportedError
from twofour.core.plugins import Operand, Operator, Problem, c_strides
from twofour.core.target import Target
from twofour.onnx_tools.plugins import attributes_of, names_of, plugin_of, quantizers
from twofour.onnx_tools.plugins_quantized import QuantizedOperator

INLINED_KEY = "twofour.inlined_plugins"  # metadata: JSON, node -> why no tactic takes it
_REFUSED = "refused"  # overload of the functions of such nodes


@dataclass(frozen=True, kw_only=True)
class PluginOp(NativeOp):
    """An operator of a plugin.

    Attributes:
        operator: the plugin's.
        problem: what it asks of a kernel; operands in C order, before they have places.
        values: the operands that are there, inputs first, as `Problem.operands` has them.
        node: the node, for its meaning.
    """

    operator: Operator
    problem: Problem
    values: tuple[NdValue, ...]
    node: ir.Node

    @staticmethod
    def of(node: ir.Node, operator: Operator) -> PluginOp:
        """Reads a node.

        Raises:
            NotNative: a shape is not known, or nothing that it reads is computed while running.
        """
        problem = problem_of(node, operator)
        read = operands_of(node, operator)
        given = [value for value in (*read, *node.outputs) if value is not None]
        values = tuple(_value(*pair) for pair in zip(given, problem.operands, strict=True))
        reads = [value.name for value in values[: -len(node.outputs)] if value.name]
        if not reads:
            raise NotNative("nothing it reads is computed while running")
        y, *also = [name_of(value) for value in node.outputs]
        return PluginOp(
            node.name or "",
            node.op_type,
            "plugin",
            reads[0],
            y,
            more=tuple(reads[1:]),
            also=tuple(also),
            operator=operator,
            problem=problem,
            values=values,
            node=node,
        )


def read_plugin(node: ir.Node) -> PluginOp:
    """The node as an operator for a plugin's tactics.

    Raises:
        NotNative: it has none, or its shapes are not known.
    """
    operator = plugin_of(node)
    if operator is None:
        raise NotNative(f"no plugin with {node.domain}.{node.op_type} is installed")
    if not operator.cpu:
        raise NotNative(f"{operator} has no tactic for a CPU")
    return PluginOp.of(node, operator)


def problem_of(node: ir.Node, operator: Operator) -> Problem:
    """What a node asks of a kernel, its operands in C order.

    Raises:
        NotNative: a shape or a type is not known, or a result is left out.
        InputError: an attribute is of a kind that plugins do not take.
    """
    numbers = {value.name: pair for value, *pair in quantizers(node)}
    given, results = names_of(operator)
    inputs = _operands(given, operands_of(node, operator), numbers)
    outputs = _operands(results, node.outputs, numbers)
    base = operator.base if isinstance(operator, QuantizedOperator) else operator
    name = base.name if base is not None else operator.name
    attributes = dict(attributes_of(node, operator))
    written = tuple(each for each in outputs if each is not None)
    return Problem(name, tuple(inputs), written, attributes)


def operands_of(node: ir.Node, operator: Operator) -> tuple[ir.Value | None, ...]:
    """What a node reads; of a quantized form without the scales and zero points."""
    if isinstance(operator, QuantizedOperator):
        return tuple(node.inputs[: len(operator.inputs)])
    return tuple(node.inputs)


def _operands(
    names: Sequence[str],
    values: Sequence[ir.Value | None],
    numbers: Mapping[str | None, Sequence[ir.Value]],
) -> list[Operand | None]:
    """Values under the names that the meaning has for them, as far as it has names."""
    padded = (*names, *("" for _ in values))
    return [
        None if value is None else _operand(name, value, numbers.get(value.name))
        for name, value in zip(padded, values, strict=False)
    ]


def _operand(name: str, value: ir.Value, numbers: Sequence[ir.Value] | None) -> Operand:
    if value.dtype is None or not value.name:
        raise NotNative("the type of an operand is not known, or a result is left out")
    dims, dtype = shape(value), value.dtype.numpy().name
    held = constant(value) if value.const_value is not None else None
    operand = Operand(name, dims, dtype, c_strides(dims, dtype), held)
    if numbers is None:
        return operand
    scale, zero_point = (constant(number) for number in numbers)
    return replace(operand, scale=scale, zero_point=int(zero_point.reshape(-1)[0]))


def _value(value: ir.Value, operand: Operand) -> NdValue:
    name = "" if operand.constant is not None else name_of(value)
    return NdValue(name, operand.shape, operand.dtype, operand.constant)


def runs_in_python(node: ir.Node) -> bool:
    """Whether a node that no kernel takes runs by its meaning in numpy."""
    operator = plugin_of(node)
    return operator is not None and not operator.is_function


Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def asked(
    operator: Operator,
    what: str,
    function: Callable[Given, Answer],
    *args: Given.args,
    **kwargs: Given.kwargs,
) -> Answer:
    """What a plugin's function answers.

    Raises:
        UnsupportedError: it raises something; says which plugin it is.
    """
    try:
        return function(*args, **kwargs)
    except Error:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"the plugin operator {operator} failed",
            [f"{what}: {type(error).__name__}: {error}"],
            "mend the plugin; until then, build without it installed",
        ) from error


def has_tactic(operator: Operator, target: Target) -> bool:
    """Whether an operator has tactics for that kind of target."""
    return bool(operator.cpu if target.cuda is None else operator.cuda)


def refusals(operator: Operator, problem: Problem, target: Target) -> list[str]:
    """Why no tactic takes a problem, a line each; empty if one does."""
    if target.cuda is not None:
        return gpu_refusals(operator, problem, target.cuda.capability)
    found = []
    for tactic in operator.cpu:
        reason = asked(operator, f"refuse of {tactic.name}", tactic.refuse, problem, target)
        if not reason:
            return []
        found.append(f"{tactic.name}: {reason}")
    return found or [f"{operator} has no tactic for a CPU"]


def gpu_refusals(operator: Operator, problem: Problem, capability: int) -> list[str]:
    """The same for a GPU.

    Args:
        operator: the plugin's.
        problem: what a node asks.
        capability: of the GPU, 90 for 9.0.
    """
    found = []
    for tactic in operator.cuda:
        what = f"why_not of {tactic.name}"
        reason = asked(operator, what, tactic.refuse, problem, capability)
        if not reason:
            return []
        found.append(f"{tactic.name}: {reason}")
    return found or [f"{operator} has no tactic for a GPU"]


def inline_refused(model: ir.Model, target: Target) -> bool:
    """Inlines, in place, the nodes of plugins that no tactic takes and whose meaning is a function.

    Args:
        model: its shapes are known, as far as they can be.
        target: to build for.

    Returns:
        Whether there were any; the metadata tells which, and why.
    """
    reasons: dict[str, str] = {}
    for node in model.graph:
        operator = plugin_of(node)
        if operator is None or not operator.is_function:
            continue
        lines = _why_not(node, operator, target)
        if not lines:
            continue
        name = node.name or f"{node.op_type}:{node.outputs[0].name}"
        reasons[name] = f"{operator}: {'; '.join(lines)}"
        _set_refused(model, node)
    if not reasons:
        return False
    common.InlinePass(lambda function: function.overload == _REFUSED)(model)
    left = {node.op_identifier() for node in model.graph}
    for key in [key for key in model.functions if key not in left and plugin_function(key)]:
        del model.functions[key]
    model.metadata_props[INLINED_KEY] = json.dumps(reasons)
    return True


def plugin_function(key: Sequence[str]) -> bool:
    """Whether a function is the meaning of a plugin's operator."""
    return plugin_of(ir.Node(key[0], key[1], [])) is not None


def inlined_notes(model: ir.Model) -> tuple[str, ...]:
    """What `inline_refused` left in the metadata, in words."""
    reasons = json.loads(model.metadata_props.get(INLINED_KEY, "{}"))
    return tuple(
        f"{name} runs as its meaning, not as one operator: {why}" for name, why in reasons.items()
    )


def _why_not(node: ir.Node, operator: Operator, target: Target) -> list[str]:
    try:
        return refusals(operator, problem_of(node, operator), target)
    except NotNative as error:
        return [str(error)]


def _set_refused(model: ir.Model, node: ir.Node) -> None:
    """Gives a node a function of its own, to be inlined."""
    key = node.op_identifier()
    refused = (*key[:2], _REFUSED)
    if refused not in model.functions:
        function = ir.serde.deserialize_function(ir.to_proto(model.functions[key]))
        function.overload = _REFUSED
        model.functions[refused] = function
    node.overload = _REFUSED
