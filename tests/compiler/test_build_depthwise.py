"""Networks of depthwise convolutions through build and Session: one native step, right results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from tests.compiler.engines import (
    built_and_run,
    fused,
    random_inputs,
    reference,
    run_twice,
    steps,
)
from tests.compiler.test_build_networks import assert_same_integers, with_features
from tests.graphs import graph
from tests.kernels.harness import targets
from tests.networks import export, images, with_statistics
from twofour.compiler.build import build
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

RANDOM = np.random.default_rng(0)
EPS = float(np.finfo(np.float32).eps)
OPTIONS = {"sparsity": "disable"}


class Inverted(nn.Module):
    """MobileNetV2's block: 1x1 to `wide` channels, depthwise, 1x1 back; a shortcut where it can."""

    def __init__(self, before, wide, after, kernel, stride):
        super().__init__()

        def conv(c, n, k, s=1, groups=1):
            inner = nn.Conv2d(c, n, k, s, k // 2, groups=groups, bias=False)
            return inner, nn.BatchNorm2d(n)

        self.layers = nn.Sequential(
            *conv(before, wide, 1),
            nn.ReLU(),
            *conv(wide, wide, kernel, stride, wide),
            nn.ReLU(),
            *conv(wide, after, 1),
        )
        self.shortcut = stride == 1 and before == after

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.shortcut else y


@pytest.fixture(scope="module")
def network():
    """3x3 and 5x5, stride 1 and 2, channels that fill whole registers and that do not."""
    blocks = [
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        Inverted(16, 20, 16, 3, 1),
        Inverted(16, 64, 24, 3, 2),
        Inverted(24, 144, 24, 3, 1),
        Inverted(24, 96, 40, 5, 2),
        Inverted(40, 72, 40, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    ]
    return export(with_statistics(nn.Sequential(*blocks)), False)


def tactics_of(engine) -> list[str]:
    """The tactics of the depthwise layers."""
    return [x.tactic for x in engine.plan.layers if x.tactic.startswith("depthwise")]


@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_quantized_blocks_are_one_native_step(network, activation, timing_cache) -> None:
    model = with_features(
        quantize(network, images(), QuantizeOptions(method="minmax", activation=activation))
    )
    inputs = images(1, seed=7)[0]
    engine = build(model, timing_cache=timing_cache, **OPTIONS)
    (only,) = steps(engine)
    assert only[0] == "native"
    assert len(tactics_of(engine)) == 5
    got, want = run_twice(engine, inputs), reference(fused(model), inputs)
    logits, features = (value.name or "" for value in model.graph.outputs)
    assert_same_integers(got[features], want[features], share=0.002)
    assert np.allclose(got[logits], want[logits], atol=40 * EPS * np.abs(want[logits]).max())


def test_every_layer_is_what_the_fused_graph_says(network, timing_cache) -> None:
    """All activations in between as outputs."""
    model = quantize(
        network, images(), QuantizeOptions(method="minmax", activation="uint8")
    ).clone()
    values = [node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    inner = [v for v in values if v is not None and not v.is_initializer()]
    model.graph.outputs.extend(dict.fromkeys(v for v in inner if v not in model.graph.outputs))
    inputs = images(1, seed=7)[0]
    got = run_twice(build(model, timing_cache=timing_cache, **OPTIONS), inputs)
    want = reference(fused(model), inputs)
    assert len(got) > 15
    for name, value in got.items():
        if value.dtype == np.uint8:
            assert_same_integers(value, want[name])


def test_all_targets_and_thread_counts_give_the_same_bytes(timing_cache) -> None:
    blocks = nn.Conv2d(3, 16, 3, 2, 1), Inverted(16, 72, 16, 3, 1), Inverted(16, 20, 8, 5, 2)
    network = export(with_statistics(nn.Sequential(*blocks)), False)
    model = with_features(quantize(network, images(), QuantizeOptions(method="minmax")))
    inputs, results = images(1, seed=5)[0], []
    for target in targets():
        engine = build(model, target=target, timing_cache=timing_cache, **OPTIONS)
        results += [run_twice(engine, inputs, threads) for threads in (1, 3)]
    for other in results[1:]:
        for name, value in results[0].items():
            assert (value == other[name]).all(), name


def test_float_blocks_are_one_native_step(network, timing_cache) -> None:
    inputs = images(1, seed=3)[0]
    engine = build(network, timing_cache=timing_cache, **OPTIONS)
    (only,) = steps(engine)
    assert only[0] == "native"
    assert len(tactics_of(engine)) == 5
    got, want = run_twice(engine, inputs)["y"], reference(network, inputs)["y"]
    # 17 layers of up to 216 products each, every one bounded by K eps sum |x w|.
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


CASES = {
    "residual of its own input": "{ a = Conv <group = 24, pads = [1,1,1,1]> (x, w)"
    " b = Add (a, x) y = Relu (b) }",
    "two channels out for each in": "{ a = Conv <group = 24, pads = [1,1,1,1]> (x, m)"
    " y = Conv (a, k) }",
    "dilated, uneven padding": "{ a = Conv <group = 24, pads = [0,3,4,1], dilations = [2,2]>"
    " (x, w) y = Relu (a) }",
    "halo of two convolutions": "{ a = Conv <group = 24, pads = [1,1,1,1]> (x, w)"
    " b = Conv <group = 24, pads = [1,1,1,1]> (a, w)"
    " c = Conv <group = 24, pads = [2,2,2,2], dilations = [2,2]> (a, w) y = Add (b, c) }",
}
SIZES = {"w": (24, 1, 3, 3), "m": (48, 1, 3, 3), "k": (24, 48, 1, 1)}


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_floats_of_every_form(body, timing_cache) -> None:
    weights = {n: RANDOM.normal(size=s).astype(np.float32) for n, s in SIZES.items()}
    weights = {n: v for n, v in weights.items() if f" {n})" in body}
    model = graph(f"(float[2,24,9,7] x) => (float[2,24,9,7] y) {body}", **weights)
    inputs = random_inputs(model)
    want = reference(model, inputs)["y"]
    engine = build(model, timing_cache=timing_cache)
    assert [kind for kind, _ in steps(engine)] == ["native"]
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("add", [False, True])
def test_integers_with_a_residual_and_extreme_zero_points(add, timing_cache) -> None:
    """The padding holds the zero point, at either end of the range."""
    for zero in (-128, 127):
        tail = (
            "s = Add (c, f) y = QuantizeLinear (s, t, z)" if add else "y = QuantizeLinear (c, t, z)"
        )
        model: ir.Model = graph(
            "(int8[1,40,7,7] x) => (int8[1,40,7,7] y)"
            f"<float s0 = {{0.04}}, int8 z = {{{zero}}}, float t = {{0.1}}>"
            "{ f = DequantizeLinear (x, s0, z) w = DequantizeLinear <axis = 0> (k, ks)"
            f" c = Conv <group = 40, pads = [1,1,1,1]> (f, w) {tail} }}",
            k=RANDOM.integers(-128, 128, (40, 1, 3, 3)).astype(np.int8),
            ks=np.linspace(0.001, 0.003, 40).astype(np.float32),
        )
        inputs = random_inputs(model)
        got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
        assert_same_integers(got, reference(fused(model), inputs)["y"], share=0.002)
