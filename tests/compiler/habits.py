"""Small models in the manner of each exporter, as files: text of ONNX, and what text cannot say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(11)
X = "(float[N,3,8,8] x) => "


def w(*shape: int) -> np.ndarray:
    """Weights that keep values near 1."""
    return (RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@dataclass(frozen=True)
class Habit:
    """A model.

    Attributes:
        body: in ONNX text.
        opset: of the standard domain.
        weights: initializers by name.
        domains: further operator sets.
        ir_version: of the file.
        change: what is done to the model after that.
        shape: of input x, where it is open.
        highest: of integer inputs.
    """

    body: str
    opset: int = 13
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    domains: str = ""
    ir_version: int = 8
    change: Callable[[onnx.ModelProto], None] | None = None
    shape: tuple[int, ...] = (2, 3, 8, 8)
    highest: int = 2

    def proto(self) -> onnx.ModelProto:
        """The model."""
        domains = f', "{self.domains}": 1' if self.domains else ""
        head = f'<ir_version: {self.ir_version}, opset_import: ["": {self.opset}{domains}]>'
        proto = onnx.parser.parse_model(f"{head} g {self.body}")
        proto.graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in self.weights.items()
        )
        if self.change is not None:
            self.change(proto)
        return proto


def listed(proto: onnx.ModelProto) -> None:
    """Initializers are inputs too, as before IR version 4."""
    for tensor in proto.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(info)


def as_nodes(proto: onnx.ModelProto) -> None:
    """Every initializer is a Constant node."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    rest = list(proto.graph.node)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend([*nodes, *rest])


def into_bodies(proto: onnx.ModelProto) -> None:
    """The weights lie within the body of each control flow operator that reads them."""
    for node in proto.graph.node:
        for attribute in node.attribute:
            read = {name for inner in attribute.g.node for name in inner.input}
            attribute.g.initializer.extend(t for t in proto.graph.initializer if t.name in read)
    del proto.graph.initializer[:]


def as_sparse(proto: onnx.ModelProto) -> None:
    """The weight is stored by its parts that are not zero."""
    (tensor,) = proto.graph.initializer
    array = numpy_helper.to_array(tensor).reshape(-1)
    places = np.flatnonzero(array)
    parts = [numpy_helper.from_array(array[places], tensor.name),
             numpy_helper.from_array(places, "places")]  # fmt: skip
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(*parts, list(tensor.dims)))
    del proto.graph.initializer[:]


def with_function(proto: onnx.ModelProto) -> None:
    """The graph calls a function that calls another."""
    for text in (
        '<domain: "own", opset_import: ["": 17]> Half (a) => (b)'
        "{ h = Constant <value_float = 0.5> () b = Mul (a, h) }",
        '<domain: "own", opset_import: ["": 17, "own": 1]> Layer (a, k) => (c)'
        "{ m = MatMul (a, k) b = own.Half (m) c = Relu (b) }",
    ):
        proto.functions.append(onnx.parser.parse_function(text))


def with_wrong_shapes(proto: onnx.ModelProto) -> None:
    """The notes of the file about its values are of another input size."""
    info = helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 4, 99, 99])
    proto.graph.value_info.append(info)


RECURRENT = "(float[5,1,6] x) => (float[5,DIRS,1,4] y, float[DIRS,1,4] h)"


def recurrent(op: str, gates: int, directions: int) -> Habit:
    """An LSTM, GRU or RNN between matrix products."""
    body = RECURRENT.replace("DIRS", str(directions))
    way = "bidirectional" if directions == 2 else "forward"
    weights = {"k": w(6, 6), "i": w(directions, gates * 4, 6), "r": w(directions, gates * 4, 4),
               "b": w(directions, gates * 8)}  # fmt: skip
    node = f'{op} <hidden_size = 4, direction = "{way}"> (m, i, r, b)'
    return Habit(f"{body} {{ m = MatMul (x, k) y, h = {node} }}", 14, weights)


