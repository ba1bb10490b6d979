"""Where quantization goes in transformers: into attention, not into the stream of floats."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.test_quantize import readers, scale_names
from twofour.core.errors import InputError
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

S, H, D = 4, 2, 8
C = H * D
HEADS = "".join(
    f"{x}l = MatMul (n, w{x})\n {x}b = Add ({x}l, b{x})\n {x}s = Reshape ({x}b, split)\n"
    f" {x}h = Transpose <perm = [0, 2, {order}]> ({x}s)\n "
    for x, order in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
)
ATTENTION = (
    "qk = Mul (qh, half)\n s = MatMul (qk, kh)\n t = Add (s, mask)\n"
    " p = Softmax <axis = -1> (t)\n o = MatMul (p, vh)\n"
    " u = Transpose <perm = [0, 2, 1, 3]> (o)\n a = Reshape (u, join)\n "
)
BLOCK = (
    "n = LayerNormalization (x, gamma, beta)\n "
    + HEADS
    + ATTENTION
    + "m = MatMul (a, wo)\n r = Add (m, n)\n z = LayerNormalization (r, gamma, beta)\n"
    " f = MatMul (z, wf)\n g = Relu (f)\n e = MatMul (g, we)\n i = Add (e, z)\n"
    " y = LayerNormalization (i, gamma, beta)"
)

LAST = "y = LayerNormalization (i, gamma, beta)"


def constants(body):
    random = np.random.default_rng(2)

    def weights(*shape):
        return (random.normal(size=shape) / np.sqrt(C)).astype(np.float32)

    given = {f"w{x}": weights(C, C) for x in "qkvo"} | {f"b{x}": weights(C) for x in "qkv"}
    given |= {"wf": weights(C, 2 * C), "we": weights(2 * C, C), "wj": weights(C, 3 * C)}
    given |= {"gamma": np.ones(C, np.float32), "beta": weights(C), "half": np.float32(0.35)}
    given |= {"split": np.array([0, 0, H, D]), "join": np.array([0, 0, C])}
    return {name: value for name, value in given.items() if name in body}


def block(body=BLOCK):
    inputs = f"float[n,{S},{C}] x, float[n,1,1,{S}] mask"
    return graph(f"({inputs}) => (float[n,{S},{C}] y) {{ {body} }}", **constants(body))


def data(count=12):
    random = np.random.default_rng(count)
    mask = np.where(random.random((count, 1, 1, S)) < 0.2, -1e4, 0).astype(np.float32)
    return {"x": random.normal(size=(count, S, C)).astype(np.float32), "mask": mask}


def quantized(model, **options):
    return quantize(model, data(), QuantizeOptions(threads=1, **options))


LAYERS = {
    "n": ["kl:0", "ql:0", "vl:0"],
    "o": ["u:0"],
    "u": ["a:0"],
    "a": ["m:0"],
    "z": ["f:0"],
    "g": ["e:0"],
}
PRODUCTS = {"qb": ["qs:0"], "kb": ["ks:0"], "vb": ["vs:0"], "p": ["o:0"]}


def test_both_products_of_attention_take_integers():
    found = readers(quantized(block()))
    assert found == LAYERS | PRODUCTS


def test_the_stream_stays_float():
    """The residual adds read what LayerNorm computed, not what the next product rounds."""
    nodes = {node.name: node for node in quantized(block()).graph}
    assert [value.name for value in nodes["r"].inputs] == ["m", "n"]
    assert [value.name for value in nodes["i"].inputs] == ["e", "z"]


@pytest.mark.parametrize(
    "body",
    [
        BLOCK.replace("y = Layer", "j = Layer") + "\n y = Relu (j)",
        BLOCK.replace(LAST, "i0 = Reshape (i, join)\n y = LayerNormalization (i0, gamma, beta)"),
    ],
)
def test_what_follows_may_move_first(body):
    nodes = {node.name: node for node in quantized(block(body)).graph}
    assert [value.name for value in nodes["i"].inputs] == ["e", "z"]


def test_a_mean_over_channels_is_a_normalization_too():
    end = (
        " mean = ReduceMean (i, last)\n d = Sub (i, mean)\n d2 = Mul (d, d)\n"
        " v = ReduceMean (d2, last)\n w = Add (v, half)\n ro = Sqrt (w)\n y = Div (d, ro)"
    )
    body = BLOCK.replace(" y = LayerNormalization (i, gamma, beta)", end)
    model = graph(
        f"(float[n,{S},{C}] x, float[n,1,1,{S}] mask) => (float[n,{S},{C}] y) {{ {body} }}",
        **constants(body),
        last=np.array([-1]),
    )
    nodes = {node.name: node for node in quantized(model).graph}
    assert [value.name for value in nodes["i"].inputs] == ["e", "z"]


def test_a_sum_that_no_normalization_follows_is_a_residual_as_ever():
    body = BLOCK.replace(
        "i = Add (e, z)\n y = LayerNormalization (i, gamma, beta)", "y = Add (e, z)"
    )
    assert readers(quantized(block(body)))["z"] == ["f:0", "y:1"]


def test_without_attention_the_products_stay_float():
    assert readers(quantized(block(), attention=False)) == LAYERS


def test_excluded_products_stay_float():
    assert readers(quantized(block(), exclude=("o",))) == {
        name: uses for name, uses in LAYERS.items()
    }
    assert "p" not in readers(quantized(block(), exclude=("p",)))


@pytest.mark.parametrize(
    ("activation", "scale", "kind"), [("int8", 1 / 127, np.int8), ("uint8", 1 / 255, np.uint8)]
)
def test_the_softmax_spans_0_to_1_and_operands_are_symmetric(activation, scale, kind):
    model = quantized(block(), activation=activation)
    initializers = model.graph.initializers
    q = {n.inputs[0].name: n for n in model.graph if n.op_type == "QuantizeLinear"}
    assert initializers[scale_names(model)["p"]].const_value.numpy() == np.float32(scale)
    zero = q["p"].inputs[2].const_value.numpy()
    assert (zero.dtype, int(zero)) == (kind, 0)
    for name in ("qb", "kb", "vb"):
        zero = q[name].inputs[2].const_value.numpy()
        assert (zero.dtype, int(zero)) == (np.int8, 0)


@pytest.mark.parametrize("spelling", ["Split", "Slice"])
def test_each_part_of_a_joint_projection_has_its_own_scale(spelling):
    parts = "j = MatMul (n, wj)\n js = Reshape (j, three)\n "
    parts += "jt = Transpose <perm = [2, 0, 3, 1, 4]> (js)\n "
    if spelling == "Split":
        parts += "q1, k1, v1 = Split <axis = 0, num_outputs = 3> (jt)\n "
    else:
        parts += "".join(f"{x}1 = Slice (jt, i{i}, i{i + 1}, i0)\n " for i, x in enumerate("qkv"))
    parts += "".join(f"{x}h0 = Squeeze ({x}1, i0)\n " for x in "qkv")
    parts += "kh = Transpose <perm = [0, 1, 3, 2]> (kh0)\n "
    body = BLOCK.replace(HEADS, parts).replace("(qh,", "(qh0,").replace(", vh)", ", vh0)")
    model = graph(
        f"(float[n,{S},{C}] x, float[n,1,1,{S}] mask) => (float[n,{S},{C}] y) {{ {body} }}",
        **constants(body),
        three=np.array([0, 0, 3, H, D]),
        **{f"i{i}": np.array([i]) for i in range(4) if f"i{i}" in body},
    )
    found, scales = readers(quantized(model)), scale_names(quantized(model))
    assert {"q1", "k1", "v1", "p"} <= set(found)
    assert "j" not in found
    assert len({scales[name] for name in ("q1", "k1", "v1")}) == 3


def test_zeros_in_place_of_nan_are_part_of_the_softmax():
    guard = "p0 = Softmax <axis = -1> (t)\n nan = IsNaN (p0)\n p = Where (nan, nought, p0)\n"
    body = BLOCK.replace("p = Softmax <axis = -1> (t)\n", guard)
    model = graph(
        f"(float[n,{S},{C}] x, float[n,1,1,{S}] mask) => (float[n,{S},{C}] y) {{ {body} }}",
        **constants(body),
        nought=np.float32(0),
    )
    assert readers(quantized(model)) == LAYERS | PRODUCTS


def test_a_softmax_that_is_no_attention_is_left_alone():
    body = "m = MatMul (x, wq)\n p = Softmax <axis = -1> (m)\n y = MatMul (p, wo)"
    model = graph(f"(float[n,{S},{C}] x) => (float[n,{S},{C}] y) {{ {body} }}", **constants(body))
    found = readers(quantize(model, {"x": data()["x"]}, QuantizeOptions(threads=1)))
    assert found == {"x": ["m:0"], "p": ["y:0"]}
    scale = quantize(model, {"x": data()["x"]}, QuantizeOptions(threads=1, activation="uint8"))
    number = scale.graph.initializers[scale_names(scale)["p"]].const_value.numpy()
    assert number != np.float32(1 / 255), "its range is measured"


@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_results_are_close(activation):
    source, feeds = block(), data(8)
    (want,), (got,) = run(source, feeds), run(quantized(source, activation=activation), feeds)
    cosine = (want * got).sum() / np.sqrt((want * want).sum() * (got * got).sum())
    assert cosine > 0.99


def test_data_must_have_every_input():
    with pytest.raises(InputError):
        quantize(block(), {"x": data()["x"]}, QuantizeOptions(threads=1))


def test_the_model_that_was_given_stays_as_it_is():
    model = block()
    before = ir.to_proto(model).SerializeToString()
    quantized(model)
    assert ir.to_proto(model).SerializeToString() == before
