"""The form that quantization starts from: equal results, and each refusal to fold."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph, op_types, run
from tests.onnx_tools.networks import samples, weights
from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.prepare import fold_batchnorm, prepare


def norm_constants(channels=8):
    rng = np.random.default_rng(1)
    names = ("gamma", "beta", "mean", "variance")
    return {name: rng.uniform(0.5, 2, channels).astype(np.float32) for name in names}


def conv_norm(nodes, **more):
    body = f"(float[n,4,8,8] x) => (float[n,8,8,8] y) {{ {nodes} }}"
    return graph(body, **weights(w=(8, 4, 3, 3), b=(8,)), **norm_constants(), **more)


CONV = "c = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
NORM = "BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, variance)"


@pytest.mark.parametrize("bias", ["b", ""])
@pytest.mark.parametrize("tail", [f"y = {NORM}", f"r = {NORM} y = Relu (r)"])
def test_batch_normalization_is_folded(bias, tail):
    model = conv_norm(CONV.replace(", b)", f", {bias})" if bias else ")") + " " + tail)
    after = model.clone()
    assert fold_batchnorm(after) == 1
    assert "BatchNormalization" not in op_types(after)
    assert [value.name for value in after.graph.outputs] == ["y"]
    (want,), (got,) = run(model, {"x": samples(2)}), run(after, {"x": samples(2)})
    # 36 products a sum, in float32 with factors rounded twice.
    assert np.abs(want - got).max() <= 64 * 2.0**-23 * np.abs(want).max()


def test_the_weight_keeps_its_name():
    model = conv_norm(f"{CONV} y = {NORM}")
    fold_batchnorm(model)
    assert [value.name for value in model.graph[0].inputs] == ["x", "w", "b"]


def test_a_shared_weight_is_not_changed_for_the_others():
    nodes = f"{CONV} m = {NORM} d = Conv <pads = [1, 1, 1, 1]> (x, w, b) y = Add (m, d)"
    model = conv_norm(nodes)
    after = prepare(model)
    (want,), (got,) = run(model, {"x": samples(2)}), run(after, {"x": samples(2)})
    assert "BatchNormalization" not in op_types(after)
    assert np.abs(want - got).max() <= 64 * 2.0**-23 * np.abs(want).max()


@pytest.mark.parametrize(
    "nodes",
    [
        f"{CONV} m = {NORM} y = Add (m, c)",
        f"c = Relu (x8) y = {NORM}",
        f"{CONV} y = {NORM}".replace("gamma", "x1"),
    ],
    ids=["the sums are used elsewhere", "after no convolution", "computed factor"],
)
def test_what_is_not_folded(nodes):
    body = f"(float[n,4,8,8] x, float[n,8,8,8] x8, float[8] x1) => (float[n,8,8,8] y) {{ {nodes} }}"
    model = graph(body, **weights(w=(8, 4, 3, 3), b=(8,)), **norm_constants())
    assert fold_batchnorm(model) == 0
    assert "BatchNormalization" in op_types(model)


def test_sums_that_are_a_graph_output_are_not_folded():
    body = f"(float[n,4,8,8] x) => (float[n,8,8,8] c, float[n,8,8,8] y) {{ {CONV} y = {NORM} }}"
    model = graph(body, **weights(w=(8, 4, 3, 3), b=(8,)), **norm_constants())
    assert fold_batchnorm(model) == 0


def test_training_mode_is_not_folded():
    nodes = f"{CONV} y, v, s = " + NORM.replace("<", "<training_mode = 1, ")
    assert fold_batchnorm(conv_norm(nodes)) == 0


def test_constants_become_initializers():
    body = """(float[n,4] x) => (float[n,6] y) {
        w = Constant <value = float[2,2] {1, 2, 3, 4}> ()
        four = Constant <value_ints = [4, 6]> ()
        big = Expand (one, four)
        y = MatMul (x, big)
    }"""
    after = prepare(graph(body, one=np.ones((1, 1), np.float32)))
    assert op_types(after) == ["MatMul"]
    assert after.graph[0].inputs[1].is_initializer()


def test_identities_are_taken_out():
    body = """(float[n,4] x) => (float[n,4] y, float[n,4] z) {
        a = Identity (x)
        b = Relu (a)
        y = Identity (b)
        z = Identity (x)
    }"""
    model = graph(body)
    after = prepare(model)
    assert op_types(after) == ["Relu", "Identity"]  # z needs one: x cannot have two names
    assert [value.name for value in after.graph.outputs] == ["y", "z"]
    x = {"x": samples(2, (4,))}
    for want, got in zip(run(model, x), run(after, x), strict=True):
        assert np.array_equal(want, got)


def test_functions_are_inlined():
    text = """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
    g (float[n,4] x) => (float[n,4] y) { y = mine.twice (x) }
    <domain: "mine", opset_import: ["": 17]> twice (a) => (b) { c = Relu (a) b = Add (c, c) }"""
    assert op_types(prepare(ir.from_onnx_text(text))) == ["Relu", "Add"]


def test_old_opsets_are_converted(data_folder):
    model = load_model(data_folder / "onnx" / "har_cnn.onnx")
    assert model.opset_imports[""] == 9
    after = prepare(model)
    assert after.opset_imports[""] == 17
    names = [value.name for value in after.graph.inputs]
    assert names == [value.name for value in model.graph.inputs]
    shape = [d if isinstance(d, int) else 2 for d in model.graph.inputs[0].shape.dims]
    x = {names[0]: np.random.default_rng(0).random(shape, np.float32)}
    for want, got in zip(run(model, x), run(after, x), strict=True):
        assert np.array_equal(want, got)


def test_an_old_opset_that_cannot_be_converted():
    body = '(float[2,4] x) => (float[2,4] y) { y = Upsample <mode = "nearest"> (x, s) }'
    model = graph(body, opset=9, s=np.ones(2, np.float32))
    model.opset_imports[""] = 6
    with pytest.raises(UnsupportedError, match="cannot be converted from opset 6 to 17"):
        prepare(model)


def test_the_given_model_stays_as_it_is():
    model = conv_norm(f"{CONV} y = {NORM}")
    before = ir.to_proto(model)
    prepare(model)
    assert ir.to_proto(model) == before