OLD_CNN = Habit(
    f"{X} (float[N,5] y) {{ a = Conv <pads = [1,1,1,1], kernel_shape = [3,3]> (x, k, b)"
    " n = BatchNormalization (a, g, s, m, v) r = Clip <min = 0.0, max = 6.0> (n)"
    " d = Dropout <ratio = 0.5> (r) p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (d)"
    " e = Pad <pads = [0,0,1,1,0,0,1,1]> (p) u = Upsample <mode = \"nearest\","
    " scales = [1.0,1.0,2.0,2.0]> (e) q = AveragePool <kernel_shape = [2,2], strides = [2,2]> (u)"
    " l = Slice <axes = [2,3], starts = [1,1], ends = [5,5]> (q)"
    " t = ReduceMean <axes = [2,3], keepdims = 0> (l) y = Gemm <transB = 1> (t, f, c) }",
    7,
    {"k": w(4, 3, 3, 3), "b": w(4), "g": w(4), "s": w(4), "m": w(4), "v": np.abs(w(4)),
     "f": w(5, 4), "c": w(5)},
    ir_version=3,
    change=listed,
)  # fmt: skip

SHAPES = Habit(
    "(float[N,8,8,3] x) => (float[N,M] y) <int64[1] zero = {0}, int64[1] one = {1},"
    " int64[1] rest = {-1}> { t = Transpose <perm = [0,3,1,2]> (x) a = Conv (t, k)"
    " n = Transpose <perm = [0,2,3,1]> (a) s = Shape (n) c = Cast <to = 6> (s)"
    " d = Cast <to = 7> (c) f = Slice (d, zero, one, zero) g = Concat <axis = 0> (f, rest)"
    " y = Reshape (n, g) }",
    weights={"k": w(4, 3, 3, 3)},
    change=as_nodes,
    shape=(2, 8, 8, 3),
)

