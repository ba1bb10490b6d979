"""What a layer wrote, read out of the arena as an array of float32 in ONNX's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.bfloat16 import from_bf16
from twofour.core.errors import EngineError
from twofour.core.float8 import from_fp8
from twofour.core.memory import Bytes
from twofour.core.plan import REBUILD
from twofour.engine import Write

Array = NDArray[Any]

_BITS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "bfloat16": ("uint16", from_bf16),
    "float8e4m3fn": ("uint8", from_fp8),
}
"""Types that numpy lacks: what their bits are held as, and what makes float32 of them."""


@dataclass(frozen=True, eq=False)
class Tap:
    """A value of a running engine.

    Attributes:
        layer: index of the layer that wrote it, in `Plan.layers`.
        name: of the value, in the fused graph.
        source: the source model's value that it is, or is rounded from; "" for none.
        value: float32, in ONNX's shape; integers with a scale are dequantized.
    """

    layer: int
    name: str
    source: str
    value: Array


def read(write: Write, arena: Bytes, tensors: Mapping[str, Array], symbols: Sequence[int]) -> Array:
    """A copy of what was written.

    Args:
        write: what and where.
        arena: activation memory.
        tensors: the plain tensors by name.
        symbols: values of the open dimensions.

    Returns:
        float32, in ONNX's shape.

    Raises:
        EngineError: it does not lie within the arena.
    """
    if write.at is None:
        return _real(tensors[write.tensor.name], write)
    shape = write.tensor.shape_at(symbols)
    stored, decode = _BITS.get(write.tensor.dtype, (write.tensor.dtype, None))
    dtype = np.dtype(stored)
    at = write.at
    strides = (at.image, dtype.itemsize, at.row, at.pixel)
    try:
        held: Array = np.ndarray(write.planes(shape), dtype, arena.data, at.offset, strides)
    except (TypeError, ValueError) as e:
        raise EngineError(
            f"{write.tensor.name!r} does not lie in the arena",
            [f"{list(shape)} of {write.tensor.dtype} at {at.offset}: {e}"],
            REBUILD,
        ) from e
    if decode is not None:
        held = decode(held)
    real = _real(held.transpose(0, 2, 3, 1) if len(shape) != 4 else held, write)
    return real.reshape(shape)


def _real(stored: Array, write: Write) -> Array:
    """The numbers that are meant, in float32; computed as DequantizeLinear does."""
    if not write.scale:
        return stored.astype(np.float32)
    scale = np.array(write.scale, np.float32)
    if scale.size > 1 and stored.ndim == 4 and len(write.tensor.shape) == 4:
        scale = scale[:, None, None]
    wide = stored if stored.dtype.kind == "f" else stored.astype(np.int32)
    return (wide - write.zero_point).astype(np.float32) * scale
