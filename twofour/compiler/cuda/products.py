"""Convolutions and products as GPU kernels take them: quantized values are int8, not bytes.

The native operators (compiler/native.py) have the numbers of kernels that hold int8 plus 128, and
an epilogue in steps of that; here the 128 goes back out of zero points, bias and bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.tensors import Tensor
from twofour.compiler.native import ConvOp
from twofour.core.functions import NO_ACTIVATION
from twofour.core.numerics import Epilogue
from twofour.core.patterns import is_pattern
from twofour.kernels.cuda.problem import QUANTIZED, ConvProblem, Finish

Array = NDArray[Any]
STORED = 128
"""What is added to int8 where it is held as a byte."""
FLOAT8_MOST = 448.0
_INT8 = (-128.0, 127.0)


def conv_problem(
    op: ConvOp, x: Tensor, y: Tensor, r: Tensor | None
) -> tuple[ConvProblem, dict[str, Array]]:
    """What is to be computed, and its constants by role.

    Args:
        op: the operator.
        x: input, as the kernel reads it (of one that is quantized at run time, the int8 rows).
        y: output.
        r: residual, or None.
    """
    batch, height, width, channels = x.extent
    quantized = x.dtype in QUANTIZED
    zero = op.x_zero - STORED if quantized and not op.dynamic else 0
    finish, scale, bias = _finish(op, y.dtype)
    if zero:
        sums = op.w.reshape(len(op.w), -1).astype(np.float64).sum(1)
        bias = bias - scale * zero * sums
    problem = ConvProblem(
        batch,
        height,
        width,
        channels,
        len(op.w),
        x.view,
        y.view,
        op.window,
        op.groups,
        r.view if r is not None else None,
        finish,
        zero,
        "2:4" if op.groups == 1 and is_pattern(op.w, "2:4") else "",
    )
    constants: dict[str, Array] = {"w": op.w, "bias": bias.astype(np.float32)}
    if finish.scaled:
        constants["scale"] = scale.astype(np.float32)
    return problem, constants


def _finish(op: ConvOp, out: str) -> tuple[Finish, Array, Array]:
    """The epilogue, its scale and its bias (float64), where nothing is held plus 128."""
    given = op.epilogue
    scale, bias = given.scale.astype(np.float64), given.bias.astype(np.float64)
    residual = given.residual_scale
    y_factor, activation = given.y_factor, given.activation
    if given.gate is not None:  # its numbers count in steps of the table
        step = given.gate.step
        scale, bias = scale * step, bias * step
        residual *= 1.0 if given.add_last else step
        y_factor = 1.0 / (step * 2.0**given.gate.bits)
    residual_zero = given.residual_zero - STORED * (op.add == "int8") if given.add_last else 0
    if given.add_last:
        residual /= y_factor  # it is in steps of y
    elif op.add == "int8":
        bias = bias + residual * STORED
    low, high = -np.inf, np.inf
    y_zero = 0
    if given.zero_point is not None:
        y_zero = given.zero_point - STORED
        if activation.clamps:  # the zero point is in bias and bounds already, as it is stored
            bias, y_zero = bias + given.zero_point - STORED, 0
    if activation.clamps:
        low, high = _bounds(given, out)
        activation = NO_ACTIVATION
    scaled = op.w.dtype == np.int8
    finish = Finish(
        residual,
        activation,
        y_factor,
        y_zero,
        low,
        high,
        scaled,
        by_rows=bool(op.dynamic),
        add_last=given.add_last,
        residual_zero=residual_zero,
    )
    return finish, scale, bias


def _bounds(given: Epilogue, out: str) -> tuple[float, float]:
    """What an activation that clamps leaves, in what y holds."""
    low, high = given.activation.bounds()
    if given.zero_point is None:
        return float(low), float(high)
    shift = given.zero_point - STORED
    low, high = float(low) + shift, float(high) + shift
    most = _INT8 if out == "int8" else (-FLOAT8_MOST, FLOAT8_MOST)
    return max(low, most[0]), min(high, most[1])
