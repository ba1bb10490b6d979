"""Small models to start from: one for each part of a file format that can be broken."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

HEAD = '<ir_version: 9, opset_import: ["" : {opset}, "local" : 1, "com.microsoft" : 1]>'

BODIES = {
    "convolutions": """g (float[n,3,12,12] x) => (float[n,10] y) {
        a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w3x16, b16)
        b = BatchNormalization <epsilon = 0.001> (a, g16, b16, b16, v16)
        c = Relu (b)
        d = Conv <pads = [1,1,1,1], group = 16> (c, w1x16)
        e = Clip (d, zero, six)
        f = Conv (e, p16x16)
        t = Add (f, c)
        m = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (t)
        p = GlobalAveragePool (m)
        q = Flatten <axis = 1> (p)
        y = Gemm <transB = 1> (q, fc, b10)
    }""",
    "quantized": """g (float[1,16,6,6] x) => (float[1,16,6,6] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        w = DequantizeLinear <axis = 0> (wq, ws)
        a = Conv <pads = [1,1,1,1]> (d, w, b16)
        r = Relu (a)
        q2 = QuantizeLinear (r, s, z)
        d2 = DequantizeLinear (q2, s, z)
        a2 = Conv <pads = [1,1,1,1]> (d2, w)
        t = Add (a2, d)
        q3 = QuantizeLinear (t, s, z)
        y = DequantizeLinear (q3, s, z)
    }""",
    "tokens": """g (int64[b,t] ids) => (float[b,t,32] y) {
        e = Gather (table, ids)
        n = LayerNormalization <axis = -1> (e, g32, b32)
        q = MatMul (n, m32x32)
        k = MatMul (n, m32x32)
        v = MatMul (n, m32x32)
        qs = Reshape (q, heads)
        ks = Reshape (k, heads)
        vs = Reshape (v, heads)
        qt = Transpose <perm = [0,2,1,3]> (qs)
        kt = Transpose <perm = [0,2,3,1]> (ks)
        vt = Transpose <perm = [0,2,1,3]> (vs)
        qk = MatMul (qt, kt)
        sc = Mul (qk, six)
        p = Softmax <axis = -1> (sc)
        o = MatMul (p, vt)
        ot = Transpose <perm = [0,2,1,3]> (o)
        f = Reshape (ot, flat)
        y = Add (f, e)
    }""",
    "shapes": """g (float[1,4,5,5] x) => (float[a,b,c,d] y, float[m,o] z) {
        xs = Shape (x)
        two = Constant <value = int64[1] {2}> ()
        c = ConstantOfShape <value = float[1] {1.5}> (dims)
        r = Range (i0, i6, i1)
        rf = Cast <to = 1> (r)
        t = Tile (rf, two)
        e = Expand (t, wide)
        p = Pad <mode = "constant"> (x, pads)
        u = Resize <mode = "nearest"> (p, , scales)
        h = Slice (u, starts, ends)
        k = ConstantOfShape (xs)
        y = Add (h, k)
        j = MatMul (e, c)
        z = Relu (j)
    }""",
    "control": """g (float[2,3] x, bool cond) => (float[2,3] y, float[2,3] w) {
        n = Constant <value = int64 {3}> ()
        t = Constant <value = bool {1}> ()
        y = If (cond) <
            then_branch = yes () => (float[2,3] a) { a = Relu (x) },
            else_branch = no () => (float[2,3] b) {
                c = Constant <value_float = 2.0> ()
                b = Mul (x, c)
            }
        >
        w = Loop (n, t, x) <
            body = step (int64 i, bool go, float[2,3] v) => (bool on, float[2,3] u) {
                on = Identity (go)
                u = Add (v, x)
            }
        >
    }""",
    "recurrent": """g (float[4,1,8] x) => (float[4,1,1,8] y, float[1,1,8] h) {
        y, h = LSTM <hidden_size = 8> (x, lw, lr)
    }""",
    "vendor": """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
        a = com.microsoft.FusedConv <activation = "Relu", pads = [1,1,1,1]> (x, w8x8, b8)
        y = local.twice (a)
    }
    <domain: "local", opset_import: ["" : 17]>
    twice (p) => (q) {
        k = Constant <value_float = 2.0> ()
        q = Mul (p, k)
    }""",
    "integers": """g (float[3,8] x, uint8[3,8] u) => (float[3,4] y, int32[3,4] z) {
        q = QuantizeLinear (x, s, z8)
        m = MatMulInteger (q, i8x4, z8)
        f = Cast <to = 1> (m)
        y = Mul (f, s)
        z = MatMulInteger (u, i8x4)
    }""",
}


def _arrays() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0)

    def real(*shape: int) -> np.ndarray:
        return values.normal(scale=0.3, size=shape).astype(np.float32)

    return {
        "w3x16": real(16, 3, 3, 3), "w1x16": real(16, 1, 3, 3), "p16x16": real(16, 16, 1, 1),
        "w8x8": real(8, 8, 3, 3), "fc": real(10, 16), "m32x32": real(32, 32),
        "table": real(50, 32), "lw": real(1, 32, 8), "lr": real(1, 32, 8),
        "b8": real(8), "b10": real(10), "b16": real(16), "b32": real(32), "g16": real(16),
        "g32": real(32), "v16": np.abs(real(16)) + 1,
        "zero": np.float32(0), "six": np.float32(6), "s": np.float32(0.05),
        "z": np.uint8(128), "z8": np.uint8(3),
        "wq": values.integers(-128, 128, (16, 16, 3, 3)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32),
        "i8x4": values.integers(-128, 128, (8, 4)).astype(np.int8),
        "heads": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32]),
        "dims": np.array([12, 3]), "wide": np.array([2, 12]),
        "i0": np.array(0), "i1": np.array(1), "i6": np.array(6),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "starts": np.array([0, 0, 2, 2]), "ends": np.array([1, 4, 7, 7]),
    }  # fmt: skip


def generated() -> dict[str, onnx.ModelProto]:
    """Valid models by name."""
    arrays, models = _arrays(), {}
    for name, body in BODIES.items():
        model = parser.parse_model(HEAD.format(opset=18 if name == "shapes" else 17) + body)
        read = {value for node in model.graph.node for value in node.input}
        tensors = [numpy_helper.from_array(v, k) for k, v in arrays.items() if k in read]
        model.graph.initializer.extend(tensors)
        models[name] = model
    models["sparse"] = _sparse()
    return models


def _sparse() -> onnx.ModelProto:
    """A weight that is stored as its values and where they are."""
    values = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    places = helper.make_tensor("", TensorProto.INT64, [3], [0, 5, 9])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [2, 4])],
        [info("y", TensorProto.FLOAT, [2, 3])],
        sparse_initializer=[helper.make_sparse_tensor(values, places, [4, 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
