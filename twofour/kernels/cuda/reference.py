"""What the kernels on GPUs compute, in numpy, slow and obvious.

Arrays hold values: int8 for int8, float32 for every real type, all of which float32 can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.bfloat16 import round_bf16
from twofour.core.float8 import LARGEST, round_fp8
from twofour.core.fma import fma
from twofour.core.numerics import convolve
from twofour.kernels.cuda.problem import ConvProblem

Array = NDArray[Any]


def round_to(values: Array, dtype: str) -> Array:
    """The values that a type holds in their place; saturating for quantized types.

    Args:
        values: float32 or int8, any shape.
        dtype: key of `cuda_program.DTYPES`: int8 or a real one.

    Returns:
        int8 or float32, the shape of `values`.
    """
    if dtype == "int8":
        if values.dtype == np.int8:
            return values
        return np.asarray(np.clip(np.rint(np.nan_to_num(values)), -128, 127), np.int8)
    values = np.asarray(values, np.float32)
    if dtype == "float8e4m3fn":
        return round_fp8(values)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(values.astype(np.float16), np.float32)
    return round_bf16(values) if dtype == "bfloat16" else values


def conv_sums(problem: ConvProblem, x: Array, w: Array) -> Array:
    """The sums of x * w, with x_zero read as padding.

    Args:
        problem: the convolution.
        x: [batch, height, width, channels].
        w: [N, C / groups, KH, KW], rounded to x's type here.

    Returns:
        int32 or float64 [batch, OH, OW, N].
    """
    w = round_to(w, problem.x.dtype)
    sums = convolve(x, w, problem.window, problem.groups, problem.x_zero)
    if x.dtype == np.int8:
        whole = w.astype(np.int64).reshape(w.shape[0], -1).sum(axis=1)
        sums = (sums + problem.x_zero * whole).astype(np.int32)
    return sums


def conv_reference(problem: ConvProblem, arrays: Mapping[str, Array]) -> Array:
    """The result of a convolution or product.

    Args:
        problem: what is computed.
        arrays: "x" [batch, height, width, channels], "w" [N, C / groups, KH, KW]; "scale" [N],
            "row_scale" [rows], "bias" [N], "r" [batch, OH, OW, N] where there are such.

    Returns:
        int8 or float32 [batch, OH, OW, N], the values that are stored in y.
    """
    how = problem.finish
    sums = conv_sums(problem, arrays["x"], arrays["w"]).astype(np.float32)
    factor = np.ones(problem.out_channels, np.float32)
    if how.scaled:
        factor = arrays["scale"].astype(np.float32)
    if how.by_rows:
        factor = factor * arrays["row_scale"].astype(np.float32).reshape(*sums.shape[:3], 1)
    v = fma(sums, factor, arrays.get("bias", np.zeros(1, np.float32)))
    r = None if problem.r is None else arrays["r"].astype(np.float32)
    r_scale = np.array(how.residual_scale, np.float32)
    if r is not None and not how.add_last:
        v = fma(r, r_scale, v)
    v = how.activation.apply(v)
    if r is not None and how.add_last:
        v = fma(r - np.float32(how.residual_zero), r_scale, v)
    v = v * np.float32(how.y_factor)
    v = np.clip(v, np.float32(how.low - how.y_zero), np.float32(how.high - how.y_zero))
    if problem.y.dtype == "int8":
        v = np.rint(np.where(np.isnan(v), -np.inf, v)) + how.y_zero
        return np.clip(v, -128, 127).astype(np.int8)
    if problem.y.dtype == "float8e4m3fn":
        v = np.clip(v, -LARGEST, LARGEST)
    return round_to(v, problem.y.dtype)
