"""Which tensors share a scale because they are joined, or parts of one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph
from tests.onnx_tools.networks import samples, weights
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize


def quantized(model: ir.Model, **options) -> ir.Model:
    return quantize(model, {"x": samples()}, QuantizeOptions(threads=1, **options))


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


def joined(rest: str, end: str = "c", **replaced: np.ndarray) -> ir.Model:
    """Two convolutions, b ten times as large as a, joined; the last one reads `end`."""
    body = f"""(float[n,4,8,8] x) => (float[n,4,h,v] y) <int64[2] halves = {{2, 2}},
        float[4] twice = {{1, 1, 2, 2}}> {{
        a = Conv (x, w)
        b = Conv (x, v)
        {rest}
        y = Conv ({end}, u)
    }}"""
    arrays = weights(w=(4, 4, 1, 1), v=(4, 4, 1, 1), u=(4, 8, 1, 1))
    return graph(body, **{**arrays, "v": arrays["v"] * 10, **replaced})


def test_what_is_joined_shares_one_scale():
    model = quantized(
        joined("p = MaxPool <kernel_shape = [1, 1]> (a)\n c = Concat <axis=1> (p, b)")
    )
    assert readers(model) == {
        "x": ["a:0", "b:0"],
        **{"a": ["p:0"], "p": ["c:0"], "b": ["c:1"], "c": ["y:0"]},
    }
    scales = scale_names(model)
    assert scales["a"] == scales["p"] == scales["b"] == scales["c"] != scales["x"]
    # It holds the values of the larger part.
    alone = quantized(joined("c = Concat <axis=1> (b, b)"))
    assert number(model, scales["c"]) == number(alone, scale_names(alone)["c"])


def number(model: ir.Model, name: str) -> float:
    """A scale."""
    return float(model.graph.initializers[name].const_value.numpy())


def test_joins_with_a_part_in_common_share_one_scale():
    rest = "c = Concat <axis=1> (a, b)\n d = Concat <axis=1> (x, b)\n e = Concat <axis=1> (c, d)"
    scales = scale_names(quantized(joined(rest, "e", **weights(u=(4, 16, 1, 1)))))
    assert len({scales[name] for name in "abcdex"}) == 1
    rest = "c = Concat <axis=1> (a, b)\n i = Conv (c, u)\n d = Concat <axis=1> (i, b)"
    scales = scale_names(quantized(joined(rest, "d")))
    assert len({scales[name] for name in "abcdi"}) == 1
    assert scales["x"] != scales["a"]


def test_what_is_split_keeps_its_scale():
    rest = 'g, h = Split <axis=1> (b, halves)\n r = Resize <mode="nearest"> (g, , twice)\n'
    model = quantized(joined(rest, "r", **weights(u=(4, 2, 1, 1))))
    assert readers(model) == {"x": ["b:0"], "b": ["g:0"], "g": ["r:0"], "r": ["y:0"]}
    scales = scale_names(model)
    assert scales["b"] == scales["g"] == scales["r"] == "b_scale"


@pytest.mark.parametrize(
    ("rest", "replaced", "excluded"),
    [
        ("c = Concat <axis=1> (a, k)", {"k": np.ones((16, 4, 8, 8), np.float32)}, ()),
        ("c = Concat <axis=1> (a, b)", {}, ("c",)),
        ('d = Concat <axis=1> (a, b)\n c = Resize <mode="linear"> (d, , twice)', {}, ()),
    ],
    ids=["constant", "excluded", "interpolated"],
)
def test_joins_that_round_by_themselves(rest, replaced, excluded):
    model = quantized(joined(rest, **replaced), exclude=excluded)
    assert set(readers(model)) == {"x", "c"}


def test_what_is_gathered_has_its_own_range():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) <int64[2] some = {0, 3}> {
        a = Conv (x, w)
        g = Gather <axis = 1> (a, some)
        y = Conv (g, v)
    }"""
    model = quantized(graph(body, **weights(w=(4, 4, 1, 1), v=(4, 2, 1, 1))))
    assert readers(model) == {"x": ["a:0"], "g": ["y:0"]}


def test_what_is_repeated_keeps_its_scale():
    body = """(float[n,4,8,8] x) => (float[n,4,8,8] y) <int64[4] twice = {1, 2, 1, 1}> {
        a = Conv (x, w)
        t = Tile (a, twice)
        y = Conv (t, v)
    }"""
    model = quantized(graph(body, **weights(w=(4, 4, 1, 1), v=(4, 8, 1, 1))))
    assert scale_names(model)["t"] == scale_names(model)["a"]


def test_sums_that_nobody_rounds_stay_float():
    """The cell state of an LSTM, spelled out: f * c + i * g, then tanh and a gate."""
    body = """(float[n,4] x) => (float[n,4] y) {
        p = MatMul (x, w)
        s = Sigmoid (p)
        q = MatMul (x, v)
        t = Tanh (q)
        f = Mul (s, p)
        i = Mul (s, t)
        c = Add (f, i)
        k = Tanh (c)
        h = Mul (s, k)
        y = MatMul (h, w)
    }"""
    model = graph(body, **weights(w=(4, 4), v=(4, 4)))
    data = {"x": samples(8, (4,))}
    assert readers(quantize(model, data)) == {"x": ["p:0", "q:0"], "h": ["y:0"]}


@pytest.mark.parametrize("end", ["a = Relu (c)", "s = Sigmoid (c)\n a = Mul (c, s)"])
def test_sums_that_are_rounded_take_integers(end: str):
    body = f"""(float[n,4,8,8] x) => (float[n,4,8,8] y) {{
        p = Conv (x, w)
        q = Relu (p)
        d = Conv (x, v)
        e = Relu (d)
        c = Add (q, e)
        {end}
        y = Conv (a, w)
    }}"""
    model = quantized(graph(body, **weights(w=(4, 4, 1, 1), v=(4, 4, 1, 1))))
    assert readers(model) == {
        "x": ["d:0", "p:0"],
        "q": ["c:0"],
        "e": ["c:1"],
        "a": ["y:0"],
    }
