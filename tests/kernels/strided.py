"""Tensors with any strides in guarded memory, for kernels that take views."""

from __future__ import annotations

import numpy as np

from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.runtime.cpu import Code, address, allocate

GUARD = 0xA5
MARGIN = 8192  # kernels may read this far beyond a tensor

ORDER = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}


class Strided:
    """A [batch, height, width, channels] tensor within guard bytes.

    Args:
        shape: batch, height, width, channels.
        dtype: of the elements.
        form: "nhwc", or "nchw" as plain arrays have it.
        halo: pixels around each image: top, left, bottom, right.
    """

    def __init__(self, shape, dtype, form="nhwc", halo=(0, 0, 0, 0)):
        batch, height, width, channels = shape
        top, left, bottom, right = halo
        full = (batch, height + top + bottom, width + left + right, channels)
        order = ORDER[form]
        self.memory = allocate(int(np.prod(full)) * np.dtype(dtype).itemsize + 2 * MARGIN)
        self.memory[:] = GUARD
        inner = self.memory[MARGIN:-MARGIN].view(dtype).reshape([full[axis] for axis in order])
        whole = inner.transpose(np.argsort(order))
        self.values = whole[:, top : top + height, left : left + width]
        self.address = address(self.memory) + MARGIN
        self.address += sum(self.values.strides[axis] * halo[axis - 1] for axis in (1, 2))

    def take(self):
        """The values, guard bytes in their place; fails if a byte around them changed."""
        values = self.values.copy()
        self.values[...] = np.frombuffer(bytes([GUARD] * 8), self.values.dtype)[0]
        assert (self.memory == GUARD).all(), "bytes around the output changed"
        return values


def compiled(texts, target: Target, vectorize: bool) -> list:
    """The kernels of `texts` (symbol -> IR), callable; one object for all."""
    code = Code([compile_object([Source(t, vectorize) for t in texts.values()], target)])
    kernels = [code.kernel(symbol) for symbol in texts]
    for kernel in kernels:
        kernel.code = code  # keeps it mapped
    return kernels


def in_parts(kernel, pointers, pieces: int, panels: int, parts: int) -> None:
    """Calls the kernel on ranges of pieces, as threads would, the last range first."""
    for part in reversed(range(parts)):
        kernel(*pointers, pieces * part // parts, pieces * (part + 1) // parts, 0, panels)
