"""Operators of plugins on a GPU: what their tactics are asked, of operands where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from twofour.compiler.cuda.tensors import Tensor
from twofour.compiler.native import NativeOp, NotNative
from twofour.compiler.native_plugin import PluginOp, asked
from twofour.core.plugins import Operand, Operator, Problem
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import QUANTIZED, REAL
from twofour.onnx_tools.plugins import plugin_of

Array = NDArray[Any]
_STORED = 128  # what a CPU adds to int8


@dataclass(frozen=True)
class PluginProblem:
    """What a node of a plugin asks on a GPU.

    Equal for problems that differ in what their constants hold: these are timed alike.

    Attributes:
        key: of all else.
        problem: as tactics get it.
        operator: the plugin's.
    """

    key: str
    problem: Problem = field(compare=False, repr=False)
    operator: Operator = field(compare=False, repr=False)

    @staticmethod
    def of(problem: Problem, operator: Operator) -> PluginProblem:
        """With its key."""
        plain = [
            (each.name, each.shape, each.dtype, each.strides, each.constant is None)
            for each in problem.operands
        ]
        missing = [each is None for each in problem.inputs]
        text = repr((str(operator), operator.version, plain, missing, sorted(problem.attributes)))
        text += repr([problem.attributes[name] for name in sorted(problem.attributes)])
        return PluginProblem(hashlib.sha256(text.encode()).hexdigest(), problem, operator)


def read_plugin(node: ir.Node) -> NativeOp | str:
    """The node as an operator for a plugin's tactics, or why it is none."""
    operator = plugin_of(node)
    if operator is None:
        return f"no plugin with {node.domain}.{node.op_type} is installed"
    if not operator.cuda:
        return f"{operator} has no tactic for a GPU"
    try:
        return PluginOp.of(node, operator)
    except NotNative as reason:
        return str(reason)


def strided(operator: Operator) -> bool:
    """Whether operands may lie as they do, not only in C order."""
    return all(tactic.strided for tactic in operator.cuda)


def held_as(operand: Operand, real: str, quantized: str) -> str:
    """The type of an operand on the GPU.

    Args:
        operand: as the model has it.
        real: type of real values.
        quantized: type of quantized ones; bytes that stand for nothing else stay bytes.
    """
    if operand.scale is not None:
        return quantized
    return real if operand.dtype in REAL else operand.dtype


def placed(problem: Problem, tensors: Mapping[str, Tensor]) -> Problem:
    """The problem with its operands where and as they lie.

    Args:
        problem: as the model has it.
        tensors: of all operands that are no constants, by name.
    """

    def moved(operand: Operand | None) -> Operand | None:
        if operand is None or operand.name not in tensors:
            return operand
        tensor = tensors[operand.name]
        steps = tuple(step * tensor.item_bytes for step in tensor.strides)
        zero = operand.zero_point - _STORED * (operand.dtype == "uint8")
        zero = zero if tensor.dtype == "int8" else 0
        found = replace(operand, dtype=tensor.dtype, strides=steps)
        return replace(found, zero_point=zero) if tensor.dtype in QUANTIZED else found

    outputs = tuple(each for each in map(moved, problem.outputs) if each is not None)
    return replace(problem, inputs=tuple(map(moved, problem.inputs)), outputs=outputs)


def recipes(
    asked_for: PluginProblem, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """What the plugin's tactics offer, under their names.

    Args:
        asked_for: the problem.
        constants: not read: they are in the problem.
        capability: of the GPU, 90 for 9.0.
        effort: 0 to 3, how many.
    """
    operator, problem = asked_for.operator, asked_for.problem
    found: list[Recipe] = []
    for tactic in operator.cuda:
        what = f"why_not of {tactic.name}"
        if asked(operator, what, tactic.refuse, problem, capability):
            continue
        what = f"recipes of {tactic.name}"
        given = asked(operator, what, tactic.recipes, problem, capability, effort=effort)
        found += [replace(recipe, tactic=tactic.name) for recipe in given]
    return tuple(found)
