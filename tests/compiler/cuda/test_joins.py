"""Turns on a GPU that go on where the one before ended."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.cuda.execute import run
from tests.compiler.engines import reference
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.cuda.graphs import Network, network_of
from twofour.compiler.cuda.joins import _steps
from twofour.compiler.cuda.types import Types
from twofour.kernels.cpu.nd_scalar import Expression
from twofour.kernels.cuda.problem import Ref, Walk
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

GATED = """(float[3, 32] x) => ({outputs}) {{
    a = MatMul (x, wa)
    s = Sigmoid (a)
    g = Mul (a, s)
    b = MatMul (x, wb)
    m = Mul (g, b)
    y = MatMul (m, wc)
}}"""
"""LLaMA's feed-forward block."""


def gated(outputs: str = "y") -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.standard_normal((32, 32)).astype(np.float32) / 4 for n in "abc"}
    wanted = ", ".join(f"float[3, 32] {name}" for name in outputs)
    return graph(GATED.format(outputs=wanted), **weights)


def feeds_of() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)}


def quantized(model: ir.Model) -> ir.Model:
    return quantize(model, [feeds_of()], QuantizeOptions(activation="int8"))


def turns_of(network: Network) -> list[str]:
    (part,) = network.parts
    assert part.gpu is not None
    return [turn.op.op_type for turn in part.gpu.turns]


@pytest.mark.parametrize("real", ["float32", "float16"])
def test_a_product_of_two_branches_is_quantized_where_it_is_made(real: str) -> None:
    source = quantized(gated())
    network = network_of(source, {}, Types(real), forced=False, dump=None)
    assert turns_of(network).count("JoinedQuantizeLinear") == 1
    assert "Mul" not in turns_of(network)
    wanted = reference(source, feeds_of())["y"]
    got = run(network, feeds_of())["y"]
    assert np.linalg.norm(got - wanted) <= 0.01 * np.linalg.norm(wanted)


def test_what_others_read_is_written() -> None:
    source = quantized(gated("my"))
    network = network_of(source, {}, Types("float32"), forced=False, dump=None)
    assert "JoinedQuantizeLinear" not in turns_of(network)
    wanted, got = reference(source, feeds_of()), run(network, feeds_of())
    for name in ("m", "y"):
        error = np.linalg.norm(got[name] - wanted[name])
        assert error <= 0.01 * np.linalg.norm(wanted[name])


def test_the_plan_names_all_that_it_computes() -> None:
    engine = build(quantized(gated()), target="cuda:sm90", tuning_effort=0)
    (layer,) = (each for each in engine.plan.layers if each.op == "JoinedQuantizeLinear")
    assert layer.source == ("m", "m_QuantizeLinear")


def walk(op: str, y: str, inputs: int, *steps: Expression, x: str = "float32") -> Walk:
    return Walk(op, (4,), Ref(y, (1,)), (Ref(x, (1,)),) * inputs, steps=steps)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (walk("mul", "float16", 2), (Expression("mul", (0, 1), "float32"),)),
        (walk("greater", "bool", 2), None),
        (walk("softmax", "float32", 1), None),
        (walk("cast", "float32", 1, x="int64"), None),
        (walk("cast", "float32", 1), ()),
        (walk("chain", "int8", 1, Expression("quantize", (0,), "int8", (1.0, 0.0))), None),
        (walk("chain", "float16", 1, Expression("cast", (0,), "float16")), ()),
        (walk("chain", "float16", 1, Expression("cast", (0,), "float16"), x="int8"), None),
        (
            walk(
                "chain", "float16", 2,
                Expression("add", (0, 1), "float32"), Expression("cast", (2,), "float16"),
            ),
            (Expression("add", (0, 1), "float32"),),
        ),
    ],
)  # fmt: skip
def test_what_goes_on_has_what_was_computed(
    given: Walk, steps: tuple[Expression, ...] | None
) -> None:
    assert _steps(given) == steps
