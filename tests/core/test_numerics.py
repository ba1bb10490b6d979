"""The definition of the arithmetic, against ONNX Runtime and plain loops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from twofour.core import functions
from twofour.core.fma import fma
from twofour.core.functions import Activation
from twofour.core.numerics import (
    MAX_K,
    Epilogue,
    Window,
    convolve,
    dequantize,
    integer_matmul,
    patches,
    quantize,
    requantize,
)

DTYPES = (np.int8, np.uint8)
ZERO_POINTS = [(np.int8, -128), (np.int8, 0), (np.int8, 5), (np.uint8, 0), (np.uint8, 131)]
# Neighbours of every half: where a wrong rounding shows.
HALVES = np.arange(-300, 300, 0.5, np.float32)
NEAR_HALVES = np.concatenate(
    [HALVES, np.nextafter(HALVES, np.float32(1e9)), np.nextafter(HALVES, np.float32(-1e9))]
)


@cache
def _session(op: str, kinds: tuple[tuple[str, str, int], ...], out: str, attributes: str) -> Any:
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(k)), [None] * r)
        for n, k, r in kinds
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(out))
    node = helper.make_node(op, [n for n, *_ in kinds], ["y"], **json.loads(attributes))
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "g", infos, [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def onnxruntime(
    op: str, out: type, feeds: dict[str, np.ndarray], **attributes: object
) -> np.ndarray:
    """One standard operator on ONNX Runtime."""
    kinds = tuple((name, array.dtype.name, array.ndim) for name, array in feeds.items())
    session = _session(op, kinds, np.dtype(out).name, json.dumps(attributes))
    got: np.ndarray = session.run(None, feeds)[0]
    return got


floats = arrays.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


@settings(max_examples=50, deadline=None)
@given(floats, st.floats(2.0**-10, 2.0**10, width=32), st.sampled_from(ZERO_POINTS))
def test_a_value_in_range_comes_back_within_half_a_step(x, scale, kind) -> None:
    dtype, zero = kind
    info = np.iinfo(dtype)
    low, high = (info.min - zero) * scale, (info.max - zero) * scale
    x = np.clip(x, low, high)
    back = dequantize(quantize(x, scale, zero, dtype), scale, zero)
    # Half a step, and the roundings of the division and of the product.
    slack = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(x), scale)
    assert (np.abs(back.astype(np.float64) - x) <= scale / 2 + slack).all()


@settings(max_examples=30, deadline=None)
@given(floats, st.floats(2.0**-10, 2.0**10, width=32), st.sampled_from(ZERO_POINTS))
def test_quantize_is_onnx_quantize_linear(x, scale, kind) -> None:
    dtype, zero = kind
    ours = quantize(x, scale, zero, dtype)
    feeds = {"x": x, "s": np.array(scale, np.float32), "z": np.array(zero, dtype)}
    assert ours.dtype == dtype
    assert (ours == onnxruntime("QuantizeLinear", dtype, feeds)).all()


@pytest.mark.parametrize(("dtype", "zero"), ZERO_POINTS)
def test_quantize_ties_and_extremes_as_onnxruntime(dtype, zero) -> None:
    extremes = np.array([np.inf, -np.inf, 1e30, -1e30, 3e9, -3e9, -0.0], np.float32)
    x = np.concatenate([NEAR_HALVES, extremes])
    for scale in (np.float32(1), np.float32(0.1)):
        feeds = {"x": x * scale, "s": np.array(scale), "z": np.array(zero, dtype)}
        ours = quantize(x * scale, scale, zero, dtype)
        assert (ours == onnxruntime("QuantizeLinear", dtype, feeds)).all()


@pytest.mark.parametrize(("dtype", "zero"), ZERO_POINTS)
def test_nan_becomes_the_zero_point(dtype, zero) -> None:
    assert quantize(np.float32([np.nan]), 1.0, zero, dtype).tolist() == [zero]


@pytest.mark.parametrize(("dtype", "zero"), ZERO_POINTS)
def test_dequantize_is_onnx_dequantize_linear(dtype, zero) -> None:
    info = np.iinfo(dtype)
    q = np.arange(info.min, info.max + 1).astype(dtype)
    feeds = {"x": q, "s": np.array(0.0371, np.float32), "z": np.array(zero, dtype)}
    ours = dequantize(q, 0.0371, zero)
    assert ours.dtype == np.float32
    assert (ours == onnxruntime("DequantizeLinear", np.float32, feeds)).all()
    assert (quantize(ours, 0.0371, zero, dtype) == q).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0, 3])
def test_integer_matmul_is_onnx_matmul_integer(dtype, zero) -> None:
    random = np.random.default_rng(0)
    x = random.integers(*_span(dtype), (5, 33), endpoint=True).astype(dtype)
    w = random.integers(-128, 127, (7, 33), endpoint=True).astype(np.int8)
    feeds = {"x": x, "w": w.T.copy(), "z": np.array(zero, dtype)}
    got = integer_matmul(x, w, zero)
    assert got.dtype == np.int32
    assert (got == onnxruntime("MatMulInteger", np.int32, feeds)).all()


@pytest.mark.parametrize(("x", "zero", "w"), [(255, 0, -128), (0, 255, -128), (255, 0, 127)])
def test_the_longest_sum_of_extremes_is_exact(x, zero, w) -> None:
    one = np.full((1, MAX_K), x, np.uint8), np.full((1, MAX_K), w, np.int8)
    assert integer_matmul(*one, zero).tolist() == [[MAX_K * (x - zero) * w]]
    assert (MAX_K + 1) * 255 * 128 > np.iinfo(np.int32).max


WINDOWS = {
    "3x3": Window((3, 3), pads=(1, 1, 1, 1)),
    "stride 2x1": Window((3, 2), (2, 1), pads=(0, 1, 2, 0)),
    "dilation": Window((2, 3), (1, 2), (3, 2), (3, 2, 3, 2)),
    "1x1": Window((1, 1)),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_convolve_is_onnx_conv_integer(window, groups) -> None:
    random = np.random.default_rng(groups)
    x = random.integers(0, 256, (2, 8, 7, 9)).astype(np.uint8)
    w = random.integers(-128, 128, (12, 8 // groups, *window.kernel)).astype(np.int8)
    want = onnxruntime(
        "ConvInteger",
        np.int32,
        {"x": x, "w": w, "z": np.array(129, np.uint8)},
        strides=window.stride,
        dilations=window.dilation,
        pads=window.pads,
        group=groups,
    )
    got = convolve(x.transpose(0, 2, 3, 1), w, window, groups, 129)
    assert got.shape[1:3] == window.output_size(7, 9)
    assert (got.transpose(0, 3, 1, 2) == want).all()


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_convolve_is_the_sum_it_says(window) -> None:
    """Every product written as a loop, for signed input, integers and floats."""
    random = np.random.default_rng(1)
    x = random.integers(-128, 128, (1, 6, 5, 4)).astype(np.int8)
    w = random.integers(-128, 128, (4, 2, *window.kernel)).astype(np.int8)
    want = _naive(x, w, window, groups=2, zero=-3)
    assert (convolve(x, w, window, 2, -3) == want).all()
    in_floats = convolve(x.astype(np.float32), w.astype(np.float32), window, 2)
    assert in_floats.dtype == np.float64
    assert (in_floats == _naive(x, w, window, groups=2, zero=0)).all()


def test_patches_are_filled_at_the_border() -> None:
    x = np.arange(1, 5, dtype=np.uint8).reshape(1, 2, 2, 1)
    got = patches(x, Window((2, 2), pads=(1, 0, 0, 1)), 9)
    assert got.shape == (1, 2, 2, 2, 2, 1)
    assert got[0, 0, 0, :, :, 0].tolist() == [[9, 9], [1, 2]]
    assert got[0, 1, 1, :, :, 0].tolist() == [[2, 9], [4, 9]]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("dtype", "zero"), [*ZERO_POINTS, (np.int8, 127), (np.uint8, 255)])
def test_requantize_rounds_like_quantize(dtype, zero, relu) -> None:
    """With scale 1 and a residual of halves, it is QuantizeLinear of acc + residual."""
    acc = np.arange(-400, 400, dtype=np.int32).reshape(-1, 2)
    halves = np.full(acc.shape, 0.5, np.float32)
    ones = np.ones(2, np.float32)
    activation = Activation("Relu" if relu else "")
    epilogue = Epilogue(ones, 0 * ones, 1.0, activation, zero, dtype is np.uint8)
    real = acc + halves
    want = quantize(np.maximum(real, 0) if relu else real, 1.0, zero, dtype)
    got = requantize(acc, epilogue, halves)
    assert got.dtype == dtype
    assert (got == want).all()


def test_requantize_each_operation_rounds_once() -> None:
    """The order of the docstring, operation by operation in float32."""
    random = np.random.default_rng(2)
    acc = random.integers(-(2**31), 2**31, (500, 3)).astype(np.int32)
    scale, bias = (random.normal(size=3).astype(np.float32) * s for s in (1e-7, 10))
    r = random.integers(0, 256, acc.shape).astype(np.uint8)
    epilogue = Epilogue(scale, bias, 0.37)
    got = requantize(acc, epilogue, r)
    assert got.dtype == np.float32
    want = fma(r.astype(np.float32), np.float32(0.37), fma(acc.astype(np.float32), scale, bias))
    assert (got == want).all()
    relu = replace(epilogue, activation=Activation("Relu"))
    assert (requantize(acc, relu, r) == np.maximum(want, 0)).all()
    gelu = replace(epilogue, activation=Activation("Gelu"))
    assert (requantize(acc, gelu, r) == functions.gelu(want)).all()
    stored = replace(gelu, zero_point=-20, y_factor=0.03)
    real = functions.gelu_short(want) * np.float32(0.03)
    assert (requantize(acc, stored, r) == quantize(real, 1.0, -20)).all()


def test_clip_of_a_quantized_result_is_part_of_its_bounds() -> None:
    ones = np.ones(1, np.float32)
    acc = np.arange(-300, 300, dtype=np.int32)[:, None]
    epilogue = Epilogue(ones, 0 * ones, activation=Activation("Clip", -10.5, 60.0), zero_point=3)
    assert epilogue.bounds() == (-10.5, 60.0)
    assert (requantize(acc, epilogue) == np.rint(np.clip(acc, -10.5, 60)) + 3).all()
    wide = replace(epilogue, activation=Activation("Clip", -1e9, 1e9))
    assert wide.bounds() == (-131.0, 124.0)
    narrow = replace(epilogue, activation=Activation("Clip", 500.0, 600.0))
    assert (requantize(acc, narrow) == 127).all()
    assert Activation("Clip", -2.0, 6.0).divided(0.5) == Activation("Clip", -4.0, 12.0)


@pytest.mark.parametrize("zero", [0, 7, 128, 255])
@pytest.mark.parametrize(
    "activation", [functions.NO_ACTIVATION, Activation("Relu"), Activation("Clip", -3.0, 90.0)]
)
def test_a_zero_point_within_the_bias(zero, activation) -> None:
    """Sums halfway between two values may be rounded to the other one, and nothing else."""
    scale, bias = np.array([0.25, 0.3], np.float32), np.array([1.0, -7.7], np.float32)
    acc = np.arange(-2000, 2000, dtype=np.int32)[:, None].repeat(2, axis=1)
    plain = Epilogue(scale, bias, activation=activation, zero_point=zero, unsigned=True)
    stored = plain.in_stored_steps()
    assert stored.zero_point == 0
    got, want = (requantize(acc, e).astype(int) for e in (stored, plain))
    ties = np.abs((acc * scale.astype(np.float64) + bias) % 1 - 0.5) < 1e-4
    assert (got == want)[~ties].all()
    assert (np.abs(got - want) <= 1).all()
    assert zero % 2 or (got == want)[:, 0].all()  # exact ties, to even


def test_a_zero_point_behind_an_activation_stays() -> None:
    gelu = Epilogue(np.ones(1), np.zeros(1), activation=Activation("Gelu"), zero_point=3)
    assert gelu.in_stored_steps() is gelu


def test_requantize_of_nan() -> None:
    """A NaN residual: kept in floats, also by Relu; the smallest value in integers."""
    acc, nan = np.zeros((1, 1), np.int32), np.full((1, 1), np.nan, np.float32)
    one = np.ones(1, np.float32)
    none, relu, silu = (Activation(name) for name in ("", "Relu", "Silu"))
    for activation in (none, relu, silu, Activation("Clip", 0.0, 6.0)):
        assert np.isnan(requantize(acc, Epilogue(one, one, 1.0, activation), nan)).all()
    assert requantize(acc, Epilogue(one, one, 1.0, none, 3), nan).tolist() == [[-128]]
    assert requantize(acc, Epilogue(one, one, 1.0, silu, 3), nan).tolist() == [[-128]]
    assert requantize(acc, Epilogue(one, one, 1.0, relu, 3), nan).tolist() == [[3]]


def _span(dtype: type) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return info.min, info.max


def _naive(x: np.ndarray, w: np.ndarray, window: Window, groups: int, zero: int) -> np.ndarray:
    """The convolution as loops over outputs and taps."""
    batch, height, width, _ = x.shape
    out_h, out_w = window.output_size(height, width)
    n, c = w.shape[0], w.shape[1]
    y = np.zeros((batch, out_h, out_w, n), np.int64)
    for at in np.ndindex(batch, out_h, out_w, n):
        first = at[3] // (n // groups) * c
        for i, j in np.ndindex(*window.kernel):
            row = at[1] * window.stride[0] - window.pads[0] + i * window.dilation[0]
            column = at[2] * window.stride[1] - window.pads[1] + j * window.dilation[1]
            if 0 <= row < height and 0 <= column < width:
                inputs = x[at[0], row, column, first : first + c].astype(np.int64) - zero
                y[at] += (inputs * w[at[3], :, i, j]).sum()
    return y


def test_fma_rounds_once() -> None:
    """Against exact rational arithmetic, near ties too, where rounding twice would go wrong."""
    random = np.random.default_rng(5)
    a, b, c = (random.standard_normal(400).astype(np.float32) for _ in range(3))
    c = c * (2.0 ** random.integers(-40, 40, 400)).astype(np.float32)
    # 1 + 2**-24 is a tie of float32; what is added beyond it is far below float64's last bit.
    a[:4], b[:4] = [1, 1, 1, 1], [2.0**-60, -(2.0**-60), 2.0**-24, 2.0**-24]
    c[:4] = [1 + 2.0**-23, 1 + 2.0**-23, 1, 1 + 2.0**-23]
    a[4:6] = b[4:6] = np.float32(1 + 2.0**-12)
    c[4:6] = [2.0**-80, -(2.0**-80)]
    got = fma(a, b, c)
    for values in zip(a, b, c, got, strict=True):
        x, y, z, result = (Fraction(float(v)) for v in values)
        assert result == _nearest(x * y + z), values


def _nearest(exact: Fraction) -> Fraction:
    """The float32 nearest to a number in the normal range, ties to even."""
    if exact == 0:
        return exact
    exponent = math.floor(math.log2(abs(exact)))
    size = abs(exact)
    exponent += (size >= Fraction(2) ** (exponent + 1)) - (size < Fraction(2) ** exponent)
    step = Fraction(2) ** (exponent - 23)
    return round(exact / step) * step


def test_fma_of_what_is_not_finite() -> None:
    """As IEEE has it."""
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    one, zero = np.float32(1), np.float32(0)
    assert fma(inf, one, one) == np.inf
    assert fma(-inf, one, one) == -np.inf
    assert np.isnan(fma(inf, zero, one))
    assert np.isnan(fma(nan, one, one))
    assert np.isnan(fma(inf, one, -inf))
