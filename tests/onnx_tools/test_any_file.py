"""Every habit of exporters: such files are quantized, pruned and built, and results stay right.

Each graph goes three ways: quantized, pruned (`sparsity="force"`), and both. The engine is held
against ONNX Runtime on the same model, where each node runs by itself.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from tests.graphs import graph
from tests.onnx_tools.any_file import (
    FLOOR,
    RANDOM,
    SQUARE,
    check_int8,
    check_pruned,
    error,
    feeds_of,
    floats,
    on_ort,
    proto,
    quick,
    run,
)
from tests.onnx_tools.networks import weights
from twofour.compiler.build import build
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.eligible import NothingToQuantizeError, float_layers
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.weights import layer_weights

X = {"x": floats(8, 16, 6, 6)}
HEAD = "(float[n,16,6,6] x) => (float[n,8,6,6] y)"
LISTED = weights(w=(8, 16, 3, 3), b=(8,))


def test_initializers_listed_as_inputs():
    body = """agraph (float[n,16,6,6] x, float[8,16,3,3] w) => (float[n,8,6,6] y)
        { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"""
    model = proto(body, w=LISTED["w"])
    data = {"x": X["x"]}
    quantized = quantize(model, data)
    assert [value.name for value in quantized.graph.inputs] == ["x"]
    engine = build(model, int8=True, data=data, tuning_effort=0)
    assert engine.plan.layers[0].precision == "int8"


def in_constant_nodes(model: ir.Model) -> ir.Model:
    """Weights as the output of Constant nodes, as Paddle writes them."""
    model = model.clone()
    for name, value in list(model.graph.initializers.items()):
        node = ir.node("Constant", [], {"value": ir.AttrTensor("value", value.const_value)})
        node.outputs[0].name = f"{name}_made"
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        del model.graph.initializers[name]
    return model


def test_weights_in_constant_nodes():
    body = f"{HEAD} {{ c = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Relu (c) }}"
    model = in_constant_nodes(graph(body, opset=17, **LISTED))
    assert not model.graph.initializers
    check_int8(model, X)
    assert check_pruned(model, X) == []
    pruned, report = prune(model)
    assert [entry.reason for entry in report] == [""]
    ((_, weight),) = layer_weights(pruned)
    assert is_pattern(weight.values, "2:4")
    ((_, before),) = layer_weights(model)
    assert not is_pattern(before.values, "2:4")


IF = """agraph (float[1,8] x, bool c) => (float[1,8] y) {
    h = Gemm <transB = 1> (x, w)
    t = If (c) <then_branch = g1 () => (float[1,8] u) { u = Gemm <transB = 1> (h, v) },
                else_branch = g2 () => (float[1,8] s) { s = Relu (h) }>
    y = Gemm <transB = 1> (t, w)
}"""
LOOP = """agraph (float[1,8] x, int64 m) => (float[1,8] y) <bool go = {1}> {
    h = Gemm <transB = 1> (x, w)
    l = Loop (m, go, h) <body = g1 (int64 i, bool a, float[1,8] s) => (bool b, float[1,8] u) {
        b = Identity (a)
        g = Gemm <transB = 1> (s, v)
        u = Tanh (g)
    }>
    y = Gemm <transB = 1> (l, w)
}"""


@pytest.mark.parametrize("body", [IF, LOOP])
def test_weights_in_bodies_stay_float_and_are_pruned(body):
    model = proto(body, **SQUARE)
    other = {"c": np.array([True, False] * 4)} if body is IF else {"m": np.array(2)}
    data = {"x": floats(8, 1, 8), **other}
    quantized = check_int8(model, data)
    (left,) = float_layers(quantized)
    assert left.op == "Gemm"
    assert left.reason == "it stands in a body of If, Loop or Scan"
    assert check_pruned(model, data) == ["already 2:4"]  # w, which two read
    pruned, _ = prune(model)
    assert [is_pattern(w.values, "2:4") for _, w in layer_weights(pruned)] == [True] * 3


def test_a_model_with_all_layers_in_bodies_is_built_in_float_and_says_so():
    body = """agraph (float[1,8] x, bool c) => (float[1,8] y) {
        y = If (c) <then_branch = g1 () => (float[1,8] u) { u = Gemm <transB = 1> (x, v) },
                    else_branch = g2 () => (float[1,8] s) { s = Relu (x) }>
    }"""
    model = proto(body, v=SQUARE["v"])
    data = {"x": floats(4, 1, 8), "c": np.array([True, False] * 2)}
    with pytest.raises(NothingToQuantizeError, match="1 Gemm: it stands in a body"):
        quantize(model, data)
    engine = quick(model, data, int8=True, data=data)
    (note,) = engine.plan.notes
    assert "nothing to quantize" in note
    assert "it stands in a body" in note
    feeds = feeds_of(model, data)
    assert error(on_ort(model, feeds)[0], run(engine, feeds)[0]) < 1e-6


def test_functions_are_inlined():
    body = """agraph (float[n,8] x) => (float[n,8] y) { y = own.layer (x, w) }
    <domain: "own", opset_import: ["": 17]>
    layer (a, b) => (c) { d = Gemm <transB = 1> (a, b) c = Relu (d) }"""
    model = proto(body, '"": 17, "own": 1', w=SQUARE["w"])
    data = {"x": floats(8, 8)}
    assert float_layers(check_int8(model, data)) == ()
    assert check_pruned(model, data) == []
    assert [entry.reason for entry in prune(model)[1]] == [""]


def test_inputs_of_other_kinds():
    body = """(float[n,8] x, int64[n,3] ids, bool[n,8] keep, int32 shift) => (float[n,8] y) {
        t = Gather (table, ids)
        s = ReduceSum <keepdims = 0> (t, one)
        k = Where (keep, x, s)
        f = Cast <to = 1> (shift)
        a = Add (k, f)
        y = Gemm <transB = 1> (a, w)
    }"""
    model = graph(body, opset=17, table=floats(20, 8), one=np.array([1]), w=SQUARE["w"])
    data = {
        "x": floats(12, 8),
        "ids": RANDOM.integers(0, 20, (12, 3)),
        "keep": RANDOM.integers(0, 2, (12, 8)).astype(bool),
        "shift": np.array(1, np.int32),
    }
    check_int8(model, data)
    assert check_pruned(model, data) == []


def test_a_state_and_a_number():
    body = """(float[n,8] x, float[2,n,8] state, int64 rate) => (float[n,8] y, float[2,n,8] next)
    {
        f = Cast <to = 1> (rate)
        h = Gather (state, zero)
        a = Add (x, h)
        m = Mul (a, f)
        y = Gemm <transB = 1> (m, w)
        u = Unsqueeze (y, first)
        next = Concat <axis = 0> (u, u)
    }"""
    constants = {"zero": np.array(0), "first": np.array([0]), "w": SQUARE["w"]}
    model = graph(body, opset=17, **constants)
    data = {"x": floats(8, 8), "state": floats(8, 2, 1, 8), "rate": np.array(3)}
    check_int8(model, data)
    assert check_pruned(model, data) == []


def test_a_fixed_batch_above_one():
    body = "(float[4,8] x) => (float[4,8] y) { y = Gemm <transB = 1> (x, w) }"
    model = graph(body, opset=17, w=SQUARE["w"])
    check_int8(model, {"x": floats(10, 8)})
    check_int8(model, {"x": floats(3, 4, 8)})


DYNAMIC = """agraph (float[n,8] x) => (float[m,8] y) <float zero = {0}> {
    s = ReduceMax <keepdims = 0, axes = [1]> (x)
    c = Greater (s, zero)
    p = Compress <axis = 0> (x, c)
    y = Gemm <transB = 1> (p, w)
}"""
SEQUENCE = """agraph (float[n,8] x, int64 i) => (float[n,8] y) {
    r = Relu (x)
    s = SequenceConstruct (x, r)
    t = SequenceAt (s, i)
    y = Gemm <transB = 1> (t, w)
}"""


@pytest.mark.parametrize("body", [DYNAMIC, SEQUENCE])
def test_tensors_of_unknown_shape_and_values_that_are_no_tensors(body):
    model = proto(body, w=SQUARE["w"])
    data = {"x": floats(8, 8) + 1}
    if body is SEQUENCE:
        data["i"] = np.array([0, 1] * 4)
    check_int8(model, data)
    check_pruned(model, data)


CONTRIB = """agraph (float[n,16,6,6] x) => (float[n,8,6,6] y) {
    a = com.microsoft.FusedConv <activation = "Relu", kernel_shape = [3, 3],
                                 pads = [1, 1, 1, 1]> (x, v)
    b = com.microsoft.Gelu (a)
    y = Conv <pads = [1, 1, 1, 1]> (b, w)
}"""


def test_tensors_behind_operators_that_onnx_does_not_know():
    arrays = {"v": weights(v=(16, 16, 3, 3))["v"], "w": LISTED["w"]}
    model = proto(CONTRIB, '"": 17, "com.microsoft": 1', **arrays)
    quantized, feeds = quantize(model, X), feeds_of(model, X)
    assert "b_scale" in quantized.graph.initializers
    assert float_layers(quantized)[0].reason == "FusedConv is not quantized"
    assert error(on_ort(model, feeds)[0], on_ort(quantized, feeds)[0]) < FLOOR
    assert float_layers(check_int8(model, X)) == ()
    check_pruned(model, X)


def test_a_quantized_model_is_built_as_it_is():
    body = f"{HEAD} {{ c = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Relu (c) }}"
    quantized = quantize(graph(body, opset=17, **LISTED), X)
    with pytest.raises(NothingToQuantizeError, match=r"(?s)quantized already.*1 QuantizeLinear"):
        quantize(quantized, X)
    engine = quick(quantized, X, int8=True, data=X)
    assert "quantized already" in engine.plan.notes[0]
    assert "data was not used" in engine.plan.notes[0]
    plain = quick(quantized, X)
    assert plain.plan.notes == ()
    ran = [[(layer.op, layer.precision) for layer in each.plan.layers] for each in (engine, plain)]
    assert ran[0] == ran[1]


PARTLY = """(float[n,8] x) => (float[n,8] y) <float s = {0.05}, int8 z = {0}> {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    a = Gemm <transB = 1> (d, w)
    y = Gemm <transB = 1> (a, v)
}"""
QOPERATOR = """(float[n,8] x) => (float[n,8] y) <uint8 z = {0}, int8 p = {0}> {
    q, s, k = DynamicQuantizeLinear (x)
    i = MatMulInteger (q, w, k, p)
    f = Cast <to = 1> (i)
    m = Mul (f, s)
    y = Gemm <transB = 1> (m, v)
}"""


@pytest.mark.parametrize("body", [PARTLY, QOPERATOR])
def test_what_somebody_left_float_stays_float(body):
    first = SQUARE["w"] if body is PARTLY else (SQUARE["w"] * 50).astype(np.int8)
    model = graph(body, opset=17, w=first, v=SQUARE["v"])
    data = {"x": floats(8, 8)}
    with pytest.raises(NothingToQuantizeError, match="quantized already"):
        quantize(model, data)
    engine = quick(model, data, int8=True, data=data)
    assert "quantized already" in engine.plan.notes[0]
    feeds = feeds_of(model, data)
    assert error(on_ort(model, feeds)[0], run(engine, feeds)[0]) < FLOOR


def test_nothing_to_do_at_all():
    data = {"x": floats(4, 8)}
    for body in ("y = Identity (x)", "y = Relu (x)"):
        model = graph(f"(float[n,8] x) => (float[n,8] y) {{ {body} }}", opset=17)
        with pytest.raises(NothingToQuantizeError):
            quantize(model, data)
        engine = quick(model, data, int8=True, data=data, sparsity="force")
        assert "nothing to quantize" in engine.plan.notes[0]
        assert "no layer runs on a sparse kernel" in engine.plan.notes[1]
        feeds = feeds_of(model, data)
        assert error(on_ort(model, feeds)[0], run(engine, feeds)[0]) == 0


def test_a_file_that_does_not_fit_the_data_is_refused_by_the_build_too():
    model = graph(
        "(float[n,8] x) => (float[n,8] y) { y = Gemm <transB = 1> (x, w) }", w=SQUARE["w"]
    )
    for bad in ({"x": floats(4, 7)}, {"z": floats(4, 8)}, {"x": np.full((4, 8), np.nan)}):
        with pytest.raises(InputError):
            build(model, int8=True, data=bad, tuning_effort=0)


def test_operators_of_opset_7():
    """Old spellings: Upsample, attributes that are inputs today, initializers as inputs."""
    body = """agraph (float[n,16,6,6] x, float[8,16,3,3] w) => (float[n,8,6,6] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        d = Dropout <ratio = 0.5> (c)
        s = Slice <axes = [2], starts = [0], ends = [3]> (d)
        u = Squeeze <axes = [1]> (m)
        t = Slice <axes = [2], starts = [3], ends = [6]> (d)
        k = Concat <axis = 2> (s, t)
        a = Add (k, u)
        y = Clip <min = 0.0, max = 6.0> (a)
    }"""
    model = proto(body, '"": 7', w=LISTED["w"], m=floats(1, 1, 8, 1, 1))
    common.RemoveInitializersFromInputsPass()(model)
    quantized = check_int8(model, X)
    assert quantized.opset_imports[""] >= 13
    check_pruned(model, X)


def test_nodes_without_names():
    body = f"{HEAD} {{ c = Conv (x, k) y = Conv <pads = [1, 1, 1, 1]> (c, w) }}"
    model = graph(body, opset=17, k=weights(k=(16, 16, 1, 1))["k"], w=LISTED["w"])
    for node in model.graph:
        node.name = ""
    check_int8(model, X)
    check_pruned(model, X)


def test_prepare_leaves_nothing_of_the_exporter_behind():
    model = in_constant_nodes(
        graph(f"{HEAD} {{ y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }}", **LISTED)
    )
    assert [node.op_type for node in prepare(model).graph] == ["Conv"]


def test_a_file_of_the_first_days(tmp_path):
    """IR version 3: initializers have to be inputs, until they are taken off them."""
    body = """<ir_version: 3, opset_import: ["": 7]>
    agraph (float[n,8] x, float[8,8] w, float[8] b) => (float[n,8] y) {
        c = Gemm <transB = 1> (x, w, b)
        y = Relu (c)
    }"""
    old = onnx.parser.parse_model(body)
    arrays = {"w": SQUARE["w"], "b": np.zeros(8, np.float32)}
    old.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(old, tmp_path / "old.onnx")
    model, data = load_model(tmp_path / "old.onnx"), {"x": floats(8, 8)}
    check_int8(model, data)
    assert check_pruned(model, data) == []
    for changed in (quantize(model, data), prune(model)[0]):
        again = load_model(save_model(changed, tmp_path / "new.onnx"))
        assert error(on_ort(changed, [data])[0], on_ort(again, [data])[0]) == 0


def test_operators_that_onnx_runtime_wrote_into_an_old_opset():
    body = """agraph (float[n,8] x) => (float[n,8] y) {
        a = Gemm <transB = 1> (x, w, b)
        m = LayerNormalization (a, g, b)
        y = Gemm <transB = 1> (m, v, b)
    }"""
    model = proto(body, '"": 12', g=np.ones(8, np.float32), b=np.zeros(8, np.float32), **SQUARE)
    data = {"x": floats(8, 8)}
    assert float_layers(check_int8(model, data)) == ()
    assert check_pruned(model, data) == []
