"""Ranges from running the model: right, the same each time, and refused where data is bad."""

import resource
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, samples
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.ranges import Range
from twofour.onnx_tools import runner, segments
from twofour.onnx_tools.calibrate import calibrate
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
    assert sizes == [4, 4, 4]  # a power of two: runs end where batches of 16 do
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
    assert calls == [(done, 100, "calibrating") for done in (*range(16, 97, 16), 100)]
    calls.clear()
    batches = [{"x": samples(3)}, {"x": samples(2)}]
    calibrate(option_a(), ["y"], batches, MINMAX, lambda *call: calls.append(call))
    assert calls == [(3, 5, "calibrating"), (5, 5, "calibrating")]
    calls.clear()
    calibrate(option_a(), ["y"], iter(batches), MINMAX, lambda *call: calls.append(call))
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


def resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_100_000_batches_of_one_image_take_no_more_memory_than_ten():
    model = graph("(float[1,4] x) => (float[1,4] y) { a = Relu (x) y = Exp (a) }")
    x, resident = samples(1000, (1, 4)), []

    def images():
        for i in range(100_000):
            if i == 10 or i % 20_000 == 19_999:
                resident.append(resident_kb())
            yield {"x": x[i % 1000]}

    found = calibrate(model, ["a"], images(), QuantizeOptions(method="minmax", threads=1))
    assert found["a"].high == x.max()
    assert len(resident) == 6
    # Ten batches have made all there is to make; one number kept of each batch, of 16 bytes at
    # least, would be 312 kB in each fifth. What else happens in the process does not come in all.
    assert np.median(np.diff(resident)) < 150


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
def test_the_number_of_threads_makes_no_difference(method):
    data = {"x": samples(40)}
    one, two = (
        calibrate(option_a(), TENSORS, data, QuantizeOptions(method=method, threads=threads))
        for threads in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize("budget", [1, 4 * 8 * 8 * 8 * 4, 1 << 27])
@pytest.mark.parametrize("cut", [1, 5, 48])
def test_a_batch_of_the_average_is_16_samples(monkeypatch, budget, cut):
    monkeypatch.setattr(runner, "BATCH_BYTES", budget)
    x = samples(40)
    parts = [{"x": x[i : i + cut]} for i in range(0, 40, cut)]
    found = calibrate(option_a(), ["x"], parts, QuantizeOptions(method="average", threads=1))
    # A run belongs to the batch of its first sample: batches of 5 make runs of 4 and 1, or 5.
    starts = {1: (0, 16, 32), 5: (0, 16, 32), 48: (0, 16, 32)}[cut]
    low, high = float(x[:16].min()), float(x[:16].max())
    for start in starts[1:]:
        low += (float(x[start : start + 16].min()) - low) * 0.01
        high += (float(x[start : start + 16].max()) - high) * 0.01
    close = 1e-9 if cut != 5 else 2e-2
    assert found["x"].low == pytest.approx(low, rel=close)
    assert found["x"].high == pytest.approx(high, rel=close)


def test_a_large_model_is_run_in_pieces(monkeypatch):
    data, whole = {"x": samples(20)}, calibrate(option_a(), TENSORS, {"x": samples(20)}, MINMAX)
    monkeypatch.setattr(runner, "BATCH_BYTES", 1)
    monkeypatch.setattr(segments, "BATCH_BYTES", 1)
    most = []
    original = Runner.run

    def spy(self, inputs):
        found = original(self, inputs)
        most.append(len(found))
        return found

    monkeypatch.setattr(Runner, "run", spy)
    for name, span in calibrate(option_a(), TENSORS, data, MINMAX).items():
        assert span.low == pytest.approx(whole[name].low, rel=1e-4)
        assert span.high == pytest.approx(whole[name].high, rel=1e-4)
    assert len(most) == 20 * 3
    assert max(most) <= 2  # what is wanted, and what a later piece reads
