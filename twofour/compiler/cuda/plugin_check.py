"""Results of a plugin's kernels on the GPU against its meaning, on the plugin's own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.check import WrongError, typed
from twofour.compiler.cuda.check import meant as values_of
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.tensors import Tensor
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.plugin_meaning import meant, samples
from twofour.core.bfloat16 import from_bf16, to_bf16
from twofour.core.float8 import from_fp8, to_fp8
from twofour.core.plugins import Operand
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import QUANTIZED

Array = NDArray[Any]
_ROUNDING = {
    "float32": 1e-4,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "int8": 2e-2,
    "float8e4m3fn": 8e-2,
}
"""Relative to the largest result, of the coarsest type that is read or written."""
_MOST = 112  # of a quantized sample, which float8 has too once it is rounded
_STEP = 1.02


class Sampled:
    """A turn of a plugin with its samples and what its meaning makes of them.

    Attributes:
        inputs: bytes of all that is read, by role.
    """

    def __init__(self, turn: Turn, op: PluginOp) -> None:
        """Asks the plugin for samples and computes its meaning.

        Raises:
            UnsupportedError: the plugin fails.
        """
        self._turn, self._op = turn, op
        present = [each for each in op.problem.inputs if each is not None]
        given, stored = [], {}
        for operand, array in zip(present, samples(op.operator, op.problem), strict=True):
            if operand.constant is None:
                tensor = turn.operands[operand.name]
                array, stored[operand.name] = _rounded(operand, array, tensor.dtype)
            given.append(array)
        self.inputs = laid(turn.operands, stored)
        wanted = meant(op, given)
        self._wanted = dict(zip(turn.writes, wanted, strict=True))

    def compare(self, recipe: Recipe, read: Callable[[str], Array]) -> None:
        """Compares results with the meaning's.

        Args:
            recipe: what computed them.
            read: gives the bytes of a result, by role.

        Raises:
            WrongError: they are not what they have to be.
        """
        kinds = {tensor.dtype for tensor in self._turn.operands.values()}
        share = max(_ROUNDING.get(kind, 0.0) for kind in kinds) + self._op.operator.tolerance
        for operand in self._op.problem.outputs:
            tensor = self._turn.operands[operand.name]
            elements = typed(read(operand.name), tensor.dtype)
            got = values_of(elements, tensor.dtype).reshape(tensor.dims)  # in C order
            wanted, low, high = _units(operand, self._wanted[operand.name], tensor.dtype)
            off = np.abs(np.clip(got.astype(np.float64), low, high) - wanted)
            bound = np.zeros(off.shape)
            if got.dtype.kind == "f" or operand.scale is not None:
                bound += share * float(np.abs(wanted).max(initial=0.0))
            if operand.scale is not None:
                bound += _STEP
            wrong = ~(off <= bound)
            if wrong.any():
                worst = np.unravel_index(np.argmax(np.where(wrong, off, -1)), off.shape)
                raise WrongError(
                    f"{recipe.tactic} {recipe.config} computes {operand.name!r} of"
                    f" {self._op.name!r} wrongly",
                    [
                        f"{wrong.mean():.1%} of its elements are off",
                        f"expected {wanted[worst]:.6g}, got {float(got[worst]):.6g}"
                        f" at {list(map(int, worst))}",
                    ],
                    f"mend the plugin's kernel of {self._op.operator}",
                )


def _rounded(operand: Operand, array: Array, dtype: str) -> tuple[Array, Array]:
    """A sample as the meaning gets it, with values that the type has, and as the GPU holds it."""
    if operand.scale is not None and dtype in QUANTIZED:
        zero = operand.zero_point if dtype == "float8e4m3fn" else 128 * (operand.dtype == "uint8")
        centred = array.astype(np.int16) - zero
        if dtype == "int8":
            return array, centred.astype(np.int8)
        stored = to_fp8(np.clip(centred, -_MOST, _MOST).astype(np.float32))
        return (from_fp8(stored) + zero).astype(operand.dtype), stored
    if dtype == "bfloat16":
        bits = to_bf16(array.astype(np.float32))
        return from_bf16(bits).astype(np.float32), bits
    held = array.astype(dtype)
    return held.astype(array.dtype), held


def _units(operand: Operand, wanted: Array, dtype: str) -> tuple[Array, float, float]:
    """What the meaning gives, float64, in the units that the GPU holds it in, and its bounds.

    Bytes saturate; float8, which stands for them, does not there.
    """
    found = wanted.astype(np.float64)
    if operand.scale is None:
        return found, -np.inf, np.inf
    zero = operand.zero_point if dtype == "float8e4m3fn" else 128 * (operand.dtype == "uint8")
    ends = np.iinfo(wanted.dtype)
    return found - zero, float(ends.min - zero), float(ends.max - zero)


def laid(operands: Mapping[str, Tensor], stored: Mapping[str, Array]) -> dict[str, Array]:
    """The bytes of operands where they lie; several may be parts of one buffer.

    Args:
        operands: by role.
        stored: the elements of those that are to be laid out.
    """
    sizes: dict[str, int] = {}
    for role in stored:
        tensor = operands[role]
        end = tensor.offset_bytes + tensor.span_bytes
        sizes[tensor.buffer] = max(end, sizes.get(tensor.buffer, 0))
    held = {buffer: np.zeros(size, np.uint8) for buffer, size in sizes.items()}
    for role, array in stored.items():
        tensor = operands[role]
        size = tensor.item_bytes
        steps = tuple(step * size for step in tensor.strides)
        kind = np.dtype(f"u{size}")
        place: Array = np.ndarray(
            tensor.dims, kind, held[tensor.buffer], tensor.offset_bytes, steps
        )
        place[...] = np.ascontiguousarray(array).view(kind).reshape(tensor.dims)
    found = {}
    for role in stored:
        tensor = operands[role]
        start = tensor.offset_bytes
        found[role] = held[tensor.buffer][start : start + tensor.span_bytes]
    return found