HABITS = {
    "pytorch of opset 7": OLD_CNN,
    "upsample of opset 9": Habit(
        f"{X} (float[N,4,16,16] y) <float[4] s = {{1, 1, 2, 2}}> {{ a = Conv <pads=[1,1,1,1]>"
        ' (x, k) y = Upsample <mode = "linear"> (a, s) }', 9, {"k": w(4, 3, 3, 3)}, ir_version=4),
    "shrinking of opset 10": Habit(
        f"{X} (float[N,4,6,6] y, float[N,4,12,12] z) <float[4] s = {{1, 1, 0.75, 0.75}},"
        f" float[4] t = {{1, 1, 1.5, 1.5}}> {{ a = Conv <pads = [1,1,1,1]> (x, k)"
        f" y = Resize (a, s) z = Resize (a, t) }}", 10, {"k": w(4, 3, 3, 3)}),
    "split, squeeze and sum of opset 11": Habit(
        "(float[N,6] x) => (float[N,3] y, float[N] z) { a, b = Split <axis = 1> (x)"
        " u = Unsqueeze <axes = [1]> (a) m = MatMul (u, k) y = Squeeze <axes = [1]> (m)"
        " z = ReduceSum <axes = [1], keepdims = 0> (b) }", 11, {"k": w(3, 3)}, shape=(2, 6)),
    "tf2onnx": SHAPES,
    "paddle": Habit(
        f"{X} (float[N,4,16,16] y) <float[4] s = {{1, 1, 2, 2}}> {{ a = Conv <pads = [1,1,1,1]>"
        " (x, k) c = Add (a, b) n = BatchNormalization (c, g, g, g, v) h = HardSwish (n)"
        ' y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric",'
        ' nearest_mode = "floor"> (h, , s) }', 14,
        {"k": w(4, 3, 3, 3), "b": w(1, 4, 1, 1), "g": w(4), "v": np.abs(w(4))}, change=as_nodes),
    "wrong notes of shapes": Habit(
        f"{X} (float[N,4,8,8] y) {{ a = Conv <pads = [1,1,1,1]> (x, k) y = Relu (a) }}",
        weights={"k": w(4, 3, 3, 3)}, change=with_wrong_shapes),
    "functions": Habit(
        "(float[N,6] x) => (float[N,5] y) { y = own.Layer (x, k) }", 17, {"k": w(6, 5)}, "own",
        change=with_function, shape=(2, 6)),
    "sparse": Habit("(float[N,6] x) => (float[N,5] y) { y = MatMul (x, k) }", 17,
                    {"k": np.where(w(6, 5) > 0, w(6, 5), 0)}, change=as_sparse, shape=(2, 6)),
    "weights in branches": Habit(
        "(float[N,6] x, bool b) => (float[N,5] y) { a = MatMul (x, k) y = If"
        " <then_branch = t () => (float[N,5] p) { p = MatMul (a, l) },"
        " else_branch = e () => (float[N,5] q) { n = Neg (a) q = MatMul (n, m) }> (b) }", 17,
        {"k": w(6, 6), "l": w(6, 5), "m": w(6, 5)}, shape=(2, 6), change=lambda proto: (
            into_bodies(proto), proto.graph.initializer.append(
                numpy_helper.from_array(w(6, 6), "k")))[0]),
    "loop": Habit(
        "(float[N,6] x, int64 n) => (float[N,6] y, float[T,N,6] z) <bool t = {1}>"
        "{ a = MatMul (x, k) y, z = Loop <body = b (int64 i, bool go, float[N,6] v) =>"
        " (bool on, float[N,6] r, float[N,6] s) { on = Identity (go) m = MatMul (v, k)"
        " r = Tanh (m) s = Add (r, a) }> (n, t, a) }", 17, {"k": w(6, 6)}, shape=(2, 6)),
    "scan": Habit(
        "(float[6] x, float[4,6] s) => (float[6] y, float[4,6] z) { a = Mul (x, k)"
        " y, z = Scan <num_scan_inputs = 1, body = b (float[6] v, float[6] u) =>"
        " (float[6] r, float[6] q) { m = Mul (v, k) r = Add (m, u) q = Neg (r) }> (a, s) }", 17,
        {"k": w(6)}),
    "lstm": recurrent("LSTM", 4, 2),
    "gru": recurrent("GRU", 3, 1),
    "rnn": recurrent("RNN", 1, 2),
    "detections": Habit(
        "(float[1,9,4] x, float[1,2,9] s) => (int64[D,3] y, float[1,9,4] z)"
        " <int64 m = {3}, float i = {0.5}, float t = {0.1}> { z = MatMul (x, k)"
        " y = NonMaxSuppression (z, s, m, i, t) }", weights={"k": w(4, 4)}),
    "top of the data": Habit(
        "(float[N,6] x) => (float[N,2] v, int64[N,2] i, float[M,6] y) <int64[1] n = {2}>"
        "{ a = MatMul (x, k) v, i = TopK (a, n) z = NonZero (v) t = Gather <axis = 0> (z, g)"
        " y = Gather <axis = 0> (a, t) }", 17,
        {"k": w(6, 6), "g": np.array(0)}, shape=(2, 6)),
    "unique": Habit("(float[N,6] x) => (float[M] y) { a = MatMul (x, k) r = Round (a)"
                    " y = Unique <sorted = 1> (r) }", 17, {"k": w(6, 6)}, shape=(2, 6)),
    "sequences": Habit(
        "(float[N,6] x) => (float[N,6] y) <int64 i = {1}, int64 n = {3}> { a = MatMul (x, k)"
        " p = SplitToSequence <axis = 1> (a, n) q = SequenceAt (p, i) m = MatMul (q, l)"
        " r = SequenceInsert (p, m) t = SequenceErase (r, i)"
        " y = ConcatFromSequence <axis = 1> (t) }", 17, {"k": w(6, 6), "l": w(3, 3)},
        shape=(2, 6)),
    "texts within": Habit(
        "(int64[N,6] x) => (int64[N,6] y) { a = ai.onnx.ml.LabelEncoder <keys_int64s = [0, 1, 2],"
        ' values_strings = ["a", "b", "c"], default_string = "z"> (x)'
        " y = ai.onnx.ml.LabelEncoder <keys_strings = [\"a\", \"c\"], values_int64s = [7, 9],"
        " default_int64 = -1> (a) }", 17, domains="ai.onnx.ml", shape=(2, 6),
        change=lambda proto: setattr(proto.opset_import[1], "version", 2)),
    "scikit-learn": Habit(
        "(float[N,3] x) => (float[N,2] y) { a = ai.onnx.ml.Scaler <offset = [0.5, 0.1, 0.0],"
        " scale = [2.0, 1.0, 3.0]> (x) y = ai.onnx.ml.LinearRegressor <targets = 2,"
        " coefficients = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], intercepts = [1.0, 2.0]> (a) }", 15,
        domains="ai.onnx.ml", shape=(2, 3)),
    "halves": Habit("(float16[N,6] x) => (float16[N,5] y) { a = MatMul (x, k) y = Relu (a) }", 17,
                    {"k": w(6, 5).astype(np.float16)}, shape=(2, 6)),
    "halves within": Habit(
        "(float[N,6] x) => (float[N,5] y) { h = Cast <to = 10> (x) a = MatMul (h, k)"
        " y = Cast <to = 1> (a) }", 17, {"k": w(6, 5).astype(np.float16)}, shape=(2, 6)),
    "doubles": Habit("(double[N,6] x) => (double[N,5] y) { a = MatMul (x, k) y = Relu (a) }", 17,
                     {"k": w(6, 5).astype(np.float64)}, shape=(2, 6)),
    "bytes of an image": Habit(
        "(uint8[N,8,8,3] x) => (float[N,4,6,6] y) <float c = {255}> { f = Cast <to = 1> (x)"
        " d = Div (f, c) t = Transpose <perm = [0,3,1,2]> (d) y = Conv (t, k) }", 17,
        {"k": w(4, 3, 3, 3)}, shape=(2, 8, 8, 3), highest=255),
    "tokens and lengths": Habit(
        "(int32[N,6] x, int64[2] u, bool[2,6] v) => (float[N,6,5] y, int64[2] z)"
        "{ e = Gather <axis = 0> (t, x) m = MatMul (e, k) f = Cast <to = 1> (v)"
        " g = Unsqueeze (f, a) y = Mul (m, g) z = Neg (u) }", 17,
        {"t": w(3, 6), "k": w(6, 5), "a": np.array([2])}, shape=(2, 6)),
    "dynamic quantization": Habit(
        "(float[N,6] x) => (float[N,5] y) { q, s, z = DynamicQuantizeLinear (x)"
        " i = MatMulInteger (q, k, z, o) f = Cast <to = 1> (i) g = Mul (s, c) y = Mul (f, g) }", 17,
        {"k": RANDOM.integers(0, 255, (6, 5)).astype(np.uint8), "o": np.uint8(128),
         "c": np.float32(0.01)}, shape=(2, 6)),
    "constant and passed through": Habit(
        "(float[N,6] x) => (float[N,6] y, float[2] z, float[N,6] x2, float[N,6] y2)"
        "{ y = Relu (x) z = Constant <value_floats = [1.0, 2.0]> () x2 = Identity (x)"
        " y2 = Identity (y) }", 17, shape=(2, 6)),
    "no input": Habit("() => (float[2] y) { a = Constant <value_floats = [1.0, -2.0]> ()"
                      " y = Relu (a) }", 17),
    "newest opset": Habit(
        "(float[N,6] x) => (float[N,5] y) { a = MatMul (x, k) g = Gelu (a) y = Softmax (g) }", 24,
        {"k": w(6, 5)}, ir_version=11, shape=(2, 6)),
}  # fmt: skip

