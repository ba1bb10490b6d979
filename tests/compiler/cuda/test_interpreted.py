"""Whole networks through the compiler for GPUs, their kernels run in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from tests.compiler.cuda.execute import run
from twofour.compiler.cuda.graphs import network_of
from twofour.compiler.cuda.types import Types
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

IMAGES = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[2, 3, 9, 9] x) => (float[2, 5] y)
<float[8, 3, 3, 3] w1, float[8] b1, float[8, 8, 3, 3] w2, float[8] b2, float[16, 8, 1, 1] w3,
 float[5, 16] w4, float[5] b4>
{
  a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1, b1)
  ra = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (ra, w2, b2)
  s = Add (b, ra)
  rs = Relu (s)
  p = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (rs)
  c = Conv <kernel_shape = [1, 1]> (p, w3)
  h = HardSwish (c)
  m = GlobalAveragePool (h)
  f = Flatten (m)
  y = Gemm <transB = 1> (f, w4, b4)
}
"""
LAST = (
    IMAGES.replace("ra = Relu (a)", "ga = Sigmoid (a) ra = Mul (a, ga)")
    .replace("s = Add (b, ra)", "gb = Sigmoid (b) hb = Mul (b, gb) rs = Add (hb, ra)")
    .replace("  rs = Relu (s)\n", "")
)
"""A residual behind its activation, as detectors have it."""
TEXTS = """
<ir_version: 10, opset_import: ["" : 20]>
net (int64[2, 6] ids, float[2, 1, 1, 6] mask) => (float[2, 6, 32] y)
<float[20, 32] table, float[32] gamma, float[32] beta, float[32, 32] wq, float[32, 32] wk,
 float[32, 32] wv, float[32] bias, float[32, 64] wi, float[64] bi, float[64, 32] wo,
 int64[4] split, float scale>
{
  e = Gather (table, ids)
  x = LayerNormalization <axis = -1, epsilon = 0.00001> (e, gamma, beta)
  q0 = MatMul (x, wq)
  q1 = Add (q0, bias)
  q2 = Reshape (q1, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q2)
  k0 = MatMul (x, wk)
  k1 = Add (k0, bias)
  k2 = Reshape (k1, split)
  k = Transpose <perm = [0, 2, 3, 1]> (k2)
  v0 = MatMul (x, wv)
  v1 = Add (v0, bias)
  v2 = Reshape (v1, split)
  v = Transpose <perm = [0, 2, 1, 3]> (v2)
  t0 = MatMul (q, k)
  t1 = Mul (t0, scale)
  t2 = Add (t1, mask)
  t = Softmax <axis = -1> (t2)
  o0 = MatMul (t, v)
  o1 = Transpose <perm = [0, 2, 1, 3]> (o0)
  back = Constant <value_ints = [2, 6, 32]> ()
  o = Reshape (o1, back)
  r = Add (o, x)
  n = LayerNormalization <axis = -1, epsilon = 0.00001> (r, gamma, beta)
  i0 = MatMul (n, wi)
  i1 = Add (i0, bi)
  g = Gelu (i1)
  z = MatMul (g, wo)
  y = Add (z, n)
}
"""


def model_of(text: str) -> ir.Model:
    """The model; what it declares and nobody computes gets random numbers."""
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(1)
    for info in proto.graph.value_info:
        shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        if info.name == "split":
            array: np.ndarray = np.array([2, 6, 2, 16])
        elif info.name == "scale":
            array = np.array(0.25, np.float32)
        else:
            wide = random.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
            array = wide.astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    """Random inputs."""
    random = np.random.default_rng(2)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = tuple(value.shape.numpy())
        if value.name == "ids":
            found["ids"] = random.integers(0, 20, shape)
        elif value.name == "mask":
            found["mask"] = np.where(random.random(shape) < 0.3, -1e30, 0).astype(np.float32)
        else:
            found[value.name] = random.standard_normal(shape).astype(np.float32)
    return found


def reference(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


CASES = {
    "images": (IMAGES, Types("float32"), False, 1e-5),
    "images_half": (IMAGES, Types("float16"), False, 5e-3),
    "images_int8": (IMAGES, Types("float16"), True, 0.02),
    "images_float8": (IMAGES, Types("float16", "float8e4m3fn"), True, 0.1),
    "last": (LAST, Types("float32"), False, 1e-5),
    "last_int8": (LAST, Types("float16"), True, 0.02),
    "texts": (TEXTS, Types("float32"), False, 1e-5),
    "texts_half": (TEXTS, Types("float16"), False, 5e-3),
    "texts_int8": (TEXTS, Types("float16"), True, 0.03),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lowered_network_computes_what_the_model_means(case: str, which: int) -> None:
    text, types, quantized, bound = CASES[case]
    model = model_of(text)
    feeds = feeds_of(model)
    wanted = reference(model, feeds)
    source = model
    if quantized:
        source = quantize(model, [feeds], QuantizeOptions(activation="int8"))
        wanted = reference(source, feeds) if types.quantized == "int8" else wanted
    network = network_of(source, {}, types, forced=False, dump=None)
    got = run(network, feeds, which)
    for name, expected in wanted.items():
        error = np.linalg.norm(got[name] - expected) / np.linalg.norm(expected)
        assert error <= bound, f"{case}, recipe {which}: {name} is off by {error:.3g}"
