"""Corrections after pruning: means and deviations are the dense ones again, in the data's order."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.graphs import graph, run
from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.correct import correct
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.reference import Reference

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def samples(x: np.ndarray, limit: int | None = None) -> Samples:
    return Samples(as_data({"x": x}, ["x"]), limit, 1)


def moments(model: ir.Model, name: str, x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel of a value, for all samples at once."""
    value = Reference(model, [name], 1).run({"x": x}, [name])[name].astype(np.float64)
    flat = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
    return flat.mean(0), flat.std(0, ddof=1)


def constants(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


CHAIN = """(float[n,8,6,6] x) => (float[n,4] y) <int64[2] hw = {2, 3}>
{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1.weight)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1], group = 2> (r1, w2, b2)
    a2 = Add (c2, r1)
    r2 = Relu (a2)
    m = ReduceMean <keepdims = 0> (r2, hw)
    d = MatMul (m, k)
    e = Add (kb, d)
    f = Relu (e)
    g = Gemm <beta = 0.5> (f, t, gb)
    h = Gemm <transB = 1> (f, u)
    y = Add (g, h)
}"""


@pytest.fixture
def chain() -> ir.Model:
    text = CHAIN.replace("w1.weight", "w1")
    return graph(
        text, w1=normal(8, 8, 3, 3) / 8, w2=normal(8, 4, 3, 3) / 6, b2=normal(8), k=normal(8, 8),
        kb=abs(normal(1, 8)) + 1, t=normal(8, 4), gb=normal(1, 4), u=normal(4, 8),
    )  # fmt: skip


OUTPUTS = {"c1": 1, "c2": 1, "e": -1, "g": 1, "h": 1}


@pytest.mark.parametrize("order", [2, 1])
def test_each_output_has_the_moments_of_the_dense_one(chain: ir.Model, order: int) -> None:
    x = normal(50, 8, 6, 6) + 0.5
    pruned, _ = prune(chain)
    before = constants(pruned)
    fixed, report = correct(chain, pruned, samples(x), moments=order)
    kind = {2: "scale and bias", 1: "bias"}[order]
    assert [(r.node, r.done) for r in report] == [(n, kind) for n in ("c1", "c2", "d", "g", "h")]
    for name, axis in OUTPUTS.items():
        mean, deviation = moments(chain, name, x, axis)
        got_mean, got_deviation = moments(fixed, name, x, axis)
        lost_mean, lost_deviation = moments(pruned, name, x, axis)
        # Sums of at most 72 products of float32 numbers: rounding is far below 1e-4 of them.
        np.testing.assert_allclose(got_mean, mean, atol=1e-4 * deviation.max())
        assert np.abs(lost_mean - mean).max() > 0.01
        if order == 2:
            np.testing.assert_allclose(got_deviation, deviation, rtol=1e-3)
            assert np.abs(lost_deviation / deviation - 1).max() > 0.01
    after = constants(fixed)
    for name, axis in (("w1", 0), ("w2", 0), ("k", 1), ("t", 1), ("u", 0)):
        assert ((after[name] == 0) == (before[name] == 0)).all()
        assert is_pattern(np.moveaxis(after[name], axis, 0), "2:4")
    assert constants(pruned).keys() == before.keys(), "the given model stays"
    assert all((constants(pruned)[name] == array).all() for name, array in before.items())
    onnx.checker.check_model(onnx.load_from_string(model_bytes(fixed)), full_check=True)


def test_the_order_is_that_of_the_data_and_earlier_corrections_are_in_place() -> None:
    """By hand: y = relu(x w1) w2, all of it in numpy."""
    x, w1, w2 = normal(64, 8) + 1, normal(8, 8), normal(8, 8)
    dense = graph(
        "(float[n,8] x) => (float[n,8] y) {a = Gemm (x, w1) r = Relu (a) y = Gemm (r, w2)}",
        w1=w1, w2=w2)  # fmt: skip
    pruned, _ = prune(dense)
    p1, p2 = (constants(pruned)[name].astype(np.float64) for name in ("w1", "w2"))
    fixed, _ = correct(dense, pruned, samples(x), moments=1)
    b1 = (x @ w1 - x @ p1).mean(0)
    seen = np.maximum(x @ p1 + b1, 0)
    b2 = (np.maximum(x @ w1, 0) @ w2).mean(0) - (seen @ p2).mean(0)
    found = constants(fixed)
    np.testing.assert_allclose(found["w1_bias"], b1, atol=1e-5)
    np.testing.assert_allclose(found["w2_bias"], b2, atol=1e-4)
    alone = (np.maximum(x @ w1, 0) @ w2).mean(0) - (np.maximum(x @ p1, 0) @ p2).mean(0)
    assert np.abs(alone - b2).max() > 0.01, "without the earlier correction it would differ"


NORMS = """(float[n,8,6,6] x) => (float[n,16] y) <int64[2] hw = {2, 3}>
{
    c = Conv (x, w)
    b = BatchNormalization (c, gamma, beta, mean, variance)
    r = Relu (b)
    m = ReduceMean <keepdims = 0> (r, hw)
    g = Gemm <transB = 1> (m, u)
    y = BatchNormalization (g, gamma2, beta2, mean, variance2)
}"""


def norms() -> ir.Model:
    return graph(
        NORMS, w=normal(16, 8, 3, 3), gamma=normal(16), beta=normal(16), mean=normal(16),
        variance=np.square(normal(16)) + 1, u=normal(16, 16), gamma2=normal(16),
        beta2=normal(16), variance2=np.square(normal(16)) + 1,
    )  # fmt: skip


def test_a_batchnorm_is_measured_again_and_the_layer_before_it_left_alone() -> None:
    dense, x = norms(), normal(70, 8, 6, 6) + 1
    pruned, _ = prune(dense)
    fixed, report = correct(dense, pruned, samples(x))
    assert [(r.node, r.done) for r in report] == [
        ("b", "batchnorm"), ("y", "batchnorm"), ("c", ""), ("g", "")]  # fmt: skip
    assert report[2].reason == "BatchNormalization 'b' follows, which is measured again"
    after, before = constants(fixed), constants(pruned)
    assert all((after[name] == before[name]).all() for name in ("w", "u", "gamma", "beta2"))
    for name, value in (("b", "c"), ("y", "g")):
        node = next(node for node in fixed.graph if node.name == name)
        mean, deviation = moments(fixed, value, x, 1)
        got = [ir.convenience.get_const_tensor(node.inputs[i]).numpy() for i in (3, 4)]
        np.testing.assert_allclose(got[0], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1], deviation**2, rtol=1e-3)
        assert got[0].dtype == np.float32


