"""Whole networks through build and Session: integers to the step, floats within a derived bound."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn, relu

from tests.compiler.engines import (
    built_and_run,
    fused,
    random_inputs,
    reference,
    run_twice,
    steps,
)
from tests.graphs import graph
from tests.kernels.harness import targets
from tests.networks import CIFAR, export, images
from twofour.compiler.build import build
from twofour.core.masks import magnitude_mask
from twofour.core.numerics import Window, convolve
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

RANDOM = np.random.default_rng(0)
EPS = float(np.finfo(np.float32).eps)


def assert_same_integers(got: np.ndarray, want: np.ndarray, share: float = 0.001) -> None:
    """Equal; a value may be one step off where ONNX Runtime's float sums fell on another side.

    Args:
        got: int8 or uint8, of the engine.
        want: of the fused graph on ONNX Runtime, which computes it in float32.
        share: of values that may be off.
    """
    off = np.abs(got.astype(int) - want.astype(int))
    assert off.max(initial=0) <= 1
    assert (off > 0).mean() <= share


def with_features(model: ir.Model) -> ir.Model:
    """The model with the last quantized activation as another output."""
    model = model.clone()
    read = [node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    model.graph.outputs.append([v for v in read if v is not None and not v.is_initializer()][-1])
    return model


@pytest.fixture(scope="module")
def network():
    """MaxPool stem, blocks with identity and projection shortcuts, dilation and groups."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 7, 2, 3)
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
            self.conv3, self.conv4 = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 2, 2)
            self.down = nn.Conv2d(16, 32, 1, 2)
            self.grouped = nn.Conv2d(32, 36, 3, 1, 1, groups=4)
            self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(36, 10)

        def forward(self, x):
            x = self.pool(relu(self.stem(x)))
            x = relu(self.conv2(relu(self.conv1(x))) + x)
            x = relu(self.conv4(relu(self.conv3(x))) + self.down(x))
            x = relu(self.grouped(x))
            return self.fc(self.mean(x).flatten(1))

    return export(Network().eval(), False)


FORMS = [("int8", "shortcut"), ("int8", "both"), ("uint8", "shortcut"), ("uint8", "both")]


@pytest.mark.parametrize(("activation", "add_inputs"), FORMS)
def test_quantized_residual_network(network, activation, add_inputs, timing_cache) -> None:
    options = QuantizeOptions(method="minmax", activation=activation, add_inputs=add_inputs)
    model = with_features(quantize(network, images(), options))
    inputs = images(1, seed=7)[0]
    engine = build(model, sparsity="disable", timing_cache=timing_cache)
    (only,) = steps(engine)
    assert only[0] == "native"
    assert {"QMaxPool", "QConvAddRelu" if add_inputs == "shortcut" else "QAddRelu"} <= set(only[1])
    got, want = run_twice(engine, inputs), reference(fused(model), inputs)
    logits, features = (value.name or "" for value in model.graph.outputs)
    assert got[features].dtype.name == activation
    assert_same_integers(got[features], want[features])
    # The product of the last layer: K sums in another order, one rounding an operation.
    assert np.allclose(got[logits], want[logits], atol=40 * EPS * np.abs(want[logits]).max())
    # And the same answer as the file itself, which ONNX Runtime reads as floats between Q and DQ.
    plain = reference(model, inputs)[logits]
    assert np.abs(got[logits] - plain).max() <= 0.02 * np.abs(plain).max()


def test_a_batch_is_its_images(network, timing_cache) -> None:
    model = quantize(network, images(), QuantizeOptions(method="minmax"))
    options = {"sparsity": "disable", "timing_cache": timing_cache}
    four = build(model, shapes={"x": (4, *CIFAR)}, **options)
    assert four.plan.inputs[0].shape == (4, *CIFAR)
    x = np.concatenate([batch["x"] for batch in images(4, seed=3)])
    together = run_twice(four, {"x": x})["y"]
    with Session(build(model, **options)) as session:
        alone = [session.run({"x": x[i : i + 1]})["y"] for i in range(4)]
    assert (together == np.concatenate(alone)).all()


def test_all_targets_and_thread_counts_give_the_same_bytes(network, timing_cache) -> None:
    model = quantize(network, images(), QuantizeOptions(method="minmax", activation="uint8"))
    model, inputs = with_features(model), images(1, seed=5)[0]
    results = []
    for target in targets():
        options = {"sparsity": "disable", "timing_cache": timing_cache}
        engine = build(model, target=target, **options)
        results += [run_twice(engine, inputs, threads) for threads in (1, 3)]
    for other in results[1:]:
        for name, value in results[0].items():
            assert (value == other[name]).all(), name


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "2:4/2d"])
def test_sparse_and_dense_kernels_give_the_same_bytes(pattern, timing_cache) -> None:
    w = RANDOM.normal(size=(32, 32, 3, 3)).astype(np.float32)
    w = np.where(magnitude_mask(w, pattern), w, np.float32(0))
    scale = (np.abs(w).max((1, 2, 3)) / 127).astype(np.float32)
    model = graph(
        "(int8[1,32,8,8] x) => (int8[1,32,8,8] y) <float s = {0.05}, int8 z = {0}>"
        "{ f = DequantizeLinear (x, s, z) w = DequantizeLinear <axis = 0> (k, ks)"
        " c = Conv <pads = [1,1,1,1]> (f, w) y = QuantizeLinear (c, s, z) }",
        k=np.rint(w / scale[:, None, None, None]).astype(np.int8),
        ks=scale,
    )
    inputs = random_inputs(model)
    want = built_and_run(model, inputs, sparsity="disable")["y"]
    assert_same_integers(want, reference(model, inputs)["y"])
    for sparsity in ("enable", "force"):
        engine = build(model, sparsity=sparsity, timing_cache=timing_cache)
        assert (run_twice(engine, inputs)["y"] == want).all()
        (layer,) = [layer for layer in engine.plan.layers if layer.op == "QConv"]
        assert layer.pattern == pattern.removesuffix("/2d"), "to kernels a 2-D weight is 2:4"
        assert sparsity == "enable" or layer.tactic.startswith("2:4")


