"""Networks that weigh their channels, and averages over windows: one native step, on bytes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from tests.compiler.engines import built_and_run, fused, reference, run_twice, steps
from tests.graphs import graph
from tests.kernels.harness import targets
from tests.networks import export, images
from twofour.compiler.build import build
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

RANDOM = np.random.default_rng(0)


class Excited(nn.Module):
    """Two blocks: an average over windows, a factor for each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Hardswish())
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 8, 1), nn.ReLU()),
            *(nn.Conv2d(8, 24, 1), nn.Hardsigmoid()),
        )
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.after = nn.Conv2d(24, 10, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.after(self.pool(x * self.gate(x))).mean((2, 3))


@pytest.fixture(scope="module")
def excited() -> tuple[ir.Model, ir.Model]:
    """The float file and the quantized one."""
    torch.manual_seed(1)
    model = export(Excited().eval(), False)
    return model, quantize(model, images(), QuantizeOptions(method="minmax"))


GATE = ["QGlobalAveragePool", "QConvRelu", "QConvHardSigmoidF", "QMulFloat"]


def test_a_quantized_network_is_one_step_of_bytes(excited, timing_cache) -> None:
    _, model = excited
    inputs = images(1, seed=7)[0]
    engine = build(model, timing_cache=timing_cache)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    assert found[:7] == ["QuantizeLinear", "QConvHardSwish", *GATE, "QAveragePool"]
    assert "DequantizeLinear" not in found
    got, want = run_twice(engine, inputs)["y"], reference(fused(model), inputs)["y"]
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()


def test_a_float_network(excited, timing_cache) -> None:
    model, _ = excited
    inputs = images(1, seed=7)[0]
    engine = build(model, timing_cache=timing_cache)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    assert "AveragePool" in found
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-4 * max(1.0, float(np.abs(want).max()))


def test_every_target_gives_the_same_bytes(excited, timing_cache) -> None:
    _, model = excited
    inputs = images(1, seed=5)[0]
    first, *others = (
        run_twice(build(model, target=target, timing_cache=timing_cache), inputs)["y"]
        for target in targets()
    )
    assert all((other == first).all() for other in others)


def quantized_graph(nodes: str, inputs: str, y: str) -> ir.Model:
    """Bytes through some nodes to y, and a layer beside them, without which nothing is native."""
    return graph(
        f"({inputs}) => (int8[{y}] y, float[{y}] v) <float s = {{0.05}}, int8 z = {{3}},"
        " float s2 = {0.02}, uint8 z2 = {70}, float s3 = {0.0613}, int8 z3 = {-9}>"
        f"{{ f = DequantizeLinear (a, s, z) {nodes} y = QuantizeLinear (t, s3, z3)"
        " h = DequantizeLinear (y, s3, z3) v = Conv (h, k) }",
        k=RANDOM.normal(size=(24, 24, 1, 1)).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("b", "op"),
    [
        ("uint8[2,24,1,1]", "QMul"),
        ("uint8[2,24,5,7]", "QMul"),
        ("float[2,24,1,1]", "QMulFloat"),
        ("float[2,24,5,7]", "QMulFloat"),
    ],
)
def test_products_are_those_of_onnx_runtime(b, op, timing_cache) -> None:
    """But for results that lie between two steps: the kernel multiplies where it divides."""
    nodes = "g = DequantizeLinear (b, s2, z2) t = Mul (f, g)" if op == "QMul" else "t = Mul (b, f)"
    model = quantized_graph(nodes, f"int8[2,24,5,7] a, {b} b", "2,24,5,7")
    shape = tuple(map(int, b.split("[")[1][:-1].split(",")))
    values = RANDOM.integers(0, 256, shape).astype(np.uint8)
    other = values if op == "QMul" else (values / 255).astype(np.float32)
    inputs = {"a": RANDOM.integers(-128, 128, (2, 24, 5, 7)).astype(np.int8), "b": other}
    found = steps(build(model, timing_cache=timing_cache))
    assert [kind for kind, _ in found] == ["native"]
    assert op in found[0][1]
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    off = np.abs(got.astype(int) - reference(model, inputs)["y"])
    assert off.max() <= 1
    assert (off > 0).mean() < 0.002


@pytest.mark.parametrize(
    ("attributes", "y"),
    [
        ("kernel_shape = [2, 3]", "2,24,4,5"),
        ("kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]", "2,24,3,4"),
        ("kernel_shape = [3, 2], pads = [2, 0, 1, 1], count_include_pad = 1", "2,24,6,7"),
    ],
)
def test_averages_over_windows(attributes, y, timing_cache) -> None:
    nodes = f"t = AveragePool <{attributes}> (f)"
    model = quantized_graph(nodes, "int8[2,24,5,7] a", y)
    inputs = {"a": RANDOM.integers(-128, 128, (2, 24, 5, 7)).astype(np.int8)}
    found = steps(build(model, timing_cache=timing_cache))
    assert "QAveragePool" in found[0][1]
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    off = np.abs(got.astype(int) - reference(model, inputs)["y"])
    assert off.max() <= 1  # ONNX Runtime rounds each sum
    assert (off > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1", "ceil_mode"),
        ("kernel_shape = [2]", "2-D"),
    ],
)
def test_averages_that_stay_on_onnx_runtime(attributes, reason, timing_cache) -> None:
    one = "kernel_shape = [2]" in attributes
    shape, size = ("1,16,8", (16, 16, 1)) if one else ("1,16,5,5", (16, 16, 1, 1))
    out = "1,16,7" if one else "1,16,3,3"
    model = graph(
        f"(float[{shape}] x) => (float[{out}] y) {{ p = AveragePool <{attributes}> (x)"
        " y = Conv (p, w) }",
        w=RANDOM.normal(size=size).astype(np.float32),
    )
    engine = build(model, timing_cache=timing_cache)
    layers = [layer for layer in engine.plan.layers if layer.op == "AveragePool"]
    assert layers[0].tactic == "onnxruntime"
    assert any(reason in note for note in layers[0].notes)