def test_a_channel_that_is_constant_on_the_samples_is_not_scaled() -> None:
    """What is left reads dead inputs only: its variance is rounding, no measure of anything."""
    weight = np.float32(0.1) * normal(8, 8)
    weight[3] = [1, 1, 0.5, 0.5, 1, 1, 0.5, 0.5]
    x = np.abs(normal(300, 8))
    x[:, [0, 1, 4, 5]] = 0
    dense = graph(
        "(float[n, 8] x) => (float[n, 8] y) { y = Gemm<transB = 1>(x, w, b) }",
        w=weight, b=np.full(8, 0.7, np.float32),
    )  # fmt: skip
    fixed, _ = correct(dense, prune(dense)[0], samples(x))
    assert (constants(fixed)["w"][3] == [1, 1, 0, 0, 1, 1, 0, 0]).all()
    wanted = float((x @ weight[3]).mean()) + 0.7
    np.testing.assert_allclose(constants(fixed)["b"][3], wanted, rtol=1e-5)


def test_only_what_pruning_changed_is_touched(chain: ir.Model) -> None:
    pruned, _ = prune(chain, skip=["c1", "d", "g"])
    fixed, report = correct(chain, pruned, samples(normal(20, 8, 6, 6)))
    assert [r.node for r in report] == ["c2", "h"]
    same = ("w1", "k", "kb", "t", "gb")
    assert all((constants(fixed)[n] == constants(pruned)[n]).all() for n in same)
    assert [n.op_type for n in fixed.graph] == [n.op_type for n in pruned.graph]
    untouched, nothing = correct(chain, chain, samples(normal(20, 8, 6, 6)))
    assert nothing == ()
    assert model_bytes(untouched) == model_bytes(chain)


