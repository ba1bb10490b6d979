"""The pixels around an image that convolutions read with padding: which tensors have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twofour.compiler.layout import Tensor
from twofour.compiler.native import ConvOp, NativeOp
from twofour.compiler.parts import Parts
from twofour.core.errors import UnsupportedError
from twofour.engine import TensorInfo


def padded(ops: Sequence[NativeOp], parts: Parts) -> set[str]:
    """The tensors that get a halo, by the value that their bytes are allocated for."""
    return {parts.root(op.x) for op in ops if isinstance(op, ConvOp) and any(op.window.pads)}


def set_halos(reads: Iterable[tuple[NativeOp, Tensor | TensorInfo]]) -> None:
    """Widens what convolutions read, and fixes what the halo holds.

    Args:
        reads: each operator with the place that it reads first.

    Raises:
        UnsupportedError: a tensor is read with two zero points.
    """
    zero: dict[int, int] = {}
    for op, x in reads:
        if not isinstance(op, ConvOp) or not isinstance(x, Tensor):
            continue
        x.widen(op.window)
        x.spread(op.window.stride[1])
        if not any(x.root.halo):
            continue
        held = x.root
        if zero.setdefault(id(held), op.x_zero) != op.x_zero:
            both = f"{op.name} reads it with {op.x_zero}, another layer with {zero[id(held)]}"
            raise UnsupportedError(
                f"tensor {x.name!r} is read with two zero points",
                [f"{both} (as stored)"],
                "quantize the tensor once",
            )
        held.fill = op.x_zero
