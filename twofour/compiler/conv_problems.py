"""Placed convolutions as kernels see them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.layers import precision_of
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Placed
from twofour.compiler.native import ConvOp
from twofour.kernels.cpu.problem import ConvProblem, Strides, activation_of

Array = NDArray[Any]
_INT32 = 2.0**31 - 256  # with room for rounding


def conv_problem(op: ConvOp, placed: Placed, w: Array, groups: int) -> ConvProblem:
    """The kernel's view of a placed convolution, merged into one column where it can be.

    Where the batch is open: of the usual size, with open rows if it is one column.
    """
    x, y, r = placed.x, placed.y, placed.r
    assert isinstance(x, Tensor)
    out_h, out_w = op.window.output_size(x.height, x.width)
    channels = w.shape[0]
    pixel = channels * 4
    y_strides = (
        y.strides if isinstance(y, Tensor) else Strides(pixel * out_h * out_w, pixel * out_w, pixel)
    )
    problem = ConvProblem(
        x.batch,
        out_h,
        out_w,
        w.shape[1],
        channels // groups,
        "int8" if w.dtype == np.int8 else x.kind,
        x.strides,
        y_strides,
        precision_of(y),
        op.window.kernel,
        op.window.stride,
        op.window.dilation,
        groups,
        r.strides if isinstance(r, Tensor) else None,
        op.add,
        activation_of(op.epilogue),
        _bounded(op),
        op.epilogue.gate is not None,
        dynamic=op.dynamic,
        add_last=op.epilogue.add_last,
    )
    column = problem.flattened()
    if x.open_batch is None:
        return column
    shown = replace(problem, batch=x.open_batch.usual)
    return shown if column is problem else replace(shown.flattened(), open_rows=True)


def _bounded(op: ConvOp) -> bool:
    """Whether the result, in steps of y, is sure to fit int32: true of all real weights."""
    if op.w.dtype != np.int8 or op.add == "float32":
        return False
    most = 255.0 * np.abs(op.w.reshape(op.w.shape[0], -1).astype(np.float64)).sum(1)
    e = op.epilogue
    added = 255.0 * abs(e.residual_scale) + abs(e.offset)
    largest = (most * np.abs(e.scale) + np.abs(e.bias)) * max(1.0, e.y_factor)
    return bool((largest + added * (1.0 if e.add_last else max(1.0, e.y_factor)) < _INT32).all())
