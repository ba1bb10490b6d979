"""Q/DQ as TensorRT takes it: what is rewritten computes the same, what cannot be is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import graph, op_types, run
from twofour.compiler.tensorrt.rewrite import for_tensorrt, is_quantized
from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.edit import constant

W = np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.int8)
BODY = (
    "(float[2,4] x) => (float[2,8] y) <float s = {{0.05}}, {kind} z = {{{zero}}}>"
    "{{ q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
    " w = DequantizeLinear <axis = 0> (k, ks) y = Gemm <transB = 1> (f, w) }}"
)
SCALES = np.linspace(0.001, 0.02, 8).astype(np.float32)


def model(kind: str, zero: int):
    return graph(BODY.format(kind=kind, zero=zero), k=W, ks=SCALES)


def test_what_tensorrt_takes_stays_as_it_is() -> None:
    source = model("int8", 0)
    found, notes = for_tensorrt(source)
    assert notes == ()
    assert op_types(found) == op_types(source)
    assert is_quantized(found)
    assert not is_quantized(graph("(float[2] x) => (float[2] y) { y = Relu (x) }"))


def test_uint8_around_its_middle_becomes_int8_bit_for_bit() -> None:
    source = model("uint8", 128)
    found, notes = for_tensorrt(source)
    assert notes == ("1 tensors of uint8 with zero point 128 became int8",)
    points = [constant(node.inputs[2]) for node in found.graph if node.name in "qf"]
    assert [(point.dtype, point.item()) for point in points] == [(np.int8, 0)] * 2
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32) * 3
    assert (run(found, {"x": x})[0] == run(source, {"x": x})[0]).all()
    assert constant(source.graph[0].inputs[2]).dtype == np.uint8, "the source is as it was"


def test_weights_of_uint8_around_their_middle_become_int8() -> None:
    body = (
        "(float[2,4] x) => (float[2,8] y) <uint8 z = {128}, float s = {0.01}>"
        "{ w = DequantizeLinear (k, s, z) y = Gemm <transB = 1> (x, w) }"
    )
    source = graph(body, k=(W.astype(np.int16) + 128).astype(np.uint8))
    found, notes = for_tensorrt(source)
    assert notes
    (stored,) = (constant(n.inputs[0]) for n in found.graph if n.op_type == "DequantizeLinear")
    assert (stored == W).all()
    assert "k" not in found.graph.initializers or found.graph.initializers["k"].uses()
    x = np.ones((2, 4), np.float32)
    assert (run(found, {"x": x})[0] == run(source, {"x": x})[0]).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_bias_of_int32_becomes_float(per_channel: bool) -> None:
    scale = SCALES if per_channel else np.float32(0.01)
    body = (
        "(float[2,4] x) => (float[2,8] y) { w = DequantizeLinear <axis = 0> (k, ks)"
        " c = DequantizeLinear <axis = 0> (b, bs) y = Gemm <transB = 1> (x, w, c) }"
    )
    source = graph(body, k=W, ks=SCALES, b=np.arange(8, dtype=np.int32) * 100, bs=scale)
    found, notes = for_tensorrt(source)
    assert notes == ("1 biases of int32 became float32",)
    assert op_types(found) == ["DequantizeLinear", "Gemm"]
    x = np.ones((2, 4), np.float32)
    assert (run(found, {"x": x})[0] == run(source, {"x": x})[0]).all()


@pytest.mark.parametrize(
    ("kind", "zero", "reason"),
    [
        ("uint8", 0, "uint8, zero point 0"),
        ("uint8", 100, "uint8, zero point 100"),
        ("int8", 3, "int8, zero point 3"),
    ],
)
def test_what_no_symmetric_int8_equals_is_refused(kind: str, zero: int, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        for_tensorrt(model(kind, zero))
    assert "1 tensors or operators are not quantized as it wants" in caught.value.what
    assert "--activation int8" in caught.value.fix


def test_integers_that_something_else_reads_are_refused() -> None:
    body = (
        "(float[2,4] x) => (float[2,4] y, int32[2,4] n) <float s = {0.05}, uint8 z = {128}>"
        "{ q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) n = Cast <to = 6> (q) }"
    )
    with pytest.raises(UnsupportedError, match="Cast 'n' has to do with it"):
        for_tensorrt(graph(body))


def test_integers_that_are_an_output_are_refused() -> None:
    body = (
        "(float[2,4] x) => (uint8[2,4] q) <float s = {0.05}, uint8 z = {128}>"
        "{ q = QuantizeLinear (x, s, z) }"
    )
    with pytest.raises(UnsupportedError, match="an input or output of the model"):
        for_tensorrt(graph(body))


def test_products_of_integers_are_refused() -> None:
    body = "(uint8[2,4] x) => (int32[2,8] y) <uint8 z = {128}> { y = MatMulInteger (x, k, z) }"
    with pytest.raises(UnsupportedError, match="between Q/DQ pairs alone"):
        for_tensorrt(graph(body, k=W.T.copy()))


def test_scales_of_run_time_are_refused() -> None:
    body = (
        "(float[2,4] x) => (float[2,4] y)"
        "{ q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z) }"
    )
    with pytest.raises(UnsupportedError, match="with zero points of run time"):
        for_tensorrt(graph(body))
