"""The quantized form of a plugin's operator: found between Q and DQ, and what it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import twofour
from tests.plugins.conftest import Install
from tests.plugins.sample import HEAD, LOOP, Triple, changed, emit_triple, model
from twofour.core.errors import InputError
from twofour.onnx_tools.plugins import attach_meanings
from twofour.onnx_tools.quantize import quantize
from twofour.plugins import Code, CpuTactic, Operator, Problem, Target

Array = NDArray[Any]
RNG = np.random.default_rng(6)
X = RNG.standard_normal((6, 16)).astype(np.float32)
SCALES = {
    "s": np.float32(0.05).reshape(()), "t": np.float32(0.17).reshape(()),
}  # fmt: skip
ZEROS = {
    "uint8": {"a": np.array(120, np.uint8), "b": np.array(131, np.uint8)},
    "int8": {"a": np.array(-3, np.int8), "b": np.array(0, np.int8)},
}
WHOLE = f"""{HEAD} net (float[6,16] x) => (float[6,16] z) {{
    q = QuantizeLinear (x, s, a)   d = DequantizeLinear (q, s, a)
    y = test.Triple <add = 0.25> (d)
    r = QuantizeLinear (y, t, b)   z = DequantizeLinear (r, t, b) }}"""
FLOAT_OUT = f"""{HEAD} net (float[6,16] x) => (float[6,16] z) {{
    q = QuantizeLinear (x, s, a)   d = DequantizeLinear (q, s, a)
    z = test.Triple <add = 0.25> (d) }}"""


def executed(whole: ir.Model, x: Array) -> Array:
    attach_meanings(whole)
    session = ort.InferenceSession(ir.to_proto(whole).SerializeToString())
    result: Array = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("text", "form"), [(WHOLE, ""), (FLOAT_OUT, "F")])
def test_between_quantizers_it_works_on_bytes(
    install: Install, dtype: str, text: str, form: str
) -> None:
    install(Triple)
    numbers = {**SCALES, **ZEROS[dtype]}
    used = numbers if not form else {"s": numbers["s"], "a": numbers["a"]}
    engine = twofour.build(model(text, **used), race=False, tuning_effort=1)
    assert any(layer.op == f"QuantizedTriple{form}" for layer in engine.plan.layers)
    with twofour.Session(engine) as session:
        got = session.run({"x": X})["z"]
    want = executed(model(text, **used), X)
    assert np.abs(got - want).max() <= (0.17 * 1.001 if not form else 1e-4)
    assert (np.abs(got - want) < 1e-4).mean() > 0.99


def test_one_that_takes_floats_alone_keeps_its_quantizers(install: Install) -> None:
    def floats(problem: Problem, target: Target) -> str:
        operand = problem.inputs[0]
        return "" if operand is not None and operand.dtype == "float32" else "floats alone"

    install(changed(Triple, tactics={"cpu": [CpuTactic("loop", emit_triple, floats)]}))
    engine = twofour.build(model(WHOLE, **SCALES, **ZEROS["uint8"]), race=False, tuning_effort=0)
    assert any(layer.op == "Triple" for layer in engine.plan.layers)
    with twofour.Session(engine) as session:
        got = session.run({"x": X})["z"]
    assert np.abs(got - executed(model(WHOLE, **SCALES, **ZEROS["uint8"]), X)).max() <= 0.18


def test_a_result_further_off_than_a_step_is_wrong(install: Install) -> None:
    def emit(problem: Problem, target: Target, config: str) -> Code:
        code = emit_triple(problem, target, config)
        (stage,) = code.stages
        return Code((type(stage)(stage.text.replace("3.0", "3.5"), stage.pieces),))

    install(changed(Triple, tactics={"cpu": [CpuTactic("wrong", emit)]}))
    with pytest.raises(twofour.Error, match="wrong result"):
        twofour.build(model(WHOLE, **SCALES, **ZEROS["uint8"]), race=False, tuning_effort=0)


def test_samples_of_the_float_operator_serve_its_quantized_form(install: Install) -> None:
    seen: list[str] = []

    def samples(problem: Problem, rng: np.random.Generator) -> list[Array]:
        seen.extend(o.dtype for o in problem.operands)
        return [rng.uniform(-2, 2, problem.outputs[0].shape)]

    install(changed(Triple, samples=samples))
    engine = twofour.build(model(WHOLE, **SCALES, **ZEROS["uint8"]), race=False, tuning_effort=0)
    assert any(layer.op == "QuantizedTriple" for layer in engine.plan.layers)
    assert set(seen) == {"float32"}


def test_a_reference_in_numpy_serves_it_too(install: Install) -> None:
    calls: list[tuple[int, ...]] = []

    def reference(x: Array, add: float = 0.0) -> Array:
        calls.append(x.shape)
        return x * np.float32(3) + np.float32(add)

    install(changed(Triple, reference=reference))
    twofour.build(model(WHOLE, **SCALES, **ZEROS["int8"]), race=False, tuning_effort=0)
    assert calls == [(6, 16)]


def test_operands_that_the_meaning_does_not_have(install: Install) -> None:
    install(changed(Triple, quantized=("x", "w"), tactics={"cpu": [LOOP]}))
    with pytest.raises(InputError, match="no operand 'w'"):
        twofour.build(model(WHOLE, **SCALES, **ZEROS["uint8"]), race=False, tuning_effort=0)


FOLDED = """
<opset_import: ["" : 17], domain: "test">
Folded (x) => (y) {
    two = Constant <value_float: float = 2.0> ()
    one = Constant <value_float: float = 1.0> ()
    three = Add (two, one)
    y = Mul (x, three)
}
"""


def test_a_quantized_file_keeps_meanings_as_they_were_written(install: Install) -> None:
    """Folding within a function would make it another one, which no plugin is known by."""
    install(Operator("test", "Folded", FOLDED, tactics={"cpu": [LOOP]}, quantized=("x", "y")))
    w = RNG.standard_normal((16, 16)).astype(np.float32)
    text = f"""{HEAD} net (float[6,16] x) => (float[6,16] z) {{
        a = MatMul (x, w)  b = test.Folded (a)  z = MatMul (b, v) }}"""
    whole = model(text, w=w, v=w)
    small = quantize(whole, {"x": X})
    engine = twofour.build(small, race=False, tuning_effort=0)
    assert any("Folded" in layer.op for layer in engine.plan.layers)
