"""Sparse attention for GPUs: from a problem of the operator to one of the kernel.

Imported only where an engine is built for a GPU: kernels/cuda/sparse_attention.py needs Triton.
"""

from __future__ import annotations

import math

import numpy as np

from twofour.core.cuda_program import DTYPES
from twofour.core.plugins import Operand, Problem
from twofour.kernels.cuda import sparse_attention
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import QUANTIZED, AttentionProblem, Rows
from twofour.kernels.cuda.sparse_attention import SparseAttentionProblem
from twofour.operators.sparse_attention_code import Numbers

_NAMES = ("q", "k", "v", "keep", "blocks")


def why_not(problem: Problem, capability: int) -> str:
    """Why no kernel takes a problem; "" if one does.

    Args:
        problem: what a node asks.
        capability: of the GPU, 90 for 9.0.
    """
    given = _given(problem)
    if lacking := [name for name in _NAMES if name not in given]:
        return f"it lacks the input {lacking[0]}"
    q, k, v, keep, table = (given[name] for name in _NAMES)
    y, heads = problem.outputs[0], problem.attributes["heads"]
    if table.constant is None:
        return "the table of blocks is computed while running: expected a constant"
    if not q.shape == k.shape == v.shape == y.shape or len(q.shape) != 3:
        return f"expected q, k, v [batch, length, channels], got {q.shape}, {k.shape}, {v.shape}"
    if not isinstance(heads, int) or heads < 1 or q.shape[2] % heads:
        return f"{q.shape[2]} channels are not {heads} heads"
    if keep.dtype != "bool" or len(keep.shape) != 2:
        return f"expected a mask of keys, bool [batch, length], got {keep.dtype} {keep.shape}"
    if reason := _why_not_types(q, k, v, y):
        return reason
    try:
        asked = problem_of(problem)
    except ValueError as error:  # numbers of a pattern that make no sense
        return str(error)
    return sparse_attention.why_not(asked, capability)


def _why_not_types(q: Operand, k: Operand, v: Operand, y: Operand) -> str:
    """The same as far as types, strides and scales go."""
    for each in (q, k, v, y):
        if each.dtype not in DTYPES:
            return f"{each.name} is {each.dtype}"
        if each.strides[2] != DTYPES[each.dtype]:
            return f"the channels of {each.name} are not neighbours"
        if each.dtype in QUANTIZED and (each.scale is None or each.scale.size != 1):
            return f"expected one scale for {each.name}"
    if any(each.dtype in QUANTIZED and each.zero_point for each in (k, v)):
        return "expected symmetric k and v, of zero point 0"
    return ""


def recipes(problem: Problem, capability: int, *, effort: int = 2) -> tuple[Recipe, ...]:
    """Ways to run a problem that is taken, the best guess first."""
    asked = problem_of(problem)
    return sparse_attention.recipes(asked, {}, capability, effort=effort)


def problem_of(problem: Problem) -> SparseAttentionProblem:
    """What the kernel is asked.

    Args:
        problem: what a node asks; its types and shapes are those that `why_not` takes.
    """
    given, y = _given(problem), problem.outputs[0]
    q, k, v, keep, table = (given[name] for name in _NAMES)
    numbers = Numbers.of(problem.attributes)
    batch, length, channels = q.shape
    d = channels // numbers.heads
    score = (numbers.scale or 1 / math.sqrt(d)) * _scale(q) * _scale(k)
    dense = AttentionProblem(
        batch,
        length,
        length,
        numbers.heads,
        d,
        d,
        _rows(q),
        _rows(k),
        _rows(v),
        _rows(y),
        score_scale=score,
        q_zero=q.zero_point if q.dtype in QUANTIZED else 0,
        v_scale=_scale(v),
        y_scale=_scale(y),
        y_zero=y.zero_point if y.dtype in QUANTIZED else 0,
    )
    pattern = numbers.pattern(length, np.asarray(table.constant))
    return SparseAttentionProblem(dense, pattern, _keep_strides(keep))


def _given(problem: Problem) -> dict[str, Operand]:
    return {
        name: each for name, each in zip(_NAMES, problem.inputs, strict=False) if each is not None
    }


def _scale(operand: Operand) -> float:
    """Of a quantized tensor; 1 of all others."""
    if operand.dtype not in QUANTIZED or operand.scale is None:
        return 1.0
    return float(np.asarray(operand.scale).reshape(-1)[0])


def _rows(operand: Operand) -> Rows:
    """Where the tokens of an operand lie, in elements."""
    size = DTYPES[operand.dtype]
    return Rows(operand.dtype, operand.strides[0] // size, operand.strides[1] // size)


def _keep_strides(keep: Operand) -> tuple[int, ...]:
    """Of a mask of keys that hides some, or may; () of one that is known to hide none."""
    if keep.constant is not None and bool(np.all(keep.constant)):
        return ()
    return tuple(
        0 if size == 1 else step for size, step in zip(keep.shape, keep.strides, strict=True)
    )
