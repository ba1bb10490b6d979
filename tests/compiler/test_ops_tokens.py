"""The fused operators of transformers: their functions mean what core/ defines."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from twofour.compiler import ops
from twofour.core import numerics
from twofour.core.attention import attention
from twofour.core.norm import layer_norm

RANDOM = np.random.default_rng(3)
HEADS, CHANNELS = 2, 8
BATCH, QUERIES, KEYS = 2, 5, 5
SCALE = 0.35
NUMBERS = {"q": (0.03, 7), "k": (0.02, 0), "v": (0.05, 0), "y": (0.02, -3)}
OPSETS = (17, 18, 21)


def outputs(variant, arrays, attributes, opset):
    """What ONNX Runtime computes for a model of that one node."""
    values = {
        name: ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in arrays.items()
    }
    node = ops.make_node(variant, values, attributes, ir.node("Softmax", [], name="layer"))
    for name, value in zip(variant.outputs, node.outputs, strict=True):
        quantized = variant.quantized_out or name == "q"
        value.name, value.dtype = name, ir.DataType.INT8 if quantized else ir.DataType.FLOAT
        value.shape = ir.Shape([None] * 3)
    graph = ir.Graph(
        list(values.values()), node.outputs, nodes=[node], opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    ops.attach_functions(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return session.run(None, arrays)


def quantizer(name):
    scale, zero = NUMBERS[name]
    return {
        f"{name}_scale": np.array(scale, np.float32),
        f"{name}_zero_point": np.array(zero, np.int8),
    }


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("op_type", ["LayerNorm", "QLayerNorm", "LayerNormQ"])
def test_layer_norm(op_type, opset):
    x, gamma, beta = (
        RANDOM.normal(size=dims).astype(np.float32) for dims in ((2, 5, 24), (24,), (24,))
    )
    arrays = {"x": x, "gamma": gamma, "beta": beta}
    if op_type != "LayerNorm":
        arrays |= quantizer("y")
    found = outputs(ops.parse_type(op_type), arrays, {"epsilon": 1e-3}, opset)
    want = layer_norm(x, gamma, beta, 1e-3)
    if op_type != "QLayerNorm":
        # Sums of 24 in another order, |x| < 8 after normalizing, |gamma| < 4.
        assert np.abs(found.pop(0) - want).max() <= 24 * 8 * 4 * 2.0**-24
    if op_type != "LayerNorm":
        q = numerics.quantize(want, *NUMBERS["y"], np.int8)
        assert np.abs(found[0].astype(int) - q).max() <= 1
        assert np.mean(found[0] != q) < 0.02


def in_heads(x):
    """[batch, length, heads * channels] -> [batch, heads, length, channels]."""
    return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)


def mask_of(variant):
    """A mask that hides some keys, and from one query all of them."""
    mask = RANDOM.normal(size=(BATCH, 1, QUERIES, KEYS)).astype(np.float32)
    mask[0, 0, :, 3:] = -np.inf
    mask[1, 0, 2] = -np.inf
    return mask if variant.mask == "Mask" else None


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("mask", ["", "Mask", "Causal"])
def test_attention(mask, opset):
    variant = ops.Variant("Attention", mask=mask)
    arrays = {
        name: RANDOM.normal(size=(BATCH, n, HEADS * CHANNELS)).astype(np.float32)
        for name, n in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
    }
    added = mask_of(variant)
    want = attention(*map(in_heads, arrays.values()), SCALE, added, mask == "Causal")
    if added is not None:
        arrays["mask"] = added
    (got,) = outputs(variant, arrays, {"heads": HEADS, "scale": SCALE}, opset)
    assert got.shape == (BATCH, QUERIES, HEADS * CHANNELS)
    # Scores below 8 * 16 in size, off by 9 roundings; exp carries that to shares, |v| < 5.
    assert np.abs(in_heads(got) - want).max() <= 2 * 5 * 9 * 128 * 2.0**-24
    if mask == "Mask":
        assert not in_heads(got)[1, :, 2].any(), "a query that sees no key gets zeros"


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("float_out", [False, True])
@pytest.mark.parametrize("mask", ["", "Mask", "Causal"])
def test_quantized_attention(mask, float_out, opset):
    variant = ops.Variant("QAttention", float_out=float_out, mask=mask)
    arrays = {
        name: RANDOM.integers(-128, 128, (BATCH, n, HEADS * CHANNELS)).astype(np.int8)
        for name, n in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
    }
    real = [in_heads(numerics.dequantize(array, *NUMBERS[name])) for name, array in arrays.items()]
    added = mask_of(variant)
    want = attention(*real, SCALE, added, mask == "Causal")
    for name in "qkv":
        arrays |= quantizer(name)
    if added is not None:
        arrays["mask"] = added
    if not float_out:
        arrays |= quantizer("y")
    (got,) = outputs(variant, arrays, {"heads": HEADS, "scale": SCALE}, opset)
    if float_out:
        # As above, with scores below 8 * 4 * 2.5 in size and |v| < 6.4.
        assert np.abs(in_heads(got) - want).max() <= 2 * 6.4 * 9 * 80 * 2.0**-24
        return
    off = np.abs(in_heads(got).astype(int) - numerics.quantize(want, *NUMBERS["y"], np.int8))
    assert off.max() <= 1
    assert np.mean(off) < 0.02


@pytest.mark.parametrize("opset", OPSETS)
def test_tokens(opset):
    x = RANDOM.normal(size=(2, 3, 4, 5)).astype(np.float32)
    (got,) = outputs(ops.Variant("Tokens"), {"x": x}, {}, opset)
    assert np.array_equal(got, x.reshape(2, 3, 20).swapaxes(1, 2))


def test_one_scale_for_each_channel_of_a_product():
    """What joined projections need: QuantizeLinear along the channels."""
    x = RANDOM.integers(-128, 128, (2, 5, 8)).astype(np.int8)
    w = RANDOM.integers(-127, 128, (6, 8)).astype(np.int8)
    y_scale = RANDOM.uniform(0.5, 2, 6).astype(np.float32)
    arrays = {
        "x": x,
        "x_scale": np.array(0.1, np.float32),
        "x_zero_point": np.array(0, np.int8),
        "w": w,
        "w_scale": np.full(6, 0.1, np.float32),
        "bias": np.zeros(6, np.float32),
        "y_scale": y_scale,
        "y_zero_point": np.full(6, 2, np.int8),
    }
    (got,) = outputs(ops.Variant("QGemm"), arrays, {}, 17)
    sums = x.astype(int) @ w.T.astype(int) * 0.01
    want = numerics.quantize(sums.astype(np.float32), y_scale, 2, np.int8)
    assert np.abs(got.astype(int) - want).max() <= 1
    assert np.mean(got != want) < 0.02
