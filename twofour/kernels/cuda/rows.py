"""What kernels on rows of channels know of a GPU and of their operands."""

from __future__ import annotations

FLOAT8_SINCE = 89
"""Compute capability that converts and multiplies float8e4m3fn."""
_VECTOR_BYTES = 16


def unaligned(*distances_bytes: int) -> bool:
    """Whether an operand may begin at an address that is no multiple of 16.

    Tensors begin at multiples of 256. One that is part of a wider one begins some rows, or some
    times its own channels, later.

    Args:
        distances_bytes: from one row to the next, of all its channels, ...
    """
    return any(distance % _VECTOR_BYTES for distance in distances_bytes)
