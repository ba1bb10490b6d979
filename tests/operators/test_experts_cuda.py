"""Routed experts as operators on a GPU: what their tactic asks of the kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.cuda.experts_cases import Layer
from tests.kernels.cuda.interpret import interpret
from twofour.core.experts import MASKED, MIXTURE
from twofour.core.experts_text import inputs_of, name_of
from twofour.core.plugins import Operand, Problem, c_strides
from twofour.kernels.cuda.experts_route import ExpertsProblem
from twofour.operators.experts import OPERATORS
from twofour.operators.experts_cuda import problem_of

SIZES = ExpertsProblem(6, 3, 2, 16, 24, "SwiGlu", "float32", "float32")


def problem(layer: Layer) -> Problem:
    """The node that asks for a layer; x has two sequences."""
    p, found = layer.problem, []
    base, quantized = (MIXTURE if p.routed else MASKED), p.weights == "int8"
    for name in inputs_of(base, quantized=quantized):
        if name in layer.tensors:
            shape = (2, p.tokens // 2, *layer.tensors[name].shape[1:])
            dtype = {"x": p.x, "logits": p.logits, "mask": "bool"}[name]
            found.append(Operand(name, shape, dtype, c_strides(shape, "int8")))
        else:
            array = layer.constants[name] if p.routed else layer.constants[name][0]
            found.append(Operand(name, array.shape, str(array.dtype), array.strides, array))
    y = replace(found[0], name="y")
    attributes = {"k": p.k, "normalize": int(p.normalize)} if p.routed else {}
    operator = name_of(base, p.activation, quantized=quantized)
    return Problem(operator, tuple(found), (y,), attributes)


def tactic_of(asked: Problem):
    (operator,) = [operator for operator in OPERATORS if operator.name == asked.operator]
    return operator.cuda[0]


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("routed", [True, False])
def test_it_computes_the_meaning(weights: str, routed: bool) -> None:
    sizes = SIZES if routed else replace(SIZES, experts=1, k=1, routed=False)
    layer = Layer.of(replace(sizes, weights=weights))
    asked = problem(layer)
    tactic = tactic_of(asked)
    assert tactic.refuse(asked, 90) == ""
    assert problem_of(asked) == layer.problem
    (recipe,) = tactic.recipes(asked, 90, effort=0)
    interpret(recipe, layer.tensors)
    assert layer.wrong() == ""


def test_weights_of_float32_are_multiplied_in_the_type_of_x() -> None:
    layer = Layer.of(replace(SIZES, x="float16", weights="float16"))
    asked = problem(layer)
    assert tactic_of(asked).refuse(asked, 90) == ""
    (recipe,) = tactic_of(asked).recipes(asked, 90, effort=0)
    assert recipe.constants["w1"].dtype == np.float16
    assert recipe.constants["b1"].dtype == np.float32
    interpret(recipe, layer.tensors)
    assert layer.wrong() == ""


def test_refusals() -> None:
    asked = problem(Layer.of(SIZES))
    tactic = tactic_of(asked)
    x, logits, *rest = asked.inputs
    short = replace(logits, shape=(2, 3, 5))
    wrong = replace(asked, inputs=(x, short, *rest))
    assert "logits is float32 [2, 3, 5]" in tactic.refuse(wrong, 90)
    computed = replace(rest[0], constant=None)
    moved = replace(asked, inputs=(x, logits, computed, *rest[1:]))
    assert "'w1' is computed while running" in tactic.refuse(moved, 90)
    other = replace(asked, outputs=(replace(asked.outputs[0], dtype="float16"),))
    assert "expected float32, as x is" in tactic.refuse(other, 90)
    many = replace(asked, attributes={"k": 9, "normalize": 1})
    assert "9 of 3 experts" in tactic.refuse(many, 90)