def test_a_bias_that_others_read_is_copied() -> None:
    dense = graph(
        """(float[n,8] x) => (float[n,8] y, float[8] z)
        {a = Gemm (x, w1, b) c = Gemm (a, w2, b) y = Add (c, b) z = Identity (b)}""",
        w1=normal(8, 8), w2=normal(8, 8), b=normal(8))  # fmt: skip
    pruned, _ = prune(dense)
    fixed, report = correct(dense, pruned, samples(normal(30, 8)))
    assert [r.done for r in report] == ["scale and bias"] * 2
    assert (constants(fixed)["b"] == constants(dense)["b"]).all()
    assert (run(fixed, {"x": normal(3, 8)})[1] == constants(dense)["b"]).all()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{y = MatMul (x, w)}", "no Add of a bias follows"),
        ("{a = MatMul (x, w) y = Add (a, x)}", "what is added to it is no constant"),
        ("{a = MatMul (x, w) b = Add (a, v) y = Mul (a, b)}", "no Add of a bias follows"),
        ("{a = Gemm (x, w) y = Gemm (a, w)}", "others read its weight, too"),
        ("{b = ReduceMean <keepdims = 0> (x, zero) y = Gemm (x, w, b)}", "its bias is computed"),
    ],
)
def test_what_cannot_be_corrected_is_left_with_the_reason(body: str, reason: str) -> None:
    dense = graph(
        f"(float[n,8] x) => (float[n,8] y) {body}",
        w=normal(8, 8), v=normal(8), zero=np.zeros(1, np.int64))  # fmt: skip
    pruned, _ = prune(dense)
    fixed, report = correct(dense, pruned, samples(normal(30, 8)))
    assert report
    assert {(r.done, r.reason) for r in report} == {("", reason)}
    assert (constants(fixed)["w"] == constants(pruned)["w"]).all()


@pytest.mark.parametrize("order", [2, 1])
def test_a_quantized_model_has_the_moments_of_the_float_one(chain: ir.Model, order: int) -> None:
    x = normal(50, 8, 6, 6) + 0.5
    quantized = quantize(chain, {"x": x}, QuantizeOptions(method="percentile", percentile=70))
    fixed, report = correct(chain, quantized, samples(x), moments=order)
    assert [r.node for r in report if r.done] == ["c1", "c2", "d", "g", "h"]
    for name, axis in OUTPUTS.items():
        aim, before, now = (moments(model, name, x, axis) for model in (chain, quantized, fixed))
        assert not np.allclose(before[0], aim[0], atol=1e-2)
        for k in range(order):
            np.testing.assert_allclose(now[k], aim[k], rtol=1e-3, atol=1e-3)
    was, weights = constants(quantized), constants(fixed)
    assert all((weights[n] == was[n]).all() for n in was if was[n].dtype == np.int8)


def test_scales_along_another_axis_are_left(chain: ir.Model) -> None:
    quantized = quantize(chain, {"x": normal(16, 8, 6, 6)})
    for node in quantized.graph:
        if node.op_type == "DequantizeLinear" and node.outputs[0].name == "w1_dequantized":
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    _, report = correct(chain, quantized, samples(normal(16, 8, 6, 6)))
    assert ("c1", "its weight has scales along another axis") in [
        (r.node, r.reason) for r in report
    ]


def test_a_channel_without_deviation_gets_its_mean_only() -> None:
    w = normal(8, 8)
    w[:, 0] = 0  # Gemm: column 0 is output channel 0
    w[:, 1] = (1e-8, 1, 1, 1e-8, 1e-8, 1, 1, 1e-8)
    dense = graph("(float[n,8] x) => (float[n,8] y) {y = Gemm (x, w)}", w=w)
    pruned, _ = prune(dense)
    x = normal(30, 8)
    x[:, [1, 2, 5, 6]] = 3
    fixed, _ = correct(dense, pruned, samples(x))
    assert all(np.isfinite(array).all() for array in constants(fixed).values())
    np.testing.assert_allclose(
        moments(fixed, "y", x, 1)[0], moments(dense, "y", x, 1)[0], atol=1e-4
    )


def test_data_that_does_not_fit_or_is_not_finite_is_an_error(chain: ir.Model) -> None:
    pruned, _ = prune(chain)
    for bad in (normal(4, 8, 5, 5), np.full((4, 8, 6, 6), np.nan, np.float32)):
        with pytest.raises(InputError):
            correct(chain, pruned, samples(bad))
    huge = np.full((4, 8, 6, 6), 3e38, np.float32)
    with pytest.raises(InputError, match="is not finite"):
        correct(chain, pruned, samples(huge))
