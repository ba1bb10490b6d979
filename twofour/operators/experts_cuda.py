"""Routed experts and the masked MLP for GPUs: from a problem of the operator to one of the kernels.

Imported only where an engine is built for a GPU: kernels/cuda/experts.py needs Triton.
"""

from __future__ import annotations

from dataclasses import replace

from twofour.core.experts import MIXTURE
from twofour.core.experts_text import BY_NAME, inputs_of
from twofour.core.plugins import Array, Operand, Problem
from twofour.kernels.cuda import experts
from twofour.kernels.cuda.experts_route import ExpertsProblem
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import REAL
from twofour.operators.experts_plan import Plan, operand, weights, why_not_sized


def why_not(problem: Problem, capability: int) -> str:
    """Why no kernel takes a problem; "" if one does.

    Args:
        problem: what a node asks.
        capability: of the GPU, 90 for 9.0.
    """
    if reason := why_not_sized(_in_float32(problem)):
        return reason
    if computed := [n for n in _weights(problem) if operand(problem, n).constant is None]:
        return f"needs constant weights: {computed[0]!r} is computed while running"
    x, y = operand(problem, "x"), problem.outputs[0]
    if y.dtype != x.dtype:
        return f"y is {y.dtype}: expected {x.dtype}, as x is"
    return experts.why_not(problem_of(problem), capability)


def recipes(problem: Problem, capability: int, *, effort: int = 2) -> tuple[Recipe, ...]:
    """Ways to run a problem that is taken, the best guess first."""
    asked = problem_of(problem)
    return experts.recipes(asked, _constants(problem), capability, effort=effort)


def problem_of(problem: Problem) -> ExpertsProblem:
    """What the kernels are asked.

    Args:
        problem: what a node asks; its types and shapes are those that `why_not` takes.
    """
    plan, x = Plan.of(problem), operand(problem, "x").dtype
    return ExpertsProblem(
        plan.tokens,
        plan.experts,
        plan.k,
        plan.hidden,
        plan.inner,
        plan.activation,
        x,
        "int8" if plan.quantized else x,
        plan.routed,
        plan.normalize,
        operand(problem, "logits").dtype if plan.routed else "float32",
    )


def _weights(problem: Problem) -> tuple[str, ...]:
    """Names of the constant inputs."""
    base, _, quantized = BY_NAME[problem.operator]
    return tuple(inputs_of(base, quantized=quantized)[2:])


def _constants(problem: Problem) -> dict[str, Array]:
    """Weights, biases and scales, of each expert."""
    return {name: weights(problem, name) for name in _weights(problem)}


def _in_float32(problem: Problem) -> Problem:
    """The same with all real types as float32, which sizes do not depend on."""

    def widened(one: Operand | None) -> Operand | None:
        real = one is not None and one.dtype in REAL
        return replace(one, dtype="float32") if one is not None and real else one

    base = BY_NAME[problem.operator][0]
    count = 2 if base == MIXTURE else 1  # weights are constants, in the type that the file has
    given = tuple(widened(one) for one in problem.inputs[:count])
    return replace(problem, inputs=(*given, *problem.inputs[count:]))
