"""The windows of a convolution side by side, as rows of a matrix, for products that know no window.

    for m, (b, i, j) in enumerate(pixels of y):
        for k, (kh, kw, c) in enumerate(taps):
            cols[m, k] = x[b, i * stride + kh * dilation - top, ..., c]     or x_zero outside

Rows from the last pixel to a multiple, and columns likewise, hold x_zero: a library takes whole
tiles alone, and the weight has zeros there (times what is no NaN). It costs a pass over kernel_h *
kernel_w times the bytes of x: worth it where products gain more.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.kernel import Array, Kernel, divided
from twofour.kernels.cuda.problem import ConvProblem

_ROWS, _COLUMNS = 16, 128
_COPIED = {1: "int8", 2: "float16", 4: "float32"}  # bytes of an element -> what it is copied as


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple that is no less than `count`."""
    return divided(count, multiple) * multiple


def im2col_bytes(problem: ConvProblem, rows: int, columns: int) -> int:
    """Of the matrix."""
    return rows * columns * DTYPES[problem.x.dtype]


def im2col_call(
    problem: ConvProblem, rows: int, columns: int, *, role: str = "cols", block: int = _ROWS
) -> Kernel:
    """The kernel that writes the matrix [rows, columns], without gaps.

    Args:
        problem: the convolution, of one group.
        rows: of the matrix, at least the pixels of y.
        columns: of the matrix, at least the taps times the channels.
        role: where it is written.
        block: rows of a program.
    """
    out_h, out_w = problem.out_size
    x, window = problem.x, problem.window
    constants = {
        "M": problem.rows,
        "K": problem.k,
        "ROWS": rows,
        "COLUMNS": columns,
        "OUT_H": out_h,
        "OUT_W": out_w,
        "HEIGHT": problem.height,
        "WIDTH": problem.width,
        "CHANNELS": problem.channels,
        "KERNEL_W": window.kernel[1],
        "STRIDE_H": window.stride[0],
        "STRIDE_W": window.stride[1],
        "DILATION_H": window.dilation[0],
        "DILATION_W": window.dilation[1],
        "TOP": window.pads[0],
        "LEFT": window.pads[1],
        "X_IMAGE": x.image,
        "X_ROW": x.row,
        "X_PIXEL": x.pixel,
        "X_ZERO": problem.x_zero,
        "WIDE": max(problem.batch * x.image, rows * columns) >= 2**31,
        "BLOCK_M": block,
        "BLOCK_K": min(_COLUMNS, triton.next_power_of_2(columns)),
    }
    copied = _COPIED[DTYPES[x.dtype]]
    operands = (("x", copied), (role, copied))
    grid = (divided(rows, block), divided(columns, constants["BLOCK_K"]), 1)
    return Kernel(_im2col, operands, constants, grid)


def flat_weight(w: Array, columns: int) -> Array:
    """A weight [N, C, KH, KW] as the matrix [N, columns] that goes with it, zeros at the end."""
    flat = w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, columns - flat.shape[1])))


@triton.jit
def _im2col(
    x,
    cols,
    M: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    X_IMAGE: tl.constexpr,
    X_ROW: tl.constexpr,
    X_PIXEL: tl.constexpr,
    X_ZERO: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE:
        m = m.to(tl.int64)
    line = m // OUT_W
    tap = k // CHANNELS
    i = (line % OUT_H * STRIDE_H - TOP)[:, None] + (tap // KERNEL_W * DILATION_H)[None, :]
    j = (m % OUT_W * STRIDE_W - LEFT)[:, None] + (tap % KERNEL_W * DILATION_W)[None, :]
    places = (line // OUT_H * X_IMAGE)[:, None] + i * X_ROW + j * X_PIXEL
    inside = (m < M)[:, None] & (k < K)[None, :]
    inside &= (i >= 0) & (i < HEIGHT) & (j >= 0) & (j < WIDTH)
    values = tl.load(x + places + (k % CHANNELS)[None, :], mask=inside, other=X_ZERO)
    there = (m < ROWS)[:, None] & (k < COLUMNS)[None, :]
    tl.store(cols + m[:, None] * COLUMNS + k[None, :], values, mask=there)
