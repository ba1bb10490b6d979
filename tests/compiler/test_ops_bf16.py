"""The operators in bfloat16: their functions are those in float32 between Casts."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.compiler.test_ops import ATTRIBUTES
from twofour.compiler import ops
from twofour.core.bfloat16 import ROUNDING, round_bf16

RANDOM = np.random.default_rng(5)
BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
MORE = {"factors": (2, 3), "heads": 2, "scale": 0.35, "epsilon": 1e-5}
# The same operator in float32, by base.
FLOATS = {
    "BConv": "Conv",
    "BGemm": "Gemm",
    "BLayerNorm": "LayerNorm",
    "LayerNormB": "LayerNorm",
    "BAttention": "Attention",
    "BSlicePad": "SlicePad",
}
RANKS = {"Conv": 4, "Repeat": 4, "SlicePad": 4, "MaxPool": 4, "GlobalAveragePool": 2}  # others: 3
MOVING = ("BMaxPool", "BGlobalAveragePool", "BRepeat")
VARIANTS = [v for v in ops.variants() if v.base in (*FLOATS, *MOVING)]


def arrays_of(variant):
    """Float32 arrays for every input; those that may be held in bfloat16 are rounded."""
    tokens, image = (2, 5, 16), (1, 4, 7, 9)
    conv = variant.base == "BConv"
    shapes = {
        "x": image if variant.base not in ("BGemm", "BLayerNorm", "LayerNormB") else tokens,
        "w": (6, 2, 3, 2) if conv else (6, 16),
        "bias": (6,),
        "res": (1, 6, 4, 8) if conv else (2, 5, 6),
        "mask": (2, 1, 1, 5),
        "value": (),
        **dict.fromkeys(("gamma", "beta"), (16,)),
        **dict.fromkeys("qkv", tokens),
    }
    arrays = {name: RANDOM.normal(size=shapes[name]).astype(np.float32) for name in variant.inputs}
    return {n: round_bf16(a) if n in ("x", "w", "res", *"qkv") else a for n, a in arrays.items()}


def outputs(variant, arrays, held, opset):
    """What ONNX Runtime computes; the inputs named in `held` are bfloat16 in the graph."""
    inputs = {n: ir.val(n, FLOAT, array.shape) for n, array in arrays.items()}
    casts = {n: ir.node("Cast", [inputs[n]], {"to": int(BFLOAT16)}) for n in held}
    operands = {n: casts[n].outputs[0] if n in casts else v for n, v in inputs.items()}
    node = ops.make_node(variant, operands, {**ATTRIBUTES, **MORE}, ir.node("Conv", [], name="l"))
    ends = [ir.node("Cast", [value], {"to": int(FLOAT)}) for value in node.outputs]
    for name, end in zip(variant.outputs, ends, strict=True):
        end.outputs[0].name, end.outputs[0].dtype = name, FLOAT
        end.outputs[0].shape = ir.Shape([None] * RANKS.get(variant.base.removeprefix("B"), 3))
    nodes = [*casts.values(), node, *ends]
    results = [end.outputs[0] for end in ends]
    graph = ir.Graph(
        list(inputs.values()), results, nodes=nodes, opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    ops.attach_functions(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, arrays)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_function_rounds_the_result_of_the_one_in_float32(variant, opset):
    arrays = arrays_of(variant)
    held = [name for name in ("x", "w", "res", *"qkv") if name in arrays]
    held = [] if "Norm" in variant.base else held
    got = outputs(variant, arrays, held, opset)
    want = reference(variant, arrays, opset)
    rounds = variant.rounded_out or "q" in variant.outputs
    # Nothing is lost on the way in; ONNX Runtime rounds results to nearest, ties to even.
    assert np.array_equal(got[-1], round_bf16(want) if rounds else want)
    if "q" in variant.outputs:
        assert np.array_equal(got[0], want)


def reference(variant, arrays, opset):
    """The operator in float32, on the same values."""
    if variant.base in FLOATS:
        same = replace(variant, base=FLOATS[variant.base], float_out=False)
        return outputs(same, arrays, (), opset)[0]
    if variant.base == "BRepeat":
        return arrays["x"].repeat(2, 2).repeat(3, 3)
    if variant.base == "BGlobalAveragePool":
        text = f"g (float[1,4,7,9] x) => (float[1,4] y) {{ {mean_text(opset)} }}"
    else:
        text = (
            "g (float[1,4,7,9] x) => (float[N,C,H,W] y) { y = MaxPool <kernel_shape = [2, 3],"
            " strides = [2, 1], pads = [1, 0, 1, 1]> (x) }"
        )
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    return ort.InferenceSession(model.SerializeToString()).run(None, arrays)[0]


def mean_text(opset):
    if opset < 18:
        return "y = ReduceMean <axes = [2, 3], keepdims = 0> (x)"
    return "axes = Constant <value_ints = [2, 3]> () y = ReduceMean <keepdims = 0> (x, axes)"


def test_operands_may_be_float32():
    """A depthwise Conv reads float32; a residual may be either."""
    variant = ops.parse_type("BConvAddRelu")
    arrays = arrays_of(variant)
    mixed = {**arrays, "x": arrays["x"] + np.float32(1e-4), "w": arrays["w"] * np.float32(1.001)}
    (got,) = outputs(variant, mixed, ("res",), 18)
    exact = reference(variant, mixed, 18)
    rounded = reference(variant, {n: round_bf16(a) for n, a in mixed.items()}, 18)
    assert np.array_equal(got, round_bf16(exact))
    assert not np.array_equal(round_bf16(rounded), got)
    assert np.abs(got - exact).max() <= ROUNDING * np.abs(exact).max()
