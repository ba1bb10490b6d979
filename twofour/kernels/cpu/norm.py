"""Layer normalisation of rows: mean, variance, scale, and the quantizer that follows.

A row is read three times (sum, squares, result); it stays in the first-level cache meanwhile.
Several rows at once, so that their sums, each a chain of additions, overlap. Meaning:
`core.norm.layer_norm`, bit for bit, and `core.numerics.requantize` of it.

Same kernel signature as nest.py: x input, y float32 output (the quantized one where there is no
other), r quantized output where there are both; t0..t1 counts rows, panels are not used. Constants:

    0 f32 x_scale   4 i32 x_zero   8 f32 1 / y_scale   12 i32 y_zero
    64 f32 gamma[channels], f32 beta[channels], each padded with zeros to a multiple of 16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.kernels.cpu.pointwise import MapConstants
from twofour.kernels.cpu.problem import LANES

Array = NDArray[Any]

_HEADER_BYTES = 64


@dataclass(frozen=True)
class NormProblem:
    """One layer normalisation.

    Attributes:
        rows: how many.
        channels: elements of a row.
        x_pixel: bytes from one input row to the next.
        y_pixel: bytes from one float32 output row to the next; unused without float output.
        q_pixel: bytes from one quantized output row to the next; unused without.
        x: kind of the input: "float32", or "u8" (stored quantized).
        float_out: whether the result is written as float32.
        quantized_out: whether the result is written quantized.
        eps: added to the variance.
    """

    rows: int
    channels: int
    x_pixel: int
    y_pixel: int
    q_pixel: int
    x: str
    float_out: bool
    quantized_out: bool
    eps: float

    @property
    def pieces(self) -> int:
        """Units of work that threads share: rows."""
        return self.rows


def pack_norm(gamma: Array, beta: Array, constants: MapConstants) -> NDArray[np.uint8]:
    """Header, gamma and beta as the kernel reads them.

    Args:
        gamma: float32 [channels].
        beta: float32 [channels].
        constants: x_scale and x_zero of a quantized input, y_scale and y_zero of a quantized
            output; zero points as stored.
    """
    head = np.zeros(_HEADER_BYTES // 4, np.float32)
    head[[0, 2]] = [constants.x_scale, np.float32(1) / np.float32(constants.y_scale)]
    head.view(np.int32)[[1, 3]] = [constants.x_zero, constants.y_zero]
    tail = (0, -gamma.size % LANES)
    both = [np.pad(c.astype(np.float32).reshape(-1), tail) for c in (gamma, beta)]
    return np.concatenate([head, *both]).view(np.uint8)
