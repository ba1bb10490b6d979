"""Runs the code that a tactic makes of a problem, without an engine."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from twofour.core.plugins import Code, Operand
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source, compile_object, renamed
from twofour.runtime.cpu import Code as Mapped
from twofour.runtime.cpu import address, allocate

MARGIN = 256


def operand(name: str, array: np.ndarray, constant: bool = False, **quantized) -> Operand:
    """As the compiler describes an array; uint16 are the bits of bfloat16."""
    dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
    return Operand(
        name, array.shape, dtype, array.strides, array if constant else None, **quantized
    )


def run(
    code: Code, target: Target, arrays: list[np.ndarray], y: np.ndarray, parts: int = 1
) -> None:
    """Runs the stages one after the other, each in `parts` calls as threads would, last one first.

    Args:
        code: of a tactic.
        target: what to compile for.
        arrays: inputs, as the problem has them.
        y: output.
        parts: calls that share the pieces.
    """
    sources = [Source(renamed(s.text, f"k{i}"), s.vectorize) for i, s in enumerate(code.stages)]
    mapped = Mapped([compile_object(sources, target)])
    workspace = allocate(code.workspace_bytes + MARGIN)
    workspace[:] = 255  # NaN as floats
    constants = allocate(max(code.constants.size, 64))
    constants[: code.constants.size] = code.constants
    pointers = [a.ctypes.data for a in (*arrays, y)] + [address(workspace)]
    table = np.array(pointers, np.int64)
    for i, stage in enumerate(code.stages):
        kernel = mapped.kernel(f"k{i}")
        ends = [stage.pieces * part // parts for part in range(parts + 1)]
        for t0, t1 in reversed(list(pairwise(ends))):
            kernel(address(table), address(constants), y.ctypes.data, 0, t0, t1, 0, 1)
    assert (workspace[code.workspace_bytes :] == 255).all(), "wrote beyond the workspace"
