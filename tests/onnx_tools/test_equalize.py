"""Steps on the float model: the function stays, int8 loses less, and masks keep their zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.test_rescale import attention
from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.ranges import RangeOptions
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.equalize import equalize
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.promises import require_kept
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize, quantize_with_report
from twofour.onnx_tools.smooth import smooth
from twofour.onnx_tools.watch import ROWS, Watched, watch

RANDOM = np.random.default_rng(0)
RANGES = RangeOptions("minmax")


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def samples(x: np.ndarray) -> Samples:
    return Samples(as_data({"x": x}, ["x"]), None, 1)


MOBILE = """(float[n,8,6,6] x) => (float[n,4,6,6] y)
{
    a = Conv (x, w1, b1)
    r = Relu (a)
    d = Conv <group = 16, pads = [1, 1, 1, 1]> (r, w2)
    s = Relu (d)
    p = Conv (s, w3)
    t = Conv (p, w4)
    q = Add (t, p)
    y = Conv (q, w5)
}"""


@pytest.fixture
def mobile() -> ir.Model:
    """Depthwise in between, as in MobileNet, and channels of very different sizes."""
    sizes = np.exp(RANDOM.uniform(-4, 4, 16)).astype(np.float32)
    w1, w2, w3 = normal(16, 8, 1, 1), normal(16, 1, 3, 3), normal(8, 16, 1, 1)
    w1 *= sizes[:, None, None, None]
    w2 /= sizes[::-1, None, None, None]
    w3 /= (sizes / sizes[::-1])[None, :, None, None]
    return graph(
        MOBILE, w1=w1, b1=normal(16), w2=w2, w3=w3, w4=normal(8, 8, 1, 1), w5=normal(4, 8, 1, 1)
    )


def loss(model: ir.Model, quantized: ir.Model, x: np.ndarray) -> float:
    one, other = (run(each, {"x": x})[0] for each in (model, quantized))
    return float(np.square(one - other).sum() / np.square(one).sum())


def test_convolutions_are_equalized_and_int8_loses_less(mobile: ir.Model) -> None:
    x, model = normal(64, 8, 6, 6), prepare(mobile)
    done = equalize(model, samples(x), RANGES)
    assert [each.layers for each in done] == [("d",), ("p",), ("t", "y")]
    assert all(each.alpha is not None and each.after < each.before / 3 for each in done[:2])
    for a, b in zip(run(mobile, {"x": x}), run(model, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())
    plain = QuantizeOptions(method="minmax")
    before, after = (loss(mobile, quantize(each, {"x": x}, plain), x) for each in (mobile, model))
    assert after < before / 10


def test_steps_are_taken_by_name_and_reported(mobile: ir.Model) -> None:
    x = normal(32, 8, 6, 6)
    every = QuantizeOptions(method="minmax", steps=("equalize", "smooth", "bias"))
    made = quantize_with_report(mobile, {"x": x}, every)
    assert [(step.name, step.changed) for step in made.steps][1:] == [("smooth", 0), ("bias", 5)]
    assert made.steps[0].changed >= 2
    assert loss(mobile, made.model, x) < loss(mobile, quantize(mobile, {"x": x}), x) / 10


def test_what_no_factor_passes_is_named(mobile: ir.Model) -> None:
    model = graph(
        """(float[n,4] x) => (float[n,4] y) { h = Gemm (x, w) s = Sigmoid (h) z = Gemm (h, v)
        y = Mul (z, s) }""",
        w=normal(4, 4), v=normal(4, 4),
    )  # fmt: skip
    (left,) = equalize(model, samples(normal(8, 4)), RANGES)
    assert (left.alpha, left.reason) == (None, "Sigmoid 's' reads it")


def test_masks_and_promises_survive(mobile: ir.Model) -> None:
    sparse, _ = prune(mobile)
    x = normal(32, 8, 6, 6)
    every = QuantizeOptions(steps=("equalize", "smooth", "bias"))
    made = quantize_with_report(sparse, {"x": x}, every)
    assert made.steps[0].changed
    require_kept(made.model)
    w3 = made.model.graph.initializers["w3_quantized"].const_value.numpy()
    assert is_pattern(w3, "2:4")
    assert (w3 != 0).any()


def outliers() -> ir.Model:
    model = attention()
    for name in ("gamma", "gamma2"):
        value = model.graph.initializers[name]
        gamma = value.const_value.numpy().copy()
        gamma[[2, 7]] *= 50
        value.const_value = ir.tensor(gamma, name=name)
    return model


def test_normalizations_are_smoothed() -> None:
    model, x = outliers(), normal(2, 5, 16)
    smoothed = prepare(model)
    done = smooth(smoothed, samples(x), RANGES)
    assert [each.layers for each in done] == [("q0", "k0", "v0"), ("w",), ("y",)]
    assert all(each.after < each.before / 3 for each in (done[0], done[2]))
    assert len(smoothed.graph) == len(prepare(model).graph)
    for a, b in zip(run(model, {"x": x}), run(smoothed, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_smoothed_networks_lose_less() -> None:
    """Most do: in a softmax of so large scores the least error may turn a tie round."""
    losses = []
    for _ in range(30):
        model, x = outliers(), normal(2, 5, 16)
        smoothed = prepare(model)
        smooth(smoothed, samples(x), RANGES)
        losses.append([loss(model, quantize(each, {"x": x}), x) for each in (model, smoothed)])
    before, after = np.transpose(losses)
    assert (after < before).mean() > 2 / 3
    assert np.median(after) < np.median(before)


POST = """(float[n,5,16] x) => (float[n,5,16] y)
{
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    a = MatMul (n, w)
    r = Add (n, a)
    z = LayerNormalization <axis = -1> (r, gamma2, beta2)
    y = MatMul (z, v)
}"""
SMALL = """(float[n,5,16] x) => (float[n,5,16] y)
{
    m = Mul (gamma, x)
    n = Add (m, beta)
    a = MatMul (n, w)
    y = Add (n, a)
}"""


@pytest.mark.parametrize(("body", "more"), [(POST, 1), (SMALL, 2)])
@pytest.mark.parametrize("size", [50, 1])
def test_a_residual_reads_the_first_normalization_layers_a_copy(
    body: str, more: int, size: float
) -> None:
    gamma = np.ones(16, np.float32)
    gamma[[2, 7]] = size
    weights = {"w": normal(16, 16), "gamma": gamma, "beta": normal(16) / 9}
    if body is POST:
        weights |= {"v": normal(16, 16), "gamma2": gamma, "beta2": normal(16)}
    model, x = graph(body, **weights), RANDOM.uniform(-1, 1, (40, 5, 16)).astype(np.float32)
    x /= np.abs(x).max(axis=(0, 1))  # channels of equal ranges
    smoothed = prepare(model)
    before = len(smoothed.graph)
    smooth(smoothed, samples(x), RANGES)
    if size > 1:
        assert len(smoothed.graph) == before + more
        names = {value.name for node in smoothed.graph for value in node.outputs}
        assert "n_smooth" in names
    for a, b in zip(run(model, {"x": x}), run(smoothed, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_a_copy_without_factors_is_taken_back() -> None:
    """All columns of w are as large as each other, and so are all channels: nothing to gain."""
    signs = np.sign(normal(16, 16))
    model = graph(SMALL, w=signs,
                  gamma=np.ones(16, np.float32), beta=np.zeros(16, np.float32))  # fmt: skip
    x = np.broadcast_to(normal(40, 5, 1), (40, 5, 16)).copy()
    smoothed = prepare(model)
    done = smooth(smoothed, samples(x), RANGES)
    assert [each.reason for each in done] == ["no factors do clearly better"]
    assert [node.name for node in smoothed.graph] == [node.name for node in prepare(model).graph]


def test_rows_are_the_same_however_samples_come_and_bounded() -> None:
    x = normal(50_000, 3)
    whole, parts = Watched(np.zeros(3)), Watched(np.zeros(3))
    whole.add(x)
    for part in np.split(x, [0, 1, 8, 701, 702, 30_000]):
        parts.add(part)
    assert (whole.rows == parts.rows).all()
    assert ROWS <= len(whole.rows) < 3 * ROWS
    assert (whole.peak == np.abs(x).max(axis=0)).all()
    assert (parts.peak == whole.peak).all()


def test_of_thousands_of_samples_batches_are_left_out_evenly(mobile: ir.Model) -> None:
    said: list[int] = []
    x = normal(2048, 8, 6, 6)
    x[:: 4 * 64] = 100  # the first sample of each fourth batch of 64
    given = as_data([{"x": part} for part in np.split(x, 32)], ["x"])
    model = prepare(mobile)
    seen = watch(model, [("x", 1)], Samples(given), lambda done, *_: said.append(done))
    assert said == [4 * 64 * i + 64 for i in range(8)]
    assert (seen["x", 1].peak == 100).all()


@pytest.mark.parametrize("step", ["equalize", "smooth", "bias"])
def test_steps_refuse_samples_that_come_once(mobile: ir.Model, step: str) -> None:
    once = iter([{"x": normal(4, 8, 6, 6)}])
    with pytest.raises(InputError, match=f"(?s)'{step}'.*generator|iterator"):
        quantize(mobile, once, QuantizeOptions(steps=(step,)))


def test_samples_that_are_not_finite_are_refused(mobile: ir.Model) -> None:
    huge = np.full((2, 8, 6, 6), 3e38, np.float32)
    with pytest.raises(InputError, match="not finite"):
        equalize(prepare(mobile), samples(huge), RANGES)


REAL = ("fastestdet", "ultraface_slim_320", "mlperftiny_resnet8")


@pytest.mark.parametrize("name", REAL)
def test_real_networks_keep_their_function(data_folder: Path, name: str) -> None:
    model = load_model(data_folder / "onnx" / f"{name}.onnx")
    changed = prepare(model)
    (given,) = model.graph.inputs
    x = abs(normal(*[dim if isinstance(dim, int) else 1 for dim in given.shape]))
    data = as_data({given.name: np.concatenate([x, x / 2])}, [given.name])
    done = equalize(changed, Samples(data, None, 1), RANGES)
    assert any(each.alpha is not None for each in done)
    for a, b in zip(run(model, {given.name: x}), run(changed, {given.name: x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_biases_of_tokens_stay() -> None:
    made = quantize_with_report(
        attention(), {"x": normal(2, 5, 16)}, QuantizeOptions(steps=("bias",))
    )
    (step,) = made.steps
    assert step.changed == 0
    assert step.notes == ("left MatMul: of layers, only Conv, Gemm was asked for (5 times)",)
