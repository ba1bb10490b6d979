"""Ranges from running the model: right, the same each time, and refused where data is bad."""

import numpy as np
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, samples
from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools import runner
from twofour.onnx_tools.calibrate import calibrate
from twofour.onnx_tools.histogram import Range
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.runner import Runner

MINMAX = QuantizeOptions(method="minmax", threads=1)
TENSORS = ["x", "r1", "a4", "y"]


def refused(*parts, error=InputError):
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


def test_minmax_is_that_of_the_tensors():
    model, x = option_a(), samples(24)
    found = calibrate(model, TENSORS, {"x": x}, MINMAX)
    wide = model.clone()
    values = {value.name: value for node in wide.graph for value in node.outputs}
    wide.graph.outputs.extend([values["r1"], values["a4"]])
    y, r1, a4 = run(wide, {"x": x})
    assert list(found) == TENSORS
    for name, array in zip(TENSORS, (x, r1, a4, y), strict=True):
        assert found[name].low == pytest.approx(array.min(), rel=1e-5)
        assert found[name].high == pytest.approx(array.max(), rel=1e-5)


def test_the_model_stays_as_it_is():
    model = option_a()
    calibrate(model, TENSORS, {"x": samples()}, MINMAX)
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_deterministic_and_independent_of_the_order(method):
    options = QuantizeOptions(method=method, threads=1)
    x = samples(30)
    first = calibrate(option_a(), TENSORS, {"x": x}, options)
    assert calibrate(option_a(), TENSORS, {"x": x}, options) == first
    parts = [{"x": x[i : i + 1]} for i in reversed(range(30))]
    for name, span in calibrate(option_a(), TENSORS, parts, options).items():
        # One sample a batch may sum in another order.
        assert span.low == pytest.approx(first[name].low, rel=1e-4)
        assert span.high == pytest.approx(first[name].high, rel=1e-4)


def test_batches_are_as_large_as_memory_allows(monkeypatch):
    sizes = []
    original = Runner.run

    def spy(self, inputs):
        sizes.append(len(inputs["x"]))
        return original(self, inputs)

    monkeypatch.setattr(Runner, "run", spy)
    one_sample = 4 * 8 * 8 * 8  # r1: float32 [8, 8, 8]
    monkeypatch.setattr(runner, "BATCH_BYTES", 5 * one_sample + 1)
    calibrate(option_a(), ["r1"], {"x": samples(12)}, MINMAX)
    assert sizes == [5, 5, 2]
    sizes.clear()
    monkeypatch.setattr(runner, "BATCH_BYTES", 1)
    calibrate(option_a(), ["r1"], {"x": samples(2)}, MINMAX)
    assert sizes == [1, 1]


FIXED = "(float[4,3] x) => (float[4,3] y) { y = Relu (x) }"


def test_fixed_batch_size_is_filled_up_with_samples():
    x = np.abs(samples(6, (3,))) + 1
    whole = Range(float(x.min()), float(x.max()))
    found = calibrate(graph(FIXED), ["x", "y"], {"x": x}, MINMAX)
    assert found == {"x": whole, "y": whole}


def test_progress_counts_samples():
    calls = []
    calibrate(option_a(), ["y"], {"x": samples(100)}, MINMAX, lambda *call: calls.append(call))
    assert calls == [(64, 100, "calibrating"), (100, 100, "calibrating")]
    calls.clear()
    batches = [{"x": samples(3)}, {"x": samples(2)}]
    calibrate(option_a(), ["y"], batches, MINMAX, lambda *call: calls.append(call))
    assert calls == [(3, None, "calibrating"), (5, None, "calibrating")]


def test_samples_limit_what_is_read():
    x = samples(10)
    x[5:] *= 100
    options = QuantizeOptions(method="minmax", samples=5)
    assert calibrate(option_a(), ["x"], {"x": x}, options)["x"].high == x[:5].max()


def test_labels_are_passed_over():
    data = {"x": samples(), "labels": np.zeros(16)}
    assert calibrate(option_a(), ["x"], data, MINMAX)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite(value):
    x = samples()
    x[7, 1, 2, 3] = value
    with refused(r"not finite: x\[7, 1, 2, 3\] is"):
        calibrate(option_a(), ["y"], {"x": x})


def test_activations_that_are_not_finite():
    model = graph("(float[n,2] x) => (float[n,2] y) { a = Sqrt (x) y = Relu (a) }")
    batches = [{"x": np.ones((3, 2), np.float32)}, {"x": -np.ones((2, 2), np.float32)}]
    with refused("tensor 'a' is not finite", "data batches: one of samples 3 to 4"):
        calibrate(model, ["a"], batches)


def test_no_data():
    with refused("holds no samples"):
        calibrate(option_a(), ["y"], {"x": samples(0)})
    with refused("holds no samples"):
        calibrate(option_a(), ["y"], [])


def test_data_of_another_name():
    with refused("no array for input 'x'", "expected arrays x", "got image"):
        calibrate(option_a(), ["y"], {"image": samples()})


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (samples().astype(np.float64), r"float64 \[16, 4, 8, 8\]"),
        (np.zeros((2, 4, 8, 8), np.uint8), r"uint8 \[2, 4, 8, 8\]"),
        (samples(2, (8, 8, 4)), r"float32 \[2, 8, 8, 4\]"),
        (samples(2, (4, 8)), r"float32 \[2, 4, 8\]"),
    ],
)
def test_data_that_does_not_fit(x, got):
    with refused("does not fit", r"x: expected float32 \[n, 4, 8, 8\], got " + got):
        calibrate(option_a(), ["y"], {"x": x})


def test_data_on_which_the_model_fails():
    body = "(float[n,m] x) => (float[n,4] y) <int64[2] to = {-1, 4}> { y = Reshape (x, to) }"
    with refused("fails on the calibration data", r"x \(1, 3\)"):
        calibrate(graph(body), ["y"], {"x": samples(1, (3,))})


def test_model_that_does_not_run():
    model = graph("(float[n,4] x) => (float[n,4] y) { y = Relu (x) }")
    model.graph[0].domain = "somewhere.else"
    model.opset_imports["somewhere.else"] = 1
    with refused("ONNX Runtime cannot load the model", error=UnsupportedError):
        calibrate(model, ["y"], {"x": samples(1, (4,))})


def test_tensor_that_is_not_there():
    with refused("no tensor 'z'"):
        calibrate(option_a(), ["z"], {"x": samples()})


def test_tensor_that_is_empty_in_every_run():
    body = """(float[n,4] x) => (float[m,4] y) <float zero = {0}> {
        s = ReduceMax <keepdims = 0, axes = [1]> (x)
        c = Greater (s, zero)
        p = Compress <axis = 0> (x, c)
        y = Relu (p)
    }"""
    model = graph(body, opset=17)
    with refused("never reaches 1 tensors that need a range", "empty in every run: p", "exclude"):
        calibrate(model, ["x", "p"], {"x": -np.ones((3, 4), np.float32)})
    found = calibrate(model, ["x", "p"], {"x": np.eye(4, dtype=np.float32)}, MINMAX)
    assert found["p"] == Range(0.0, 1.0)
