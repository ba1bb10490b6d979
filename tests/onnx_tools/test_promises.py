"""Each hand-over checks the patterns that a file promises: the mask is broken before each once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from tests.graphs import graph
from tests.onnx_tools.networks import option_a, samples, sparse, weights
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph, standardized
from twofour.compiler.survey import survey
from twofour.core.errors import GateError
from twofour.core.promises import KEY
from twofour.onnx_tools.inspect import inspect
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.promises import carry, check, promise, require_kept, without_promises
from twofour.onnx_tools.quantize import quantize

PLACE = "output channel 3, tap (0,2), channels 4-7 hold 3 nonzeros"


def promised(broken: bool = False) -> ir.Model:
    """Two sparse convolutions with their promises; the first may be broken in one group."""
    arrays = weights(w2=(8, 8, 3, 3), w4=(16, 16, 3, 3))
    w2, w4 = sparse(arrays["w2"]), sparse(arrays["w4"], "4:8")
    if broken:
        w2[3, 4:8, 0, 2] = (1, 0, 2, 3)
    model = option_a(w2=w2, w4=w4)
    promise(model, {"w2": "2:4", "w4": "4:8"})
    return model


def test_a_kept_promise_passes_every_hand_over(tmp_path: Path) -> None:
    path = save_model(promised(), tmp_path / "m.onnx")
    model = load_model(path)
    assert require_kept(model) == ()
    assert [(p.weight, p.pattern, p.broken) for p in check(model).entries] == [
        ("w2", "2:4", ""), ("w4", "4:8", "")]  # fmt: skip
    assert KEY not in import_graph(model).metadata_props, "later passes may change weights"
    quantized = quantize(model, {"x": samples()})
    found = check(quantized)
    assert [(p.weight, p.pattern) for p in found.entries] == [
        ("w2_quantized", "2:4"), ("w4_quantized", "4:8")]  # fmt: skip
    assert found.notes == ()
    engine = build(quantized, tuning_effort=0)
    assert not any("promise" in note for note in engine.plan.notes)


@pytest.mark.parametrize("stage", ["build", "quantize", "build int8", "import", "check"])
def test_a_broken_promise_stops_every_hand_over_and_says_where(stage: str) -> None:
    model, data = promised(broken=True), {"x": samples()}
    stages = {
        "check": lambda: require_kept(model),
        "import": lambda: import_graph(model),
        "quantize": lambda: quantize(model, data),
        "build": lambda: build(model, tuning_effort=0),
        "build int8": lambda: build(model, tuning_effort=0, int8=True, data=data),
    }
    with pytest.raises(GateError) as caught:
        stages[stage]()
    text = str(caught.value)
    assert "the model breaks the promised sparsity pattern of 1 of 2 weights" in text
    assert f"weight 'w2' of Conv 'c2': {PLACE}; expected 2:4" in text
    for way in ("twofour prune", "Sparsifier.attach", "--sparsity disable", KEY):
        assert way in text


def test_quantization_that_breaks_a_mask_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(w: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(w.shape, np.int8), np.ones(w.shape[axis], np.float32)

    monkeypatch.setattr("twofour.onnx_tools.insert.quantize_weight", shifted)
    with pytest.raises(GateError, match="quantization breaks the promised sparsity pattern of 2"):
        quantize(promised(), {"x": samples()})


def test_sparsity_disable_and_removal_drop_the_promise() -> None:
    model = promised(broken=True)
    build(model, tuning_effort=0, sparsity="disable")
    assert KEY in model.metadata_props
    dropped = without_promises(model)
    assert KEY not in dropped.metadata_props
    assert KEY in model.metadata_props
    build(dropped, tuning_effort=0)
    assert without_promises(dropped) is dropped


def test_inspect_says_kept_or_broken_and_that_build_would_refuse() -> None:
    model = promised(broken=True)
    broken, kept = inspect(model).promises.entries
    assert broken.broken.endswith(PLACE)
    assert kept.broken == ""
    assert "breaks the promised" in survey(model).refused[0]


def test_a_promise_of_a_weight_that_is_gone_is_a_note_in_file_and_engine() -> None:
    model = option_a()
    promise(model, {"w9": "2:4", "b1": "2:4"})
    notes = require_kept(model)
    assert notes == ("no layer has 2 of the weights whose pattern is promised: 'b1', 'w9'",)
    assert notes[0] in build(model, tuning_effort=0).plan.notes
    assert inspect(model).promises.notes == notes
    quantized = quantize(model, {"x": samples()})
    assert check(quantized).notes == notes, "still told after quantization"


@pytest.mark.parametrize("text", ["{", '{"w2": 4}', "[" * 100_000, '{"w2": "2:4", "w2": "x:y"}'])
def test_metadata_that_is_none_of_ours_is_a_note(text: str) -> None:
    model = option_a()
    model.metadata_props[KEY] = text
    (note,) = require_kept(model)
    assert note.startswith(f"metadata '{KEY}'")
    assert note in build(model, tuning_effort=0).plan.notes
    promise(model, {"w2": "4:8"})
    assert json.loads(model.metadata_props[KEY]) == {"w2": "4:8"}


def test_a_shape_that_cannot_have_the_pattern_breaks_it() -> None:
    model = option_a()
    promise(model, {"w1": "4:8"})
    with pytest.raises(GateError, match="4 input channels are not a multiple of 8"):
        require_kept(model)


def test_promises_reach_into_functions_and_follow_transposed_weights() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    net (float[n,8] x) => (float[n,8] y)
    { t = Transpose <perm = [1, 0]> (v) h = MatMul (x, t) y = own.Linear (h, w) }
    <domain: "own", opset_import: ["" : 17]>
    Linear (a, b) => (c) { c = Gemm <transB = 1> (a, b) }"""
    proto = onnx.parser.parse_model(text)
    w = sparse(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name in "wv")
    model = ir.from_proto(proto)
    promise(model, {"w": "2:4", "v": "2:4"})
    quantized = quantize(model, {"x": samples(shape=(8,))})
    found = check(quantized)
    assert found.notes == ()
    assert sorted(p.pattern for p in found.entries) == ["2:4", "2:4"]
    assert all("quantized" in p.weight and not p.broken for p in found.entries)


def test_operators_of_onnx_runtime_take_their_promises_along() -> None:
    w = sparse(weights(w=(8, 8, 3, 3))["w"])
    model = graph(
        """(float[n,8,4,4] x) => (float[n,8,2,2] y)
        { y = com.microsoft.FusedConv <activation = "Relu"> (x, w) }""",
        w=w,
    )
    model.graph.opset_imports["com.microsoft"] = 1
    promise(model, {"w": "2:4"})
    plain = standardized(model)
    assert [p.weight for p in check(plain).entries if p.layers] == ["w"]


def test_a_layer_that_lost_its_weight_is_an_error() -> None:
    model, other = promised(), option_a()
    for node in list(other.graph):
        if node.op_type == "Conv":
            node.name = node.outputs[0].name = f"{node.name}_renamed"
    with pytest.raises(GateError, match="2 layers lost a weight whose pattern is promised"):
        carry(model, other)