@pytest.mark.parametrize("c", [4, 12, 20, 32])
def test_sparse_floats_read_nothing_beyond_a_pixel(c, timing_cache) -> None:
    """A step of the kernel takes 16 inputs; beyond the end of a pixel the bytes are garbage."""
    w = RANDOM.normal(size=(16, c, 1, 1)).astype(np.float32)
    w = np.where(magnitude_mask(w, "2:4"), w, np.float32(0))
    out = RANDOM.normal(size=(16, 16, 3, 3)).astype(np.float32)
    body = (
        f"(float[2,{c},5,5] x) => (float[2,16,5,5] y)"
        "{ a = Conv (x, w) y = Conv <pads = [1,1,1,1]> (a, k) }"
    )
    model = graph(body, w=w, k=out)
    inputs = random_inputs(model)
    got = built_and_run(model, inputs, sparsity="force", timing_cache=timing_cache)["y"]
    assert np.isfinite(got).all()


def test_floats_within_the_bound_of_their_sums(timing_cache) -> None:
    """Each layer adds (K + 4) eps sum |a||w| to the error that came in, times sum |w|."""
    sizes = [(24, 3, 3), (24, 24, 3), (24, 24, 3), (10, 24, 1)]
    ws = [(RANDOM.normal(size=(n, c, k, k)) / (c * k * k)).astype(np.float32) for n, c, k in sizes]
    model = graph(
        "(float[2,3,9,7] x) => (float[2,10,9,7] y) { a = Conv <pads = [1,1,1,1]> (x, w0)"
        " b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, w1) d = Relu (c)"
        " e = Conv <pads = [1,1,1,1]> (d, w2) f = Add (e, b) g = Relu (f) y = Conv (g, w3) }",
        **{f"w{i}": w for i, w in enumerate(ws)},
    )
    inputs = random_inputs(model)
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]

    def layer(state, w):
        """Exact values and the bound of the error, both float64 [N, H, W, C]."""
        value, error = state
        window = Window(w.shape[2:], pads=(w.shape[2] // 2,) * 4)
        exact, size, grown = (
            convolve(v.astype(np.float32), u, window)
            for v, u in ((value, w), (np.abs(value), np.abs(w)), (error * 2.0**60, np.abs(w)))
        )
        return exact, grown / 2.0**60 + (w[0].size + 4) * EPS * (size + np.abs(exact))

    x = inputs["x"].transpose(0, 2, 3, 1).astype(np.float64)
    first = layer((x, np.zeros_like(x)), ws[0])
    first = np.maximum(first[0], 0), first[1]
    second = layer(first, ws[1])
    third = layer((np.maximum(second[0], 0), second[1]), ws[2])
    summed = np.maximum(third[0] + first[0], 0), third[1] + first[1]
    exact, bound = layer(summed, ws[3])
    # The reference rounds between layers too, hence twice.
    assert (np.abs(got.transpose(0, 2, 3, 1) - exact) <= 2 * bound).all()


SHAPES = {
    "one Conv": "(float[1,16,6,6] x) => (float[1,16,6,6] y) { y = Conv (x, k) }",
    "one product": "(float[3,16] x) => (float[3,16] y) { y = MatMul (x, m) }",
    "rows of rows": "(float[2,3,16] x) => (float[2,3,16] y) { a = MatMul (x, m) y = Add (a, x) }",
    "input read twice": "(float[1,16,6,6] x) => (float[1,16,6,6] y)"
    "{ a = Conv (x, k) b = Conv <pads = [1,1,1,1]> (x, l) y = Add (a, b) }",
    "own input as residual": "(float[1,16,6,6] x) => (float[1,16,6,6] y)"
    "{ a = Conv <pads = [1,1,1,1]> (x, l) b = Add (a, x) r = Relu (b)"
    " c = Conv <pads = [1,1,1,1]> (r, l) d = Add (c, r) y = Relu (d) }",
    "two inputs": "(float[1,16,6,6] x, float[1,16,6,6] z) => (float[1,16,6,6] y)"
    "{ a = Conv (x, k) b = Conv (z, k) c = Add (a, b) d = Relu (c) e = Add (d, z)"
    " y = Conv (e, k) }",
    "outputs read inside": "(float[1,16,6,6] x) =>"
    " (float[1,16,6,6] a, float[1,16,6,6] b, float[1,16] y)"
    "{ a = Conv <pads = [1,1,1,1]> (x, l) b = Conv <pads = [1,1,1,1]> (a, l)"
    " g = GlobalAveragePool (b) h = Flatten (g) y = MatMul (h, m) }",
    "same output twice": "(float[1,16,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] z)"
    "{ y = Conv (x, k) z = Identity (y) }",
    "halos of many widths": "(float[1,16,6,6] x) => (float[1,16,6,6] y)"
    "{ a = Conv (x, k) b = Conv <pads = [2,2,2,2], dilations = [2,2]> (a, l)"
    " c = Conv <pads = [1,1,1,1]> (a, l) d = Conv (a, k) e = Add (b, c) f = Add (e, d)"
    " y = Conv <pads = [1,1,1,1]> (f, l) }",
    "uneven padding and stride": "(float[1,16,9,7] x) => (float[1,16,4,4] y)"
    "{ a = Conv (x, k) y = Conv <pads = [0,2,0,1], strides = [2,2]> (a, l) }",
    "padding by name": "(float[1,16,9,7] x) => (float[1,16,5,4] y)"
    '{ y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, l) }',
    "maximum and sum": "(float[1,16,6,6] x) => (float[1,16,3,3] y) { a = Conv (x, k)"
    " b = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (a)"
    " c = Conv (b, k) d = Relu (b) e = Add (c, d) f = Relu (e) y = Add (f, f) }",
    "slice and pad": "(float[1,8,6,6] x) => (float[1,16,3,3] y) <int64[2] from = {0,0},"
    " int64[2] to = {6,6}, int64[2] axes = {2,3}, int64[2] by = {2,2},"
    " int64[8] pads = {0,4,0,0,0,4,0,0}>"
    "{ s = Slice (x, from, to, axes, by) p = Pad (s, pads) q = Relu (p)"
    " c = Conv (q, k) y = Add (c, p) }",
}
BOUND = 1e-4  # sums of 144 weights of size 1 through up to four layers, relative to the largest


@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES)
def test_graphs_of_every_shape(body, timing_cache) -> None:
    named = {"k": (16, 16, 1, 1), "l": (16, 16, 3, 3), "m": (16, 16)}
    weights = {name: RANDOM.normal(size=size).astype(np.float32) for name, size in named.items()}
    model = graph(body, **{name: w for name, w in weights.items() if f", {name})" in body})
    inputs = random_inputs(model)
    want = reference(model, inputs)
    got = built_and_run(model, inputs, timing_cache=timing_cache)
    for name, value in want.items():
        assert np.abs(got[name] - value).max() <= BOUND * np.abs(value).max(), name


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_integers_in_and_out(kind, timing_cache) -> None:
    """No floats at either end; the output is also read inside."""
    model = graph(
        f"({kind}[2,8,5,5] x) => ({kind}[2,16,5,5] q, {kind}[2,16] y)"
        f"<float s = {{0.04}}, {kind} z = {{3}}, float t = {{0.1}}, {kind} u = {{100}}>"
        "{ f = DequantizeLinear (x, s, z) w = DequantizeLinear <axis = 0> (k, ks)"
        " c = Conv <pads = [1,1,1,1]> (f, w) q = QuantizeLinear (c, t, u)"
        " d = DequantizeLinear (q, t, u) g = GlobalAveragePool (d) p = QuantizeLinear (g, t, u)"
        " e = DequantizeLinear (p, t, u) h = Flatten (e) m = DequantizeLinear <axis = 1> (l, ls)"
        " o = MatMul (h, m) y = QuantizeLinear (o, t, u) }",
        k=RANDOM.integers(-127, 128, (16, 8, 3, 3)).astype(np.int8),
        ks=np.linspace(0.001, 0.003, 16).astype(np.float32),
        l=RANDOM.integers(-127, 128, (16, 16)).astype(np.int8),
        ls=np.linspace(0.001, 0.003, 16).astype(np.float32),
    )
    inputs = random_inputs(model)
    engine = build(model, timing_cache=timing_cache)
    assert [kind for kind, _ in steps(engine)] == ["native"]
    got, want = run_twice(engine, inputs), reference(fused(model), inputs)
    for name, value in want.items():
        assert got[name].dtype == value.dtype == np.dtype(kind)
        assert_same_integers(got[name], value, share=0.002)


def test_nan_is_kept_as_onnxruntime_keeps_it(timing_cache) -> None:
    model = graph(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y) { a = Conv (x, k) b = Relu (a) y = Relu (b) }",
        k=RANDOM.normal(size=(16, 16, 1, 1)).astype(np.float32),
    )
    inputs = random_inputs(model)
    inputs["x"][0, 3, 2, 2], inputs["x"][0, 5, 4, 4] = np.nan, np.inf
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    want = reference(model, inputs)["y"]
    assert np.isnan(want).any()
    assert (np.isnan(got) == np.isnan(want)).all()
