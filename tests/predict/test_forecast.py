"""Forecasts against the engines that come out later, and what is said of layers and options."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

import twofour
from tests.graphs import graph
from tests.onnx_tools.networks import weights
from twofour.bench.declared import random_feeds
from twofour.bench.timing import Schedule, race, ratio
from twofour.bench.versus import ours
from twofour.compiler.build import build
from twofour.core.errors import InputError
from twofour.engine import Engine
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.predict.results import Forecast
from twofour.runtime.session import Session

X = (1, 3, 32, 32)
TRIES, WITHIN = 6, 0.10

BODY = """(float[1,3,32,32] x) => (float[1,10] y) <int64[2] hw = {2, 3}>
{
    first = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r1 = Relu (first)
    deep = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    r2 = Relu (deep)
    each = Conv <group = 64, pads = [1, 1, 1, 1]> (r2, w3)
    r3 = Relu (each)
    down = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r3, w4)
    r4 = Relu (down)
    m = ReduceMean <keepdims = 0> (r4, hw)
    y = Gemm <transB = 1> (m, w5)
}"""


def network() -> ir.Model:
    shapes = {"w1": (64, 3, 3, 3), "w2": (64, 64, 3, 3), "w3": (64, 1, 3, 3)}
    return graph(BODY, **weights(**shapes, w4=(128, 64, 3, 3), w5=(10, 128)))


@pytest.fixture(scope="module")
def found() -> Forecast:
    return twofour.forecast(
        network(), tuning_effort=1, precisions=("f32", "int8"), patterns=("2:4/pair",)
    )


def test_every_layer_has_a_verdict(found: Forecast) -> None:
    assert [layer.name for layer in found.layers] == ["first", "deep", "each", "down", "y"]
    reasons = {verdict.layer: verdict.reason for verdict in found.verdicts}
    assert reasons["first"] == "3 input channels are not a multiple of 4"
    assert reasons["each"] == "depthwise: a channel reads one input channel only"
    assert str(found.judged) == "INT8 2:4/pair"
    assert found.layers[1].shape == "64x32x32 -> 64x32x32 k3x3"
    assert sum(layer.share or 0.0 for layer in found.layers) < 1.0


def test_commands_leave_out_what_does_not_pay_and_what_cannot_be_pruned_anyway() -> None:
    found = twofour.forecast(
        network(), tuning_effort=1, precisions=("int8",), patterns=("2:4", "2:4/pair")
    )
    assert not {"first", "each"} & set(found.skip)
    assert set(found.skip) == {
        v.layer for v in found.verdicts if not v.pays and v.layer not in ("first", "each")
    }
    if found.worth:
        assert found.judged is not None
        assert f"--pattern {found.judged.pattern}" in found.commands()[0]


def test_runs_are_measured_or_added(found: Forecast) -> None:
    runs = {run.name: run for run in found.runs if run.measured}
    assert list(runs) == ["float32 dense", "INT8 dense", "INT8 2:4/pair"]  # no float32 pairs
    assert runs["float32 dense"].vs_f32 == pytest.approx(1.0)
    assert runs["INT8 dense"].vs_int8 == pytest.approx(1.0)
    for run in found.runs:
        dense = runs["float32 dense"].time_us
        assert run.vs_f32 == pytest.approx(dense / run.time_us)
        assert run.everywhere == run.measured


def test_plain_data(found: Forecast) -> None:
    document = json.loads(json.dumps(found.to_json()))
    assert document["inputs"] == {"x": list(X)}
    assert document["layers"][1]["verdict"]["layer"] == "deep"
    assert document["worth"] == list(found.worth)
    assert document["judged"] == {"precision": "int8", "pattern": "2:4/pair"}


def later(pattern: str = "") -> Engine:
    """As users build it: pruned, calibrated, compiled."""
    model = prune(network(), pattern)[0] if pattern else network()
    x = np.random.default_rng(0).standard_normal((4, *X[1:])).astype(np.float32)
    return build(quantize(model, {"x": x}, QuantizeOptions(threads=1)), tuning_effort=1)


def test_the_forecast_is_within_ten_percent_of_the_later_engine() -> None:
    """INT8 with pairs against INT8 dense; as a ratio, and again where the machine was busy."""
    misses = []
    for _ in range(TRIES):
        found = twofour.forecast(
            network(), tuning_effort=1, precisions=("int8",), patterns=("2:4/pair",)
        )
        predicted = next(run.vs_int8 for run in found.runs if run.pattern and run.measured)
        with Session(later()) as dense, Session(later("2:4/pair")) as pruned:
            feeds = random_feeds(dense.inputs)
            both = [ours(pruned, feeds), ours(dense, feeds)]
            measured = ratio(*race(both, Schedule(1.0))).median
        assert predicted is not None
        misses.append(predicted / measured - 1)
        if abs(misses[-1]) < WITHIN:
            return
    pytest.fail(f"predicted over measured, less 1: {misses}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("int4",)}, "unknown precision 'int4'"),
        ({"patterns": ("1:2",)}, "unknown pattern '1:2'"),
        ({"tuning_effort": 0}, "made of times"),
        ({"speed": 1}, "no option 'speed'"),
        ({"shapes": {"z": (1,)}}, "no input named 'z'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        twofour.forecast(network(), **options)
