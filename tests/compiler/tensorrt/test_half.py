"""A graph in 16 bits: the same results within 16 bits, float32 where it has to stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from tests.graphs import graph, run
from twofour.compiler.tensorrt.half import halved
from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.load import load_model

RANDOM = np.random.default_rng(0)
W = (RANDOM.normal(size=(8, 4, 3, 3)) * 0.2).astype(np.float32)
NET = (
    "(float[2,4,6,6] x) => (float[2,8] y, float[2,8,6,6] r)"
    "{ c = Conv <pads = [1,1,1,1]> (x, w) r = Relu (c) m = ReduceMean (r, axes)"
    " f = Flatten (m) y = Softmax (f) }"
)
AXES = np.array([2, 3])


def types(model: ir.Model) -> dict[str, str]:
    """Node -> the type of its first output."""
    return {node.name: str(node.outputs[0].dtype) for node in model.graph}


def test_results_are_those_of_float32_within_16_bits() -> None:
    source = graph(NET, w=W, axes=AXES)
    found, notes = halved(source, "float16")
    common.CheckerPass(full_check=True)(found)
    assert notes == ()
    x = RANDOM.normal(size=(2, 4, 6, 6)).astype(np.float32)
    for half, full in zip(run(found, {"x": x}), run(source, {"x": x}), strict=True):
        assert half.dtype == np.float32
        # 36 products of half an ulp of 2^-10 each, of numbers up to a few units
        assert np.abs(half - full).max() < 36 * 2**-11 * max(1, np.abs(full).max())
    assert [value.name for value in found.graph.outputs] == ["y", "r"]
    assert {str(node.outputs[0].dtype) for node in source.graph} == {"FLOAT"}, "as it was"


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_long_sums_stay_float32_and_products_do_not(kind: str) -> None:
    found, _ = halved(graph(NET, w=W, axes=AXES), kind)
    told = types(found)
    assert told["c"] == kind.upper()
    assert told["m"] == "FLOAT"
    assert {str(value.dtype) for value in found.graph.outputs} == {"FLOAT"}
    assert {str(value.dtype) for value in found.graph.inputs} == {"FLOAT"}
    assert str(next(n for n in found.graph if n.name == "c").inputs[1].dtype) == kind.upper()


def test_nodes_that_the_user_names_stay_float32() -> None:
    found, _ = halved(graph(NET, w=W, axes=AXES), "float16", {"c"})
    assert types(found)["c"] == "FLOAT"


def test_a_constant_that_both_sides_read_is_there_in_both_types() -> None:
    body = (
        "(float[2,3] x) => (float[2,3] y)"
        "{ a = Mul (x, k) e = Exp (a) p = Pow (e, k) y = Add (p, k) }"
    )
    source = graph(body, k=np.array([0.5, 1, 2], np.float32))
    found, _ = halved(source, "float16")
    x = np.array([[0.1, 0.2, 0.3], [1, 2, 3]], np.float32)
    np.testing.assert_allclose(run(found, {"x": x})[0], run(source, {"x": x})[0], rtol=0.02)


def test_numbers_beyond_float16_are_cut_and_named() -> None:
    source = graph("(float[3] x) => (float[3] y) { y = Mul (x, k) }", k=np.float32([1e6, 1, -1e9]))
    found, notes = halved(source, "float16")
    assert notes == ("beyond the range of float16, cut: k",)
    (stored,) = (v.const_value.numpy() for n, v in found.graph.initializers.items() if n != "k")
    assert stored.tolist() == [65504, 1, -65504]
    assert halved(source, "bfloat16")[1] == ()


def test_scales_too_small_for_float16_keep_their_pair_in_float32() -> None:
    body = (
        "(float[2,4] x) => (float[2,8] y) <float s = {0.05}, int8 z = {0}>"
        "{ q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (k, ks) y = Gemm <transB = 1> (f, w) }"
    )
    weight = RANDOM.integers(-127, 128, (8, 4)).astype(np.int8)
    coarse = graph(body, opset=17, k=weight, ks=np.full(8, 1e-6, np.float32))
    found, notes = halved(coarse, "float16")
    assert notes == ("stays float32, its scale is too small for float16: w",)
    assert types(found)["w"] == "FLOAT"
    assert types(found)["f"] == "FLOAT16"
    assert found.graph.opset_imports[""] >= 19
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(run(found, {"x": x})[0], run(coarse, {"x": x})[0], atol=1e-4)


def test_branches_are_refused() -> None:
    body = (
        "(bool c, float[2] x) => (float[2] y) { y = If (c)"
        " <then_branch = t () => (float[2] a) { a = Relu (x) },"
        " else_branch = e () => (float[2] b) { b = Neg (x) }> }"
    )
    with pytest.raises(UnsupportedError, match="a model with If is not cast"):
        halved(graph(body), "float16")


@pytest.mark.parametrize("name", ["mlperftiny_resnet8", "ultraface_slim_320", "fastestdet"])
def test_real_networks(name: str, data_folder) -> None:
    source = load_model(data_folder / "onnx" / f"{name}.onnx")
    found, _ = halved(source, "float16")
    common.CheckerPass(full_check=True)(found)
    shape = [dim if isinstance(dim, int) else 1 for dim in source.graph.inputs[0].shape]
    feeds = {source.graph.inputs[0].name: RANDOM.random(shape).astype(np.float32)}
    for half, full in zip(run(found, feeds), run(source, feeds), strict=True):
        # Some hundred roundings of at most 2^-11 each, as independent errors: below 1 %.
        assert np.linalg.norm(half - full) < 0.01 * np.linalg.norm(full)
