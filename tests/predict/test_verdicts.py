"""Which layers are worth pruning, and why others are not."""

from dataclasses import replace

import pytest

from tests.predict.plans import layer, plan
from twofour.compiler.forms import Form
from twofour.engine import Layer, Work
from twofour.predict.layers import LayerTimes, layer_times
from twofour.predict.verdicts import Court

FORM = Form("int8", "2:4")
COURT = Court(FORM, 1000.0, {"first": "3 input channels are not a multiple of 4"}, 100.0)


def times(pruned: Layer, dense_us: float | None = None) -> LayerTimes:
    """What is known of a layer that was built dense and with a pattern."""
    dense = layer(pruned.name, dense_us, work=pruned.work) if dense_us else pruned
    (found,) = layer_times({Form("int8"): plan([dense]), FORM: plan([pruned])}, [pruned.name])
    return found


def test_a_layer_that_gains_pays() -> None:
    verdict = COURT.judge(times(layer("a", 101.0, 60.0), 100.0))
    assert (verdict.pays, verdict.reason) == (True, "")
    assert (verdict.dense_us, verdict.sparse_us) == (100.0, 60.0)
    assert verdict.saves == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (times(layer("first", 10.0)), "3 input channels are not a multiple of 4"),
        (times(layer("a", 10.0)), "no sparse kernel takes it"),
        (times(layer("a", 10.4, 10.0), 10.4), "dense kernels are as fast"),
        (times(layer("a", 1.0, 0.5), 1.0), "saves less than 0.1% of a run"),
        (
            times(layer("a", 10.0, 12.0, work=Work(moved_bytes=600_000, k=512, channels=64)), 10.0),
            "dense kernels are as fast: memory-bound on activations",
        ),
        (
            times(layer("a", 10.0, 12.0, work=Work(64, k=36, channels=64)), 10.0),
            "dense kernels are as fast: sums of 36 products are short",
        ),
        (
            times(layer("a", 10.0, 12.0, work=Work(64, k=512, channels=10)), 10.0),
            "dense kernels are as fast: 10 output channels leave lanes idle",
        ),
        (
            times(replace(layer("a", 10.0), tactic="depthwise 16"), None),
            "depthwise: a channel reads one input channel only",
        ),
        (
            times(Layer("a", "Conv", "onnxruntime", notes=("3 axes",), source=("a",))),
            "runs on ONNX Runtime: 3 axes",
        ),
    ],
)
def test_a_layer_that_does_not_pay_has_a_reason(found: LayerTimes, reason: str) -> None:
    verdict = COURT.judge(found)
    assert (verdict.pays, verdict.reason) == (False, reason)


def test_slower_saves_nothing() -> None:
    assert COURT.judge(times(layer("a", 10.0, 12.0), 10.0)).saves == 0.0