MICROSOFT = {
    "fused convolutions": Habit(
        f"{X} (float[N,4,4,4] y) {{ a = com.microsoft.FusedConv <pads = [1,1,1,1],"
        ' activation = "Relu"> (x, k) s = Shape (a) h = Div (s, two) c = com.microsoft.FusedConv'
        ' <pads = [1,1,1,1], strides = [2,2], activation = "Relu"> (a, l) d = Mul (h, two)'
        " r = Reshape (a, d) m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)"
        " y = Add (c, m) }", weights={"k": w(4, 3, 3, 3), "l": w(4, 4, 3, 3),
                                      "two": np.array([1, 1, 1, 1])}),
    "nchwc": Habit(
        "(float[1,16,8,8] x) => (float[1,16,8,8] y) { r = com.microsoft.nchwc.ReorderInput (x)"
        ' c = com.microsoft.nchwc.Conv <activation = "Relu", kernel_shape = [1,1]> (r, k)'
        " o = com.microsoft.nchwc.ReorderOutput <channels = 16> (c) y = Relu (o) }",
        weights={"k": w(16, 16, 1, 1)}, domains="com.microsoft.nchwc"),
    "a layer of bert": Habit(
        "(int32[N,6] x, int32[N,6] m) => (float[N,6,8] y) <int32[1] u = {6}>"
        "{ e, i = com.microsoft.EmbedLayerNormalization (x, , t, p, , g, b)"
        " a = com.microsoft.Attention <num_heads = 2> (e, k, c) o = MatMul (a, l)"
        " n = com.microsoft.SkipLayerNormalization (o, e, g, b, b) f = MatMul (n, f1)"
        " h = com.microsoft.BiasGelu (f, c1) q = MatMul (h, f2)"
        " y = com.microsoft.SkipLayerNormalization (q, n, g, b) }", 17,
        {"t": w(3, 8), "p": w(6, 8), "g": w(8), "b": w(8), "k": w(8, 24), "c": w(24),
         "l": w(8, 8), "f1": w(8, 12), "c1": w(12), "f2": w(12, 8)}, shape=(2, 6)),
    "weights of four bits": Habit(
        "(float[N,32] x) => (float[N,4] y) { a = com.microsoft.MatMulNBits <K = 32, N = 8,"
        " bits = 4, block_size = 16> (x, q, s) y = MatMul (a, k) }", 17,
        {"q": RANDOM.integers(0, 255, (8, 2, 8)).astype(np.uint8), "s": np.abs(w(16)),
         "k": w(8, 4)}, shape=(2, 32)),
    "quantized on the way": Habit(
        "(float[N,6] x) => (float[N,5] y) { a = com.microsoft.DynamicQuantizeMatMul (x, q, s, z)"
        " g = com.microsoft.FastGelu (a) y = MatMul (g, k) }", 17,
        {"q": RANDOM.integers(-9, 9, (6, 4)).astype(np.int8), "s": np.float32(0.1),
         "z": np.int8(0), "k": w(4, 5)}, shape=(2, 6)),
    "quantized operators": Habit(
        "(float[N,3,8,8] x) => (float[N,4,8,8] y) <float sx = {0.02}, uint8 zx = {128},"
        " float sy = {0.031}, uint8 zy = {0}> { q = QuantizeLinear (x, sx, zx)"
        " a = QLinearConv <pads = [1,1,1,1]> (q, sx, zx, k, sk, zk, sy, zy)"
        " b = QLinearConv (a, sy, zy, l, sk, zk, sy, zy)"
        " c = com.microsoft.QLinearAdd (a, sy, zy, b, sy, zy, sy, zy)"
        " y = DequantizeLinear (c, sy, zy) }", weights={
            "k": RANDOM.integers(-99, 99, (4, 3, 3, 3)).astype(np.int8), "sk": np.float32(0.003),
            "l": RANDOM.integers(-99, 99, (4, 4, 1, 1)).astype(np.int8), "zk": np.int8(0)}),
}  # fmt: skip
