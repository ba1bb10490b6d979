"""Models that the compiler cannot take: one step on ONNX Runtime, with the reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.compiler.engines import built_and_run, random_inputs, reference, steps
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.requests import read_request
from twofour.compiler.whole import OP_TYPE, whole_engine
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import host_target
from twofour.engine import Engine
from twofour.runtime.session import Session


def whole(model: ir.Model, *shapes, threads: int = 1) -> Engine:
    requests = [read_request(model.graph, each) for each in shapes or ({},)]
    return whole_engine(model, requests, host_target(), threads, "for this test")


def net() -> ir.Model:
    return graph("(float[n,4] x) => (float[n,3] y) { m = MatMul (x, w) y = Sin (m) }",
                 w=np.ones((4, 3), np.float32))  # fmt: skip


def test_one_step_holds_the_model_and_says_why(tmp_path) -> None:
    model = net()
    engine = whole(model, {"x": (2, 4)})
    assert steps(engine) == [("onnxruntime", [OP_TYPE])]
    (layer,) = engine.plan.layers
    assert layer.tactic == "onnxruntime"
    assert layer.notes == ("whole on ONNX Runtime: for this test",)
    held = onnx.load_from_string(engine.subgraphs["model0"].tobytes())
    assert [node.op_type for node in held.graph.node] == ["MatMul", "Sin"]
    assert engine.plan.outputs[0].shape == (2, 3)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    again = Engine.load(engine.save(tmp_path / "m.engine"))
    for each in (engine, again):
        with Session(each) as session:
            assert np.allclose(session.run({"x": x})["y"], reference(model, {"x": x})["y"])
    assert [value.shape for value in model.graph.inputs] == [ir.Shape(["n", 4])]


def test_open_dimensions() -> None:
    engine = whole(net(), {"x": ((1, 4), (2, 4), (5, 4))})
    (info,) = engine.plan.inputs
    assert info.shape == (5, 4)
    assert not engine.plan.outputs[0].known
    with Session(engine) as session:
        for n in (1, 3, 5):
            x = np.full((n, 4), 0.25, np.float32)
            assert np.allclose(session.run({"x": x})["y"], np.sin(1))
        with pytest.raises(InputError, match="expected n from 1 to 5, got 6"):
            session.run({"x": np.ones((6, 4), np.float32)})


def test_profiles_share_a_model_that_is_the_same() -> None:
    wide = {"x": ((6, 4), (7, 4), (9, 4))}
    engine = whole(net(), {"x": ((1, 4), (2, 4), (5, 4))}, wide, {"x": (12, 4)})
    assert sorted(engine.subgraphs) == ["model0", "model2"]
    with Session(engine) as session:
        for n in (2, 9, 12):
            assert session.run({"x": np.ones((n, 4), np.float32)})["y"].shape == (n, 3)


def test_what_the_file_says_of_its_outputs_may_be_wrong() -> None:
    model = graph("(float[2,4] x) => (float[7,7] y) { y = com.example.Twice (x) }")
    function = onnx.parser.parse_function(
        '<domain: "com.example", opset_import: ["": 18]> Twice (x) => (y) { y = Add (x, x) }'
    )
    proto = ir.to_proto(model)
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    engine = whole(ir.from_proto(proto))
    assert engine.plan.outputs[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "(float[2] x) => (float[2] y) { y = com.microsoft.NoSuch (x) }",
            "com.microsoft.NoSuch 'y'",
        ),
        ("(float[2,3] x, float[4,3] z) => (float[2,3] y) { y = Add (x, z) }", "Node (y) Op (Add)"),
    ],
)
def test_what_onnxruntime_refuses_too_is_an_input_error(body, reason) -> None:
    with pytest.raises(InputError) as caught:
        whole(graph(body))
    assert "ONNX Runtime refuses it" in caught.value.what
    assert "for this test" in caught.value.reasons
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("(string[2] x) => (string[2] y) { y = Identity (x) }", "string"),
        ("(float[2] x) => (seq(float[2]) y) { y = SequenceConstruct (x) }", "sequence"),
        ("(optional(float[2]) x) => (float[2] y) { y = OptionalGetElement (x) }", "optional"),
        ("(float[2] x) => (bfloat16[2] y) { y = Cast <to = 16> (x) }", "bfloat16"),
    ],
)
@pytest.mark.parametrize("make", [build, whole])
def test_values_that_no_engine_passes_on_are_named(body, kind, make) -> None:
    model = graph(body)
    with pytest.raises(UnsupportedError, match="an engine does not pass on") as caught:
        make(model)
    assert kind in caught.value.what
    assert ("'x'" if kind in ("string", "optional") else "'y'") in caught.value.what


UNKNOWN = {
    "output": "(float[4,4] x) => (int64[2,n] y) { y = NonZero (x) }",
    "two outputs": "(float[4,4] x) => (float[k] y, int64[2,n] z)"
    "{ a = MatMul (x, w) z = NonZero (a) t = Transpose (z) y = GatherND (x, t) }",
    "between steps": "(float[4,4] x) => (float[4,4] y, float[k] z)"
    "{ a = MatMul (x, w) r = Relu (a) n = NonZero (r) b = MatMul (a, w) y = Sin (b)"
    " s = Cos (b) t = Transpose (n) z = GatherND (s, t) }",
}


@pytest.mark.parametrize("body", UNKNOWN.values(), ids=UNKNOWN)
def test_shapes_that_depend_on_the_data(body, timing_cache) -> None:
    constants = {"w": np.eye(4, dtype=np.float32)} if "MatMul" in body else {}
    model = graph(body, **constants)
    inputs = random_inputs(model, 3)
    inputs["x"][1] = 0
    want = reference(model, inputs)
    got = built_and_run(model, inputs, timing_cache=timing_cache, tuning_effort=0)
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert np.allclose(got[name], value, atol=1e-5)
