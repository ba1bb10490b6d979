"""What is said about weights: patterns, zeros, scales, and where a pattern breaks."""

import json

import numpy as np
import pytest

from tests.graphs import graph
from tests.onnx_tools.networks import option_a, samples, sparse, weights
from twofour.core import numerics
from twofour.core.errors import GateError, InputError
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.inspect import inspect, patterns_of, require_patterns, verify_pattern
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.weights import find_weight, layer_weights


def pruned(*names, pattern="2:4"):
    dense = option_a()
    arrays = {name: dense.graph.initializers[name].const_value.numpy() for name in names}
    return option_a(**{name: sparse(w, pattern) for name, w in arrays.items()})


def by_node(model):
    return {info.node: info for info in inspect(model).weights}


def test_float_model():
    found = inspect(pruned("w2", "w4"))
    assert (found.opset, found.ir_version) == (18, 10)
    assert found.inputs[0].name == "x"
    assert found.inputs[0].shape == ("n", 4, 8, 8)
    assert found.outputs[0].shape == ("n", 5)
    assert found.operators["Conv"] == 4
    assert found.operators["Gemm"] == 1
    layers = {info.node: info for info in found.weights}
    assert list(layers) == ["c1", "c2", "c3", "c4", "y"]
    assert layers["c2"].patterns == ("2:4", "4:8")
    assert layers["c1"].patterns == ()
    assert (layers["c2"].zeros, layers["c1"].zeros) == (0.5, 0)
    assert layers["y"].shape == (5, 16)
    assert layers["c1"].dtype == "float32"
    assert layers["c1"].scale is layers["c1"].input_scale is None
    assert all(info.reason is None for info in found.weights)
    sizes = {info.node: int(np.prod(info.shape)) for info in found.weights}
    share = (sizes["c2"] + sizes["c4"]) / 2 / sum(sizes.values())
    assert found.weight_zeros == pytest.approx(share)


def test_quantized_model():
    model = pruned("w2", "w4", "fc")
    data = {"x": samples()}
    after = quantize(model, data, QuantizeOptions(activation="uint8", method="minmax"))
    layers = by_node(after)
    assert layers["c2"].patterns == ("2:4", "4:8")
    assert layers["y"].patterns == ("2:4", "4:8")
    assert layers["c2"].dtype == "int8"
    _, scales = quantize_weight(model.graph.initializers["w2"].const_value.numpy())
    scale = layers["c2"].scale
    assert (scale.count, scale.dtype, scale.zero_point) == (8, "int8", 0)
    assert (scale.low, scale.high) == (scales.min(), scales.max())
    x = layers["c1"].input_scale
    assert (x.count, x.dtype) == (1, "uint8")
    assert x.zero_point > 0
    values = data["x"]
    assert x.low == x.high == pytest.approx((values.max() - values.min()) / 255)


def test_to_json_is_plain():
    found = inspect(quantize(option_a(), {"x": samples()}))
    assert json.loads(json.dumps(found.to_json()))["weights"][1]["node"] == "c2"


def test_parameters_are_counted_wherever_they_are():
    body = """(float[n,4] x) => (float[n,2] y) {
        w = Constant <value = float[4,2] {1, 2, 3, 4, 5, 6, 7, 8}> ()
        y = Gemm (x, w, b)
    }"""
    found = inspect(graph(body, b=np.zeros(2, np.float32)))
    assert (found.parameters, found.parameter_bytes) == (10, 40)
    assert found.weights[0].shape == (2, 4)


def test_pairs_need_a_block_of_channels():
    w = weights(w=(32, 8))["w"]
    body = "(float[n,8] x) => (float[n,m] y) { y = Gemm <transB = 1> (x, w) }"
    assert by_node(graph(body, w=sparse(w, "2:4/pair")))["y"].patterns[0] == "2:4/pair"
    assert by_node(graph(body, w=sparse(w, "2:4")))["y"].patterns[0] == "2:4"
    assert by_node(graph(body, w=sparse(w[:16], "2:4/pair")))["y"].patterns[0] == "2:4"


def test_a_mask_for_both_directions_is_named():
    w = weights(w=(32, 8))["w"]
    body = "(float[n,8] x) => (float[n,m] y) { y = Gemm <transB = 1> (x, w) }"
    found = by_node(graph(body, w=sparse(w, "2:4/2d")))["y"]
    assert found.patterns == ("2:4/2d", "2:4", "4:8")


