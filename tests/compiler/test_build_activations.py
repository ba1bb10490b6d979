"""Networks with other activations than ReLU: quantized, built, without a float between layers."""

from __future__ import annotations

import numpy as np
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

SEVERAL = {
    "relu6": (nn.ReLU6, "Clip"),
    "hard_swish": (nn.Hardswish, "HardSwish"),
    "silu": (nn.SiLU, "Silu"),
    "gelu": (nn.GELU, "Gelu"),
    "gelu_tanh": (lambda: nn.GELU("tanh"), "GeluTanh"),
    "hard_sigmoid": (nn.Hardsigmoid, "HardSigmoid"),
    "sigmoid": (nn.Sigmoid, "Sigmoid"),
    "tanh": (nn.Tanh, "Tanh"),
}


class Mobile(nn.Module):
    """Blocks that widen, look around and narrow, with a shortcut; then a head of two layers."""

    def __init__(self, activation):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), activation())
        self.block = nn.Sequential(
            *(nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), activation()),
            *(nn.Conv2d(48, 48, 3, 1, 1, groups=3), nn.BatchNorm2d(48), activation()),
            *(nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16)),
        )
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(16, 32), activation(), nn.Linear(32, 10))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(self.mean(x).flatten(1))


@pytest.fixture(scope="module", params=SEVERAL)
def mobile(request):
    """The activation's name in operators, the float file and the quantized one."""
    layer, name = SEVERAL[request.param]
    torch.manual_seed(1)
    model = export(Mobile(layer).eval(), False)
    return name, model, quantize(model, images(), QuantizeOptions(method="minmax"))


def test_a_quantized_network_has_no_float_between_layers(mobile, timing_cache) -> None:
    name, _, model = mobile
    inputs = images(1, seed=7)[0]
    engine = build(model, sparsity="disable", timing_cache=timing_cache)
    (only,) = steps(engine)
    assert only == (
        "native",
        [
            "QuantizeLinear",
            *[f"QConv{name}"] * 3,
            *("QConvAdd", "QGlobalAveragePool", f"QGemm{name}", "QGemmF"),
        ],
    )
    got = run_twice(engine, inputs)["y"]
    want = reference(fused(model), inputs)["y"]
    # A value may be one step off where float sums or the short form of an activation round it
    # the other way.
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()


class Bottleneck(nn.Module):
    """x + activation(conv(x)), as detectors have it, between two convolutions."""

    def __init__(self, activation):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), activation())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), activation())
        self.end = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.end(x + self.block(x)).flatten(1)


@pytest.mark.parametrize("activation", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["silu", "hard_swish"])
def test_a_residual_behind_an_activation_is_part_of_the_convolution(name, activation) -> None:
    """By a table and by real numbers, in float32 and in INT8, zero points that are not 0 too."""
    layer, op = SEVERAL[name]
    torch.manual_seed(2)
    model, inputs = export(Bottleneck(layer).eval(), False), images(1, seed=7)[0]
    engine = build(model, tuning_effort=1, race=False)
    assert f"Conv{op}Add" in steps(engine)[0][1]
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()

    small = quantize(model, images(), QuantizeOptions(method="minmax", activation=activation))
    engine = build(small, tuning_effort=1, race=False)
    kinds = steps(engine)[0][1]
    assert kinds[:4] == ["QuantizeLinear", f"QConv{op}", f"QConv{op}Add", "QConvF"]
    got = run_twice(engine, inputs)["y"]
    want = reference(fused(small), inputs)["y"]
    # A value may be one step off; the last layer adds up 16 of them.
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


def test_a_float_network(mobile, timing_cache) -> None:
    """The activations' own errors, below 2e-6, times what a layer makes of them."""
    name, model, _ = mobile
    inputs = images(1, seed=7)[0]
    engine = build(model, sparsity="disable", timing_cache=timing_cache)
    assert f"Conv{name}" in steps(engine)[0][1]
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-4 * max(1.0, float(np.abs(want).max()))


def test_every_target_gives_the_same_bytes(mobile, timing_cache) -> None:
    _, _, model = mobile
    inputs = images(1, seed=5)[0]
    options = {"sparsity": "disable", "timing_cache": timing_cache}
    first, *others = (
        run_twice(build(model, target=target, **options), inputs)["y"] for target in targets()
    )
    assert all((other == first).all() for other in others)


@pytest.mark.parametrize("shape", ["3,16", "2,3,16", "2,16,4,4"])
@pytest.mark.parametrize(
    ("nodes", "op"),
    [
        ("a = HardSwish (f)", "QActivationHardSwish"),
        ("g = Sigmoid (f) a = Mul (f, g)", "QActivationSilu"),
        ("a = Clip (f, lo, hi)", "QActivationClip"),
        ("a = Tanh (f)", "QActivationTanh"),
    ],
)
def test_between_quantizers_of_any_rank(shape, nodes, op, timing_cache) -> None:
    """Beside a layer: a network without one stays on ONNX Runtime."""
    images_of = shape.count(",") == 3
    layer = "Conv (h, k)" if images_of else "MatMul (h, k)"
    w = (
        np.random.default_rng(2)
        .normal(size=(16, 16, 1, 1) if images_of else (16, 16))
        .astype(np.float32)
    )
    model = graph(
        f"(int8[{shape}] x) => (int8[{shape}] y, float[{shape}] v) <float s = {{0.05}},"
        " int8 z = {-9}, float t = {0.03}, int8 u = {20}, float lo = {-0.7}, float hi = {2.5}>"
        f"{{ f = DequantizeLinear (x, s, z) {nodes} y = QuantizeLinear (a, t, u)"
        f" h = DequantizeLinear (y, t, u) v = {layer} }}",
        k=w,
    )
    x = np.random.default_rng(3).integers(-128, 128, tuple(map(int, shape.split(","))))
    inputs = {"x": x.astype(np.int8)}
    found = steps(build(model, timing_cache=timing_cache))
    assert [kind for kind, _ in found] == ["native"]
    assert op in found[0][1]
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    off = np.abs(got.astype(int) - reference(model, inputs)["y"])
    assert off.max() <= 1
    assert (off > 0).mean() < 0.02


@pytest.mark.parametrize(("layer", "name"), list(SEVERAL.values())[2:5])
def test_two_layers_over_tokens(layer, name, timing_cache) -> None:
    """The middle of a transformer: [batch, tokens, channels], the activation in the product."""
    torch.manual_seed(2)
    middle = nn.Sequential(nn.Linear(24, 64), layer(), nn.Linear(64, 24)).eval()
    random = np.random.default_rng(4)
    batches = [{"x": random.normal(size=(2, 5, 24)).astype(np.float32)} for _ in range(4)]
    model = export(middle, False, dynamic=False, size=(5, 24))
    model = quantize(model, batches, QuantizeOptions(method="minmax"))
    engine = build(model, timing_cache=timing_cache)
    assert steps(engine) == [("native", ["QuantizeLinear", f"QGemm{name}", "QGemmF"])]
    got, want = run_twice(engine, batches[0])["y"], reference(fused(model), batches[0])["y"]
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()
