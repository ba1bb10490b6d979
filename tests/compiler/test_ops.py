"""Every fused operator: its function is valid ONNX and means what the numpy definition says."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from twofour.compiler import ops
from twofour.compiler.bases import DYNAMIC
from twofour.core import numerics
from twofour.core.functions import Activation

SCALES = {"x": 0.05, "res": 0.07, "a": 0.03, "b": 0.04, "y": 0.11}
ZERO_POINTS = {"x": 3, "res": -4, "a": 5, "b": 0, "y": -2}
ATTRIBUTES = {
    "strides": (2, 1),
    "pads": (1, 0, 1, 1),
    "dilations": (1, 2),
    "group": 2,
    "keepdims": 0,
    "kernel_shape": (2, 3),
    "count_include_pad": 1,
    "steps": (2, 3),
    "channel_pads": (1, 2),
    "low": -0.75,
    "high": 6.0,
}
MORE = ("LayerNorm", "Attention", "Tokens")  # what tokens are for: test_ops_tokens.py


def conv(x, w, bias):
    """Direct float64 convolution with ATTRIBUTES, x [B,C,H,W], w [N,C/2,kh,kw]."""
    (sh, sw), (top, left, bottom, right), (dh, dw) = (
        ATTRIBUTES[k] for k in ("strides", "pads", "dilations")
    )
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, c, kh, kw = w.shape
    out_h = (x.shape[2] - (kh - 1) * dh - 1) // sh + 1
    out_w = (x.shape[3] - (kw - 1) * dw - 1) // sw + 1
    y = np.zeros((x.shape[0], n, out_h, out_w))
    for o in range(n):
        first = c * (o // (n // 2))
        for i in range(kh):
            for j in range(kw):
                patch = x[:, first : first + c, i * dh :: sh, j * dw :: sw][:, :, :out_h, :out_w]
                y[:, o] += np.einsum("bchw,c->bhw", patch, w[o, :, i, j].astype(np.float64))
    return y + bias[None, :, None, None]


def random_inputs(variant):
    """Arrays for every input of the variant; int8 activations."""
    random = np.random.default_rng(7)
    shape = {"QGemm": (2, 3, 8), "Gemm": (2, 3, 8)}.get(variant.base, (1, 4, 7, 9))
    out = {"QGemm": (2, 3, 6), "Gemm": (2, 3, 6)}.get(variant.base, (1, 6, 4, 8))
    weight = (6, 8) if "Gemm" in variant.base else (6, 2, 3, 2)
    arrays = {}
    for name in variant.inputs:
        root = name.removesuffix("_scale").removesuffix("_zero_point")
        quantized = f"{root}_scale" in variant.inputs or variant.base in ("QMaxPool", "SlicePad")
        if name == "w_scale":
            arrays[name] = random.uniform(0.01, 0.02, 6).astype(np.float32)
        elif name.endswith("_scale"):
            arrays[name] = np.array(SCALES[root], np.float32)
        elif name.endswith("_zero_point"):
            arrays[name] = np.array(ZERO_POINTS[root], np.int8)
        elif name == "bias":
            arrays[name] = random.normal(size=6).astype(np.float32)
        elif name == "value":
            arrays[name] = np.array(-7, np.int8)
        else:
            dims = {"w": weight, "res": out}.get(name, shape)
            if name == "b" and variant.base == "QMulFloat":
                dims = (*shape[:2], 1, 1)
            arrays[name] = (
                random.integers(-128, 128, dims).astype(np.int8)
                if quantized
                else random.normal(size=dims).astype(np.float32)
            )
    return arrays


def real(arrays, name):
    """The float32 value of an input."""
    if f"{name}_scale" not in arrays:
        return arrays[name]
    scale = arrays[f"{name}_scale"]
    if name == "w":
        return numerics.dequantize(arrays["w"], scale.reshape(-1, *[1] * (arrays["w"].ndim - 1)), 0)
    return numerics.dequantize(arrays[name], scale, arrays[f"{name}_zero_point"])


def expected(variant, arrays):
    """The float64 result before quantization."""
    if variant.base in ("QConv", "Conv"):
        value = conv(real(arrays, "x"), real(arrays, "w"), arrays["bias"])
    elif variant.base in ("QGemm", "Gemm"):
        value = real(arrays, "x").astype(np.float64) @ real(arrays, "w").T + arrays["bias"]
    elif variant.base == "QAdd":
        value = real(arrays, "a").astype(np.float64) + real(arrays, "b")
    elif variant.base in ("QActivation", "Silu", "Gelu", "GeluTanh"):
        value = real(arrays, "x").astype(np.float64)
    elif variant.base in ("QMul", "QMulFloat"):
        value = real(arrays, "a").astype(np.float64) * real(arrays, "b")
    elif variant.base == "QAveragePool":
        around = ((0, 0), (0, 0), (1, 1), (0, 1))
        x = np.pad(real(arrays, "x").astype(float), around)
        windows = np.lib.stride_tricks.sliding_window_view(x, (2, 3), (2, 3))[:, :, ::2]
        value = windows.mean((4, 5))
    elif variant.base == "QGlobalAveragePool":
        value = real(arrays, "x").mean((2, 3), dtype=np.float64)
    elif variant.base == "QMaxPool":
        around = ((0, 0), (0, 0), (1, 1), (0, 1))
        x = np.pad(arrays["x"].astype(float), around, constant_values=-999)
        windows = np.lib.stride_tricks.sliding_window_view(x, (2, 3), (2, 3))[:, :, ::2]
        return windows.max((4, 5))
    else:
        padded = ((0, 0), (1, 2), (0, 0), (0, 0))
        return np.pad(arrays["x"][:, :, ::2, ::3], padded, constant_values=-7)
    res = real(arrays, "res") if variant.add else 0
    before, behind = (0, res) if variant.add_last else (res, 0)
    return activated(variant.activation or variant.base, value + before) + behind


def activated(name, x):
    """The activation of that name in float64; x where the name is of no activation."""
    sigmoid = 1 / (1 + np.exp(-x))
    root, cubic = np.sqrt(2 / np.pi), x + 0.044715 * x**3
    return {
        "Relu": np.maximum(x, 0),
        "Clip": np.clip(x, ATTRIBUTES["low"], ATTRIBUTES["high"]),
        "HardSwish": x * np.clip(x / 6 + 0.5, 0, 1),
        "HardSigmoid": np.clip(x / 6 + 0.5, 0, 1),
        "Sigmoid": sigmoid,
        "Silu": x * sigmoid,
        "Gelu": 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "GeluTanh": 0.5 * x * (1 + np.tanh(root * cubic)),
        "Tanh": np.tanh(x),
    }.get(name, x)


def fused_model(variant, arrays, opset):
    """A model of that one node; every input is a graph input."""
    values = {
        name: ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in arrays.items()
    }
    source = ir.node("Conv", [], name="layer1")
    node = ops.make_node(variant, values, ATTRIBUTES, source)
    quantized = variant.quantized_out or variant.base in ("QMaxPool", "SlicePad")
    node.outputs[0].name = "y"
    node.outputs[0].dtype = ir.DataType.INT8 if quantized else ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape([None] * expected(variant, arrays).ndim)
    graph = ir.Graph(
        list(values.values()), node.outputs, nodes=[node], opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    ops.attach_functions(model)
    return model


def _elsewhere(variant):
    """Whether it stands in another file: transformers, bfloat16, quantization at run time."""
    if variant.base in DYNAMIC:
        return True
    return variant.base.endswith((*MORE, "NormQ", "NormB")) or variant.base.startswith("B")


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("variant", [v for v in ops.variants() if not _elsewhere(v)], ids=str)
def test_the_function_means_what_numpy_says(variant, opset):
    arrays = random_inputs(variant)
    proto = ir.serde.serialize_model(fused_model(variant, arrays, opset))
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    (got,) = session.run(None, arrays)
    want = expected(variant, arrays)
    assert got.shape == want.shape
    if variant.quantized_out:
        want = numerics.quantize(want, arrays["y_scale"], arrays["y_zero_point"])
        # Float sums in another order may cross one rounding boundary.
        assert got.dtype == np.int8
        assert np.abs(got.astype(int) - want).max() <= 1
        assert np.mean(got != want) < 0.01
    elif variant.base in ("QMaxPool", "SlicePad"):
        assert (got == want).all()
    else:
        # K <= 12 products, a residual and a bias, every |term| < 64: 16 * 64 * 2**-24.
        assert np.abs(got - want).max() <= 16 * 64 * 2.0**-24


def test_types_are_read_back():
    types = [str(variant) for variant in ops.variants()]
    bases = [variant.base for variant in ops.variants()]
    count = {base: bases.count(base) for base in ("QConv", "Gemm", "QAdd")}
    assert count == {"QConv": (3 * 10 + 2 * 7) * 2, "Gemm": 2 * 10, "QAdd": 10}
    assert len(types) == len(set(types))
    assert [ops.parse_type(text) for text in types] == ops.variants()


def test_float_residual_and_float_output_are_told_apart():
    quantized_residual = ops.parse_type("QConvAddF")
    float_residual = ops.parse_type("QConvAddFloat")
    assert quantized_residual.float_out
    assert not float_residual.float_out
    assert "res_scale" in quantized_residual.inputs
    assert "res_scale" not in float_residual.inputs


@pytest.mark.parametrize(
    "text",
    [
        *("QConvReluAdd", "ConvAddSiluAdd", "GemmSiluAdd", "ConvSiluAddFloat"),
        *("QMaxPoolRelu", "ConvF", "ConvAddFloat", "Relu", ""),
    ],
)
def test_other_types_are_refused(text):
    with pytest.raises(ValueError, match=r"has no (operator|variant)"):
        ops.parse_type(text)


def test_a_node_is_read():
    variant = ops.parse_type("QConvAddRelu")
    model = fused_model(variant, random_inputs(variant), 17)
    op = ops.parse_op(model.graph[0])
    assert (op.name, op.op_type, op.base) == ("layer1", "QConvAddRelu", "QConv")
    assert (op.has_add, op.add_is_float, op.float_out) == (True, False, False)
    assert op.activation == Activation("Relu")
    assert op.inputs["res_zero_point"].name == "res_zero_point"
    assert op.attributes == {k: ATTRIBUTES[k] for k in ("strides", "pads", "dilations", "group")}
    assert op.output.name == "y"


def test_the_bounds_of_a_clip_are_attributes():
    variant = ops.parse_type("GemmClip")
    op = ops.parse_op(fused_model(variant, random_inputs(variant), 17).graph[0])
    assert op.activation == Activation("Clip", -0.75, 6.0)
    assert op.attributes == {"low": -0.75, "high": 6.0}


def test_names_that_hold_another_name():
    assert ops.parse_type("GeluTanh") == ops.Variant("GeluTanh")
    assert ops.parse_type("GemmGeluTanh") == ops.Variant("Gemm", activation="GeluTanh")
    assert ops.parse_type("QConvHardSigmoidF") == ops.Variant("QConv", "", "HardSigmoid", True)


def test_a_residual_behind_an_activation_is_told_from_one_before_it():
    last, first = ops.parse_type("QConvSiluAddF"), ops.parse_type("QConvAddSiluF")
    assert (last.add, last.add_last, last.float_out) == ("Add", True, True)
    assert (first.add, first.add_last, first.inputs) == ("Add", False, last.inputs)
    assert ops.parse_type("QConvSiluAddFloat").add == "AddFloat"


def test_a_node_with_missing_inputs_is_refused():
    node = ir.node("QMaxPool", [], domain=ops.DOMAIN, name="pool")
    with pytest.raises(ValueError, match="'pool': expected the inputs x, got 0"):
        ops.parse_op(node)


def test_a_node_with_other_attributes_is_refused():
    node = ir.node("QMaxPool", [ir.val("x")], {"ceil_mode": 1}, domain=ops.DOMAIN, name="pool")
    with pytest.raises(ValueError, match=r"attributes \['kernel_shape', "):
        ops.parse_op(node)


def test_a_standard_node_is_refused():
    with pytest.raises(ValueError, match="not an operator of domain"):
        ops.parse_op(ir.node("Conv", [ir.val("x")], name="conv"))


def test_functions_follow_their_use():
    variant = ops.parse_type("QConvF")
    model = fused_model(variant, random_inputs(variant), 17)
    assert [key[1] for key in model.functions] == ["QConvF"]
    model.graph.outputs.clear()
    model.graph.remove(model.graph[0])
    ops.attach_functions(model)
    assert not model.functions
