"""Each layer's times, brought together from the plans of the forms."""

from dataclasses import replace

import pytest

from tests.predict.plans import layer, plan
from twofour.compiler.forms import Form
from twofour.compiler.whole import OP_TYPE
from twofour.core.plan import IN_FLOAT32
from twofour.engine import Candidate, Layer
from twofour.predict.layers import Pruned, layer_times

DENSE, SPARSE = Form("int8"), Form("int8", "2:4")
WHOLE = plan([Layer("g", OP_TYPE, "onnxruntime", notes=("whole on ONNX Runtime: it is faster",))])


def test_dense_times_are_of_the_dense_form_and_sparse_ones_of_the_best_sparse_kernel() -> None:
    plans = {DENSE: plan([layer("a", 10.0), layer("b", 30.0)]),
             SPARSE: plan([layer("a", 11.0, 6.0), layer("b", 29.0, 40.0)])}  # fmt: skip
    a, b = layer_times(plans, ["a", "b"])
    (times,) = a.times
    assert (times.dense_us, times.computes_in) == (10.0, "int8")
    assert times.to("2:4") == Pruned("2:4", 6.0, 6.0)
    assert times.to("2:4/pair") == Pruned("2:4/pair", None, None)
    assert b.times[0].to("2:4") == Pruned("2:4", 40.0, 29.0)
    assert (a.share, b.share) == (0.25, 0.75)
    assert a.at("f32") is None


def test_the_float32_form_of_a_bfloat16_layer_is_none_of_its_times() -> None:
    other = Candidate("2:4" + IN_FLOAT32, "", 1.0)
    half = layer("a", 10.0, 6.0, "bfloat16")
    half = replace(half, candidates=(*half.candidates, other))
    (a,) = layer_times({Form("bf16", "2:4"): plan([half])}, ["a"])
    assert a.times[0].to("2:4").sparse_us == 6.0


def test_layers_without_a_weight_are_not_shown_and_fallbacks_are() -> None:
    copy = Layer("copy", "Copy", "pointwise", time_us=1.0)
    conv = Layer("conv", "Conv", "onnxruntime", notes=("3 spatial axes",), source=("conv",))
    (shown,) = layer_times({DENSE: plan([copy, conv])}, ["conv"])
    assert (shown.name, shown.times, shown.share) == ("conv", (), None)
    assert shown.fallback == "3 spatial axes"


def test_one_layer_may_compute_several_nodes() -> None:
    joined = replace(layer("q+k", 10.0), source=("q", "bias", "k"))
    (shown,) = layer_times({DENSE: plan([joined])}, ["q", "k"])
    assert shown.nodes == ("q", "k")


@pytest.mark.parametrize("dense", [WHOLE, plan([layer("a", 10.0)])])
def test_where_onnx_runtime_runs_a_form_whole_the_others_tell(dense: object) -> None:
    (a,) = layer_times({DENSE: dense, SPARSE: plan([layer("a", 12.0, 6.0)])}, ["a"])  # type: ignore[dict-item]
    assert a.times[0].dense_us == (12.0 if dense is WHOLE else 10.0)


def test_where_onnx_runtime_runs_all_forms_the_reason_is_shown() -> None:
    a, b = layer_times({DENSE: WHOLE, SPARSE: WHOLE}, ["a", "b"])
    assert (a.name, a.nodes, a.fallback) == ("a", ("a",), "whole on ONNX Runtime: it is faster")
    assert b.times == ()