def test_a_weight_that_is_nearly_sparse_is_explained():
    model = pruned("w2")
    w = model.graph.initializers["w2"].const_value.numpy().copy()
    w[3, 4:8, 1, 2] = 1
    info = by_node(option_a(w2=w))["c2"]
    assert info.patterns == ()
    assert info.reason == "output channel 3, tap (1,2), channels 4-7 hold 4 nonzeros"


def test_verify_names_each_layer_once_and_skips_what_is_dense_on_purpose():
    model = pruned("w2", "w3", "w4")
    reasons = verify_pattern(model, "2:4")
    assert [reason.split(",")[0] for reason in reasons] == ["Conv 'c1'", "Gemm 'y'"]
    assert "weight 'w1' is not 2:4: output channel 0, tap (0,0), channels 0-3 hold" in reasons[0]
    assert verify_pattern(model, "2:4", ["c1", "f?"]) == []
    assert verify_pattern(model, "4:8", ["c1", "y"]) == []
    with pytest.raises(InputError, match="unknown sparsity pattern"):
        verify_pattern(model, "half")


def test_verify_passes_over_shapes_that_cannot_have_the_pattern():
    model = graph("(float[n,3] x) => (float[n,2] y) { y = MatMul (x, w) }", **weights(w=(3, 2)))
    assert verify_pattern(model, "2:4") == []


def test_patterns_survive_or_are_missed():
    model = pruned("w2", "w3", "fc")
    held = patterns_of(model)
    assert held == {"c2": "2:4", "c3": "2:4", "y": "2:4"}
    require_patterns(quantize(model, {"x": samples()}), held)
    with pytest.raises(GateError, match=r"(?s)1 of 3 weights.*'c3' is not 2:4: output channel 0"):
        require_patterns(pruned("w2", "fc"), held)
    with pytest.raises(GateError, match="'stem' is not 2:4: no such layer"):
        require_patterns(model, {"stem": "2:4"})


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("Gemm <transB = 1> (x, w)", (6, 8)),
        ("Gemm (x, w)", (8, 6)),
        ("MatMul (x, w)", (8, 6)),
        ("MatMul (x, t)", (6, 8)),
    ],
)
def test_input_channels_are_found_in_every_layout(node, shape):
    w = weights(w=shape)["w"]
    first = shape[0] == 6
    w = sparse(w) if first else sparse(w.T).T
    body = f"(float[n,8] x) => (float[n,6] y) {{ t = Transpose <perm = [1, 0]> (w) y = {node} }}"
    model = graph(body, w=w)
    ((_, found),) = layer_weights(model)
    assert np.array_equal(found.values, w if first else w.T)
    assert by_node(model)["y"].patterns == ("2:4", "4:8")


@pytest.mark.parametrize("stored", ["int8", "float"])
@pytest.mark.parametrize("point", [0, 7])
def test_weights_behind_quantization(stored, point):
    w = sparse(weights(w=(6, 8))["w"])
    scale = np.abs(w).max(axis=1) / np.float32(100)
    points = np.full(6, point, np.int8)
    w8 = numerics.quantize(w, scale[:, None], point, np.int8)
    q = "q = QuantizeLinear <axis = 0> (w, s, p)" if stored == "float" else "q = Identity (w8)"
    body = f"""(float[n,8] x) => (float[n,6] y) {{
        {q}
        d = DequantizeLinear <axis = 0> (q, s, p)
        y = Gemm <transB = 1> (x, d)
    }}"""
    model = graph(body, w=w, w8=w8, s=scale, p=points)
    found = find_weight(model.graph[-1])
    assert found.name == ("w" if stored == "float" else "w8")
    assert np.array_equal(found.values, w8.astype(int) - point)
    assert np.array_equal(found.scale, scale)
    info = by_node(model)["y"]
    assert info.patterns == ("2:4", "4:8")
    assert info.scale.zero_point == point


def test_computed_weights_are_passed_over():
    body = """(float[4,4] x) => (float[4,4] y) {
        s = Sigmoid (x)
        a = MatMul (x, s)
        y = Relu (a)
    }"""
    assert inspect(graph(body)).weights == ()


def test_foreign_files(data_folder):
    layers = {}
    for file in sorted((data_folder / "onnx").glob("[a-z]*.onnx")):
        found = inspect(load_model(file))
        json.dumps(found.to_json())
        layers[file.stem] = len(found.weights)
    assert layers["mlperftiny_resnet8"] == 10
    assert layers["ppocr_mobile_v2_cls"] == 54  # weights in Constant nodes
