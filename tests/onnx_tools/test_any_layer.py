"""Layers of every kind: quantized, pruned and built, or left as they are, with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import graph
from tests.onnx_tools.any_file import (
    RANDOM,
    SQUARE,
    check_int8,
    check_pruned,
    error,
    feeds_of,
    floats,
    on_ort,
    proto,
    quick,
    run,
)
from tests.onnx_tools.networks import weights
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.eligible import NothingToQuantizeError, float_layers
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.weights import layer_weights


def test_recurrent_layers_stay_float():
    body = """(float[5,1,8] x) => (float[5,1,8] y) <int64[1] a = {1}> {
        l = LSTM <hidden_size = 8> (x, i, r)
        s = Squeeze (l, a)
        g = GRU <hidden_size = 8> (s, j, k)
        t = Squeeze (g, a)
        y = MatMul (t, w)
    }"""
    shapes = {"i": (1, 32, 8), "r": (1, 32, 8), "j": (1, 24, 8), "k": (1, 24, 8)}
    model = graph(body, opset=17, w=SQUARE["w"], **weights(**shapes))
    data = {"x": floats(4, 5, 1, 8)}
    reasons = {layer.op: layer.reason for layer in float_layers(check_int8(model, data))}
    assert reasons == {"LSTM": "LSTM is not quantized", "GRU": "GRU is not quantized"}
    check_pruned(model, data)


SHAPES = {
    "1-D convolution": ("(float[n,8,9] x) => (float[n,8,9] y) "
                        "{ c = Conv <pads = [1, 1]> (x, w) y = Relu (c) }", (8, 8, 3), (8, 9)),
    "3-D convolution": ("(float[n,8,4,4,4] x) => (float[n,8,2,2,2] y) { y = Conv (x, w) }",
                        (8, 8, 3, 3, 3), (8, 4, 4, 4)),
    "scaled Gemm": ("(float[n,8] x) => (float[n,8] y) "
                    "{ c = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) y = Relu (c) }",
                    (8, 8), (8,)),
    "matrix first": ("(float[n,8] x) => (float[n,8] y) { y = Gemm (x, w) }", (8, 8), (8,)),
    "3-D product": ("(float[n,5,8] x) => (float[n,5,6] y) { y = MatMul (x, w) }", (8, 6), (5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_layers_of_every_shape(case):
    body, shape, sample = SHAPES[case]
    arrays = {"w": weights(w=shape)["w"], "b": floats(8)}
    model = graph(body, opset=17, **{name: arrays[name] for name in "wb" if f", {name}" in body})
    data = {"x": floats(8, *sample)}
    assert float_layers(check_int8(model, data)) == ()
    assert check_pruned(model, data) == []


LEFT = {
    "(float[8,n] x) => (float[n,6] y) { y = Gemm <transA = 1> (x, w) }":
        ("transposed", (8, 6), (8, 1)),
    "(float[n,2,3,8] x) => (float[n,2,3,6] y) { y = MatMul (x, w) }":
        ("3 dimensions", (2, 8, 6), (2, 3, 8)),
    "(float[n,8] x) => (float[n] y) { y = MatMul (x, w) }": ("1 dimensions", (8,), (8,)),
    "(float[n,8,4,4] x) => (float[n,8,6,6] y) { y = ConvTranspose (x, w) }":
        ("ConvTranspose is not", (8, 8, 3, 3), (8, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("body", LEFT)
def test_layers_that_are_left_beside_one_that_is_not(body):
    reason, shape, sample = LEFT[body]
    head, _, tail = body.partition("{ y =")
    body = f"{head} {{ z = {tail.removesuffix('}')} y = Mul (z, g) }}"
    model = graph(body, opset=17, w=weights(w=shape)["w"], g=np.array(1.0, np.float32))
    alone = {"x": floats(8, *sample)}
    with pytest.raises(NothingToQuantizeError, match=reason):
        quantize(model, alone)
    (note,) = quick(model, alone, int8=True, data=alone).plan.notes
    assert reason in note
    feeds = feeds_of(model, alone)
    shapes = {"x": feeds[0]["x"].shape}
    pruned, _ = prune(import_graph(model, shapes))
    forced = run(quick(model, alone, sparsity="force"), feeds)
    assert error(on_ort(pruned, feeds)[0], forced[0]) < 1e-4


def test_a_constant_on_the_left_is_no_weight():
    body = """(float[n,6,8] x) => (float[n,4,8] y) {
        a = MatMul (x, w)
        y = MatMul (k, a)
    }"""
    model = graph(body, opset=17, w=SQUARE["w"], k=floats(4, 6))
    data = {"x": floats(8, 6, 8)}
    check_int8(model, data)
    check_pruned(model, data)


def test_constants_on_both_sides_are_folded():
    body = """(float[n,8] x) => (float[n,8] y) {
        k = MatMul (w, v)
        y = MatMul (x, k)
    }"""
    model = graph(body, opset=17, **SQUARE)
    data = {"x": floats(8, 8)}
    check_int8(model, data)
    assert check_pruned(model, data) == []


def test_a_weight_that_many_read():
    body = """(float[n,8] x, int64[n] id) => (float[n,8] y, float[8,8] w) {
        e = Gather (w, id)
        s = Add (x, e)
        a = Gemm <transB = 1> (s, w)
        b = MatMul (a, w)
        y = Gemm <transB = 1> (b, w)
    }"""
    model = graph(body, opset=17, w=SQUARE["w"])
    data = {"x": floats(8, 8), "id": RANDOM.integers(0, 8, 8)}
    quantized = check_int8(model, data)
    assert np.array_equal(quantized.graph.initializers["w"].const_value.numpy(), SQUARE["w"])
    check_pruned(model, data)
    pruned, report = prune(model)
    w = pruned.graph.initializers["w"].const_value.numpy()
    assert is_pattern(w, "2:4")
    assert is_pattern(w.T, "2:4")
    assert [entry.reason for entry in report] == ["", "", "already 2:4"]


def test_half_precision_is_built_as_it_is():
    body = "(float16[n,8] x) => (float16[n,8] y) { y = Gemm <transB = 1> (x, w) }"
    model = graph(body, opset=17, w=SQUARE["w"].astype(np.float16))
    data = {"x": floats(8, 8).astype(np.float16)}
    with pytest.raises(NothingToQuantizeError, match="1 Gemm: its weight is float16"):
        quantize(model, data)
    engine = quick(model, data, int8=True, data=data)
    assert "its weight is float16" in engine.plan.notes[0]
    feeds = feeds_of(model, data)
    assert error(on_ort(model, feeds)[0], run(engine, feeds)[0]) < 1e-2


STORED = {
    "one a channel": ("DequantizeLinear <axis = 0> (w, s)", np.int8, (8,)),
    "one for all": ("DequantizeLinear (w, s)", np.int8, ()),
    "with a zero point": ("DequantizeLinear <axis = 0> (w, s, p)", np.uint8, (8,)),
}


@pytest.mark.parametrize("case", STORED)
def test_weights_stored_as_integers_count_as_float(case):
    dequantize, dtype, sizes = STORED[case]
    point = 100 if dtype is np.uint8 else 0
    arrays = {
        "w": np.clip(SQUARE["w"] * 60 + point, 0 if point else -128, 255 if point else 127),
        "s": np.full(sizes, 1 / 60, np.float32),
        "p": np.full(sizes, point, dtype),
    }
    arrays["w"] = arrays["w"].astype(dtype)
    body = f"(float[n,8] x) => (float[n,8] y) {{ d = {dequantize} y = Gemm <transB = 1> (x, d) }}"
    model = graph(body, opset=17, **arrays)
    data = {"x": floats(8, 8)}
    check_int8(model, data)
    pruned, report = prune(model)
    assert [entry.reason for entry in report] == [""]
    ((_, weight),) = layer_weights(pruned)
    assert is_pattern(weight.values, "2:4")
    assert weight.stored.dtype == dtype
    kept = weight.stored != point
    assert np.array_equal(weight.stored[kept], arrays["w"][kept])
    check_pruned(model, data)


def test_float_weights_between_quantized_tensors_stay_exact_on_onnx_runtime():
    """Its optimizer would round them: one scale for all channels, however different these are."""
    body = """agraph (float[n,8] x, bool[n] c) => (float[m,8] y) <float s = {0.05}, int8 z = {0}> {
        p = Compress <axis = 0> (x, c)
        q = QuantizeLinear (p, s, z)
        d = DequantizeLinear (q, s, z)
        g = Gemm <transB = 1> (d, w, b)
        r = QuantizeLinear (g, s, z)
        y = DequantizeLinear (r, s, z)
    }"""
    w = SQUARE["w"] * np.float32(10.0) ** -np.arange(8, dtype=np.float32)[:, None]
    model = proto(body, w=w, b=floats(8))
    feeds = [{"x": floats(4, 8), "c": np.array([True, False, True, True])}]
    engine = build(model, shapes={"x": (4, 8), "c": (4,)}, tuning_effort=0)
    assert any(layer.tactic == "onnxruntime" and layer.op == "Gemm" for layer in engine.plan.layers)
    assert error(on_ort(model, feeds)[0], run(engine, feeds)[0]) < 1e-6
