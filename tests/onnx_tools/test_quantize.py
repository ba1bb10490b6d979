"""Quantized models: where Q/DQ goes, what the numbers are, and what is refused."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, samples, sparse, weights
from twofour.core import numerics
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.inspect import verify_pattern
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize, quantize_with_report
from twofour.onnx_tools.weights import layer_weights


def quantized(model, data=None, **options):
    data = {"x": samples()} if data is None else data
    return quantize(model, data, QuantizeOptions(threads=1, **options))


def readers(model) -> dict[str, list[str]]:
    """Tensor that is quantized -> the nodes that read its rounded values, as `node:input`."""
    found = {}
    for q in model.graph:
        if q.op_type == "QuantizeLinear":
            (dq,) = q.outputs[0].consumers()
            uses = [f"{use.node.name}:{use.idx}" for use in dq.outputs[0].uses()]
            found[q.inputs[0].name] = sorted(uses)
    return found


def scale_names(model) -> dict[str, str]:
    """Tensor that is quantized -> the initializer that holds its scale."""
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    return {node.inputs[0].name: node.inputs[1].name for node in nodes}


def test_residual_network_with_shortcuts_quantized():
    model = quantized(option_a(), add_inputs="shortcut")
    assert readers(model) == {
        "x": ["c1:0"],
        "r1": ["a2:1", "c2:0"],
        "r2": ["c3:0", "s4:0"],
        "r3": ["c4:0"],
        "s4": ["p4:0"],
        "p4": ["a4:0"],
        "r4": ["m:0"],
        "m": ["y:0"],
    }


def test_residual_network_with_both_inputs_of_each_add_quantized():
    both = readers(quantized(option_a(), add_inputs="both"))
    shortcut = readers(quantized(option_a(), add_inputs="shortcut"))
    assert both == shortcut | {"c2": ["a2:0"], "c4": ["a4:1"]}


def test_what_only_moves_keeps_its_scale():
    model = quantized(option_a())
    scales = scale_names(model)
    assert scales["r2"] == scales["s4"] == scales["p4"] == "r2_scale"
    assert len(set(scales.values())) == len(scales) - 2
    # So slicing and padding move the very integers of r2.
    q = {n.inputs[0].name: n.outputs[0] for n in model.graph if n.op_type == "QuantizeLinear"}
    for name in ("r2", "p4"):
        model.graph.outputs.append(q[name])
    _, r2, p4 = run(model, {"x": samples(3)})
    assert np.array_equal(p4[:, 4:12], r2[:, :, ::2, ::2])
    assert not p4[:, :4].any()
    assert not p4[:, 12:].any()


def test_of_two_convolutions_before_an_add_the_longer_stays_fused():
    body = """(float[n,4,8,8] x) => (float[n,8,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        d = Conv (x, v)
        a = Add (d, c)
        y = Relu (a)
    }"""
    model = graph(body, **weights(w=(8, 4, 3, 3), v=(8, 4, 1, 1)))
    assert readers(quantized(model)) == {"x": ["c:0", "d:0"], "d": ["a:0"]}


def test_pre_activation_block():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        n1 = BatchNormalization (c, g, g, g, v)
        r1 = Relu (n1)
        d = Conv <pads = [1, 1, 1, 1]> (r1, w)
        a = Add (d, n1)
        n2 = BatchNormalization (a, g, g, g, v)
        r2 = Relu (n2)
        y = Conv <pads = [1, 1, 1, 1]> (r2, w)
    }"""
    ones = np.ones(4, np.float32)
    model = graph(body, **weights(w=(4, 4, 3, 3)), g=ones, v=ones)
    # n1 was folded into c, whose result has its name; n2 follows an Add and stays.
    assert readers(quantized(model)) == {
        "x": ["c:0"],
        "n1": ["a:1", "r1:0"],
        "r1": ["d:0"],
        "r2": ["y:0"],
    }


ACTIVATIONS = {
    "relu6": "a = Clip (c, zero, six)",
    "hard_swish": "a = HardSwish (c)",
    "hard_swish_by_parts": "k = Add (c, six)\n l = Clip (k, zero, six)\n a = Mul (c, l)",
    "silu": "k = Sigmoid (c)\n a = Mul (c, k)",
    "gelu": "k = Mul (c, half)\n l = Erf (k)\n m = Add (l, six)\n a = Mul (c, m)",
    "gelu_by_tanh": "j = Pow (c, six)\n k = Mul (j, half)\n l = Add (c, k)\n m = Tanh (l)\n"
    " a = Mul (c, m)",
}


@pytest.mark.parametrize("nodes", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_nothing_is_rounded_between_a_layer_and_its_activation(nodes):
    """Also where an Add of the activation looks like a residual one."""
    model = graph(
        f"""(float[n,4,8,8] x) => (float[n,4,8,8] y)
        <float zero = {{0}}, float six = {{6}}, float half = {{0.5}}> {{
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        {nodes}
        y = Conv <pads = [1, 1, 1, 1]> (a, w) }}""",
        **weights(w=(4, 4, 3, 3)),
    )
    assert readers(quantized(model)) == {"x": ["c:0"], "a": ["y:0"]}


def test_a_shortcut_behind_an_activation_is_quantized():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        k = Sigmoid (c)
        a = Mul (c, k)
        d = Conv <pads = [1, 1, 1, 1]> (a, w)
        y = Add (d, a)
    }"""
    model = graph(body, **weights(w=(4, 4, 3, 3)))
    assert readers(quantized(model)) == {"x": ["c:0"], "a": ["d:0", "y:1"]}


def test_max_pooling_moves_integers():
    body = """(float[n,4,8,8] x) => (float[n,4,4,4] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        y = Conv <pads = [1, 1, 1, 1]> (p, w)
    }"""
    model = quantized(graph(body, **weights(w=(4, 4, 3, 3))))
    assert readers(model) == {"x": ["c:0"], "r": ["p:0"], "p": ["y:0"]}
    assert scale_names(model)["p"] == "r_scale"


def test_padding_with_other_values_is_not_moving():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) <int64[8] by = {0,0,1,1,0,0,1,1}> {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        p = Pad (c, by, one)
        y = Conv (p, w)
    }"""
    model = graph(body, **weights(w=(4, 4, 3, 3)), one=np.float32(1))
    assert readers(quantized(model)) == {"x": ["c:0"], "p": ["y:0"]}


def test_excluded_nodes_stay_float():
    model = quantized(option_a(), exclude=("c3", "y*"))
    found = readers(model)
    # r2 is still needed for the shortcut; c3 reads the float tensor beside it.
    assert found["r2"] == ["s4:0"]
    assert "m" not in found
    assert "r4" not in found
    nodes = {node.name: node for node in model.graph}
    assert nodes["c3"].inputs[0].name == "r2"
    assert nodes["c3"].inputs[1].name == "w3"
    assert nodes["y"].inputs[1].name == "fc"


def test_graph_outputs_stay_float():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] r, float[n,4,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        y = Conv <pads = [1, 1, 1, 1]> (r, w)
    }"""
    model = quantized(graph(body, **weights(w=(4, 4, 3, 3))))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["r", "y"]
    assert model.graph.outputs[0].producer().op_type == "Relu"
    assert readers(model) == {"x": ["c:0"], "r": ["y:0"]}


def test_a_weight_used_twice_is_stored_once():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = Conv <pads = [1, 1, 1, 1]> (c, w)
    }"""
    model = quantized(graph(body, **weights(w=(4, 4, 3, 3))))
    kinds = [v.dtype for v in model.graph.initializers.values() if v.shape.rank() == 4]
    assert kinds == [ir.DataType.INT8]


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        ("Gemm <transB = 1> (x, w)", (6, 4), 0),
        ("Gemm (x, w)", (4, 6), 1),
        ("MatMul (x, w)", (4, 6), 1),
    ],
)
def test_scales_run_along_the_output_channels(node, shape, axis):
    model = graph(f"(float[n,4] x) => (float[n,6] y) {{ y = {node} }}", **weights(w=shape))
    data = samples(8, (4,))
    model, source = quantized(model, {"x": data}), model
    (dq,) = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.attributes]
    assert dq.attributes["axis"].value == axis
    assert [v.shape.dims for v in dq.inputs] == [shape, (6,), (6,)]
    (want,), (got,) = run(source, {"x": data}), run(model, {"x": data})
    assert np.abs(want - got).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("activation", ["int8", "uint8"])
