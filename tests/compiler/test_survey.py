"""What inspect says of operators is what a build does: the plan of the engine is the judge."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph
from tests.sample_models import conv_model
from twofour.compiler.build import build
from twofour.compiler.survey import FALLBACK, NATIVE, Survey, survey
from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model

W = np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype(np.float32)
CONV = "(float[1,8,6,6] x) => (float[1,8,6,6] y) {{ a = Conv <pads = [1,1,1,1]> (x, w) {} }}"
GRAPHS = {
    "native": CONV.format("y = Relu (a)"),
    "cosine": CONV.format("b = Cos (a) y = Conv <pads = [1,1,1,1]> (b, w)"),
    "mixed": CONV.format("b = Relu (a) c = Erf (b) d = Cos (c) e = Add (b, d) y = Relu (e)"),
    "alone": "(float[1,8,6,6] x) => (float[1,8,6,6] y) { a = Cos (x) y = Relu (a) }",
}


def check(found: Survey, model: ir.Model) -> None:
    """Each reason of the plan is one of an operator, and the reverse; names where they survive."""
    plan = build(model, tuning_effort=0).plan
    layers = [layer for layer in plan.layers if layer.tactic == FALLBACK]
    assert {layer.notes[0] for layer in layers} == {each.reason for each in found.fallbacks}
    names = {layer.name for layer in layers if "." not in layer.op}
    assert names <= {each.name for each in found.fallbacks} or found.whole
    assert len(found.operators) == plan.graph["operators"] or found.whole
    assert bool(found.native) == any(step.kind == "native" for step in plan.steps)


@pytest.mark.parametrize("name", GRAPHS)
def test_agrees_with_the_engine(name):
    model = graph(GRAPHS[name], w=W)
    found = survey(model)
    check(found, model)
    assert (found.native == 0) == (name == "alone")
    assert bool(found.fallbacks) == (name != "native")


def test_agrees_with_the_engine_on_files(data_folder):
    for file in ("dtln_2", "har_cnn", "mlperftiny_ad01", "mlperftiny_resnet8"):
        model = load_model(data_folder / "onnx" / f"{file}.onnx")
        check(survey(model), model)


def test_what_was_fused_runs_where_it_went():
    found = survey(graph(GRAPHS["mixed"], w=W))
    runs = {each.op_type: (each.runs, each.reason) for each in found.operators}
    assert runs["Conv"] == (NATIVE, "")
    assert runs["Cos"] == (FALLBACK, "no native kernel for Cos")
    operators = ["Conv", "Relu", "Erf", "Cos", "Add", "Relu"]
    assert [each.op_type for each in found.operators] == operators
    assert found.to_json()["native"] + found.to_json()["onnxruntime"] == 6


def test_a_model_that_a_build_refuses(tmp_path):
    body = "(float[1,8,2,2] x) => (float[n,8,h,v] y) { y = Conv (x, w) }"
    model = graph(body, w=W)
    found = survey(model)
    assert found.operators == ()
    assert "nothing to compute" in found.refused[0]
    with pytest.raises(InputError) as caught:
        build(model, tuning_effort=0)
    assert (caught.value.what, *caught.value.reasons) == found.refused


def test_open_sizes_take_the_shapes_given(tmp_path):
    model = load_model(conv_model(tmp_path / "m.onnx"))
    assert survey(model, {"x": (2, 4, 8, 8)}).native > 0
    assert "no input named" in survey(model, {"nobody": (1,)}).refused[0]
