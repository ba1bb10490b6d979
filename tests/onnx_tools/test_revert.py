"""Layers of a quantized model that are switched back to floats."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from twofour.onnx_tools.edit import operand
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.onnx_tools.reference import Reference
from twofour.onnx_tools.revert import float_switches, switched

RNG = np.random.default_rng(3)


def shared() -> Quantized:
    """Two convolutions and an Add read the result of a third one."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        shared (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {
            [c0] h = Conv <pads = [1, 1, 1, 1]> (x, w0)
            [act] r = Relu (h)
            [c1] a = Conv <pads = [1, 1, 1, 1]> (r, w1)
            [c2] b = Conv <pads = [1, 1, 1, 1]> (r, w2)
            [sum] s = Add (a, b)
            [last] y = Add (s, r)
        }
    """
    model = ir.from_onnx_text(text)
    for name in ("w0", "w1", "w2"):
        array = RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for node in model.graph:
            for index, given in enumerate(node.inputs):
                if given is not None and given.name == name:
                    node.replace_input_with(index, value)
        model.graph.initializers[name] = value
    x = RNG.standard_normal((8, 4, 6, 6)).astype(np.float32)
    return quantize_with_report(model, {"x": x})


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return shared()


def reads(model: ir.Model) -> dict[str, str]:
    """What makes the first input of each layer: an operator, or "" for an input."""
    found = {}
    for node in model.graph:
        value = operand(node, 0)
        maker = None if value is None else value.producer()
        found[str(node.name)] = "" if maker is None else maker.op_type
    return found


def stored(model: ir.Model) -> dict[str, str]:
    layers = {str(node.name): node for node in model.graph if node.op_type == "Conv"}
    makers = {name: layer.inputs[1].producer() for name, layer in layers.items()}  # type: ignore[union-attr]
    return {name: "int8" if maker else "float" for name, maker in makers.items()}


def test_one_of_two_readers(quantized: Quantized) -> None:
    """The other layer goes on reading bytes: it stays an integer layer."""
    switches = {each.layer: each for each in float_switches(quantized.model, quantized.floats)}
    assert set(switches) >= {"c0", "c1", "c2"}
    before = reads(quantized.model)
    mixed = switched(quantized.model, [switches["c1"]])
    assert (before["c1"], before["c2"]) == ("DequantizeLinear", "DequantizeLinear")
    assert (reads(mixed)["c1"], reads(mixed)["c2"]) == ("Relu", "DequantizeLinear")
    assert stored(mixed) == {"c0": "int8", "c1": "float", "c2": "int8"}
    assert reads(quantized.model) == before  # the model itself stays


def test_all_is_the_float_model(quantized: Quantized) -> None:
    mixed = switched(quantized.model, float_switches(quantized.model, quantized.floats))
    assert not {node.op_type for node in mixed.graph} & {"QuantizeLinear", "DequantizeLinear"}
    x = RNG.standard_normal((1, 4, 6, 6)).astype(np.float32)
    got, expected = (Reference(m).run({"x": x})["y"] for m in (mixed, quantized.floats))
    np.testing.assert_array_equal(got, expected)


def test_float_weights_are_those_of_the_model(quantized: Quantized) -> None:
    """Also where most of them were rounded to zero, or up to another step."""
    floats = quantized.floats.clone()
    value = floats.graph.initializers["w1"]
    array = np.full((4, 4, 3, 3), 0.25, np.float32)
    value.const_value = ir.tensor(array, name="w1")
    switch = next(s for s in float_switches(quantized.model, floats) if s.layer == "c1")
    mixed = switched(quantized.model, [switch])
    layer = next(node for node in mixed.graph if node.name == "c1")
    assert layer.inputs[1] is not None
    assert layer.inputs[1].const_value is not None
    np.testing.assert_array_equal(layer.inputs[1].const_value.numpy(), array)