@pytest.mark.parametrize("add_inputs", ["shortcut", "both"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_result_is_valid_and_close(tmp_path, activation, add_inputs, method):
    source = option_a()
    options = {"activation": activation, "add_inputs": add_inputs, "method": method}
    model = quantized(source, **options)
    path = save_model(model, tmp_path / "q.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    x = {"x": samples(32, seed=1)}
    (want,), (got,) = run(source, x), run(load_model(path), x)
    noise = np.square(want - got).mean() / np.square(want).mean()
    assert 10 * np.log10(1 / noise) > 20
    again = quantized(source, **options)
    assert ir.to_proto(again) == ir.to_proto(model)


def test_the_given_model_stays_as_it_is():
    source = option_a()
    before = ir.to_proto(source)
    quantized(source)
    assert ir.to_proto(source) == before


@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_activation_kinds(activation):
    model = quantized(option_a(), activation=activation)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            point = node.inputs[2].const_value.numpy()
            assert point.dtype == activation
            # ReLU outputs need no offset, and int8 is symmetric.
            assert point == 0 or (activation, node.inputs[0].name) == ("uint8", "x")


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_sparsity_survives(pattern):
    names = ("w2", "w3", "w4", "fc")
    dense = option_a()
    arrays = {name: dense.graph.initializers[name].const_value.numpy() for name in names}
    model = option_a(**{name: sparse(w, pattern) for name, w in arrays.items()})
    assert verify_pattern(model, pattern, ["w1"]) == []
    after = quantized(model)
    assert verify_pattern(after, pattern, ["w1*"]) == []
    found = {weight.name: weight for _, weight in layer_weights(after)}
    for name in names:
        w8 = found[f"{name}_quantized"].stored
        assert w8.dtype == np.int8
        assert is_pattern(w8, pattern)
        assert not w8[sparse(arrays[name], pattern) == 0].any()
    assert verify_pattern(quantized(dense), pattern)  # and would be seen where it does not hold


def test_sparsity_survives_batch_normalization():
    body = """(float[n,4,8,8] x) => (float[n,8,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        y = BatchNormalization (c, g, b, b, v)
    }"""
    w = sparse(weights(w=(8, 4, 3, 3))["w"])
    rng = np.random.default_rng(0)
    g, b, v = (rng.uniform(0.5, 2, 8).astype(np.float32) for _ in range(3))
    model = graph(body, w=w, g=g, b=b, v=v)
    after = quantized(model)
    assert [n.op_type for n in after.graph if "Linear" not in n.op_type] == ["Conv"]
    ((_, weight),) = layer_weights(after)
    assert is_pattern(weight.stored, "2:4")
    assert [value.name for value in after.graph.outputs] == ["y"]
    x = {"x": samples(4)}
    (want,), (got,) = run(model, x), run(after, x)
    assert np.abs(want - got).max() < 0.05 * np.abs(want).max()


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
        elements=st.floats(-(2.0**60), 2.0**60, width=32),
    ),
    st.integers(0, 2),
)
def test_quantized_weights(w, axis):
    w8, scale = quantize_weight(w, axis)
    assert w8.dtype == np.int8
    assert scale.dtype == np.float32
    assert w8.min() >= -127
    assert not w8[w == 0].any()
    along = scale.reshape([-1 if i == axis else 1 for i in range(3)])
    back = numerics.dequantize(w8, along, 0).astype(np.float64)
    # Half a step, and float32's rounding of scale, quotient and product over 127 steps.
    assert (np.abs(back - w) <= along * (0.5 + 127 * 3 * 2.0**-24)).all()


def test_weights_that_are_not_finite():
    w = weights(w2=(8, 8, 3, 3))["w2"]
    w[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="finite"):
        quantized(option_a(w2=w))


def test_options_say_what_is_calibrated_on():
    calls = []
    quantize(
        option_a(), {"x": samples(40)}, QuantizeOptions(samples=10), lambda *a: calls.append(a)
    )
    assert calls[-1] == (10, 10, "calibrating")
    json.dumps(calls)


def test_nothing_to_quantize():
    model = graph("(float[n,4] x) => (float[n,4] y) { a = Relu (x) y = Sigmoid (a) }")
    with pytest.raises(InputError, match=r"(?s)nothing to quantize.*got 1 Relu, 1 Sigmoid"):
        quantized(model)
    with pytest.raises(InputError, match="nothing to quantize"):
        quantized(graph("(float[4,4] x, float[4,4] w) => (float[4,4] y) { y = MatMul (x, w) }"))
    with pytest.raises(
        InputError,
        match=r"(?s)nothing to quantize.*4 Conv: excluded by name.*1 Gemm: excluded by name",
    ):
        quantized(option_a(), exclude=("*",))


def test_quantized_already():
    with pytest.raises(InputError, match="quantized already"):
        quantized(quantized(option_a()))


def test_foreign_models_quantize(data_folder):
    """Models that a Conv network's rules were not made for still come out valid, and close."""
    rng = np.random.default_rng(0)
    for name, span in (("mlperftiny_resnet8", 255), ("har_cnn", 1)):
        source = load_model(data_folder / "onnx" / f"{name}.onnx")
        (value,) = source.graph.inputs
        shape = [dim if isinstance(dim, int) else 4 for dim in value.shape.dims]
        x = (rng.random((4, *shape[1:])) * span).astype(np.float32)
        model = quantize(source, {value.name: x}, QuantizeOptions(activation="uint8"))
        assert model.opset_imports[""] >= 13
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        x = {value.name: x[: shape[0]]}
        for want, got in zip(run(source, x), run(model, x), strict=True):
            assert np.square(want - got).mean() < 0.05 * np.square(want).mean()


def test_steps_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"(?s)option steps.*'polish'"):
        QuantizeOptions(steps=("polish",))
    assert not QuantizeOptions(recipe="fast").takes("polish")


def test_report_of_what_was_decided():
    found = quantize_with_report(option_a(), {"x": samples()})
    assert set(found.schemes) == set(readers(found.model)) == set(found.scale_of)
    assert found.scale_of["p4"] == "r2"
    scale = found.model.graph.initializers["r2_scale"].const_value.numpy()
    assert found.schemes["p4"].scale == scale
    assert "QuantizeLinear" not in {node.op_type for node in found.floats.graph}
    assert ir.to_proto(quantize(option_a(), {"x": samples()})) == ir.to_proto(found.model)
