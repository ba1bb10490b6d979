"""The pass that multiplies bytes: by the meaning of the operator nothing changes."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler.passes import fuse_integer_mul

A = "f = DequantizeLinear (a, s, z)"
B = "g = DequantizeLinear (b, s2, z2)"
Q = "y = QuantizeLinear (t, s3, z2)"


def product(nodes, b="int8[2,4,1,1] b", y="int8[2,4,3,3] y", a="uint8[2,4,3,3] a", **weights):
    return graph(
        f"({', '.join(filter(None, (a, b)))}) => ({y}) <float s = {{0.05}}, uint8 z = {{3}},"
        f" float s2 = {{0.07}}, int8 z2 = {{-6}}, float s3 = {{0.4}}> {{ {nodes} }}",
        **weights,
    )


@pytest.mark.parametrize(
    ("name", "b", "nodes", "op"),
    [
        ("factor", "int8[2,4,1,1] b", f"{A} {B} t = Mul (f, g) {Q}", "QMul"),
        ("factor_first", "int8[2,4,1,1] b", f"{A} {B} t = Mul (g, f) {Q}", "QMul"),
        ("equal", "int8[2,4,3,3] b", f"{A} {B} t = Mul (f, g) {Q}", "QMul"),
        ("float", "float[2,4,1,1] b", f"{A} t = Mul (b, f) {Q}", "QMulFloat"),
        ("float_equal", "float[2,4,3,3] b", f"{A} t = Mul (b, f) {Q}", "QMulFloat"),
    ],
)
def test_products_between_quantizers(golden, name, b, nodes, op):
    after = check(fuse_integer_mul, golden, product(nodes, b), name)
    assert op_types(after) == [op]


def test_rows_are_multiplied_too():
    model = product(f"{A} {B} t = Mul (f, g) {Q}", "int8[5,8] b", "int8[5,8] y", "uint8[5,8] a")
    assert op_types(check(fuse_integer_mul, None, model)) == ["QMul"]


TWO = f"{A} {B} t = Mul (f, g)"
CONSTANT = np.ones((2, 4, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("nodes", "b", "y", "reason"),
    [
        (
            f"{TWO} {Q}",
            "int8[2,1,3,3] b",
            "int8[2,4,3,3] y",
            "its operands have shapes 2x4x3x3 and 2x1x3x3; expected equal ones, or a factor per"
            " channel",
        ),
        (
            f"{TWO} {Q}",
            "int8[1,4,1,1] b",
            "int8[2,4,3,3] y",
            "its operands have shapes 2x4x3x3 and 1x4x1x1; expected equal ones, or a factor per"
            " channel",
        ),
        (
            f"{TWO} y = Neg (t)",
            "int8[2,4,1,1] b",
            "float[2,4,3,3] y",
            "its result is read as float by Neg 'y'",
        ),
        (TWO, "int8[2,4,1,1] b", "float[2,4,3,3] t", "its result 't' is an output of the model"),
        (f"{A} t = Mul (f, k) {Q}", "", "int8[2,4,3,3] y", "'k' is a constant"),
        (
            f"{B} e = Neg (g) r = Cast <to = 1> (a) t = Mul (g, r) {Q}",
            "int8[2,4,1,1] b",
            "int8[2,4,3,3] y",
            "'r' is float: it comes from Cast 'r'",
        ),
    ],
)
def test_products_that_stay(nodes, b, y, reason):
    constants = {"k": CONSTANT} if "k)" in nodes else {}
    assert refusal(fuse_integer_mul, product(nodes, b, y, **constants)) == reason


def test_a_quantizer_per_channel_stays():
    model = graph("""(int8[2,4] a, int8[2,4] b) => (int8[2,4] y)
        <float[1] s = {1}, int8[1] z = {0}, float r = {1}, int8 o = {0}> {
        f = DequantizeLinear (a, s, z)
        g = DequantizeLinear (b, r, o)
        t = Mul (f, g)
        y = QuantizeLinear (t, r, o) }""")
    reason = "DequantizeLinear 'f' is per channel; activations are quantized per tensor"
    assert refusal(fuse_integer_mul, model) == reason


def test_a_float_product_is_another_pattern():
    model = graph("(float[4] a, float[4] b) => (float[4] y) { y = Mul (a, b) }")
    after, refusals = apply(fuse_integer_mul, model)
    assert not refusals
    assert op_types(after) == ["Mul"]
