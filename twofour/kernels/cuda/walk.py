"""Walks on a GPU: small operators on tensors of any rank and layout, as kernels that are written.

The meaning is that of kernels/cpu/nd.py. A kernel is written for each walk, with all its numbers in
the text (walk_text.py, walk_rows.py), because what is computed is known only there. What makes it
fast: the axes are merged to the fewest (walk_axes.py), a block covers a run of y with 16 bytes a
thread and access, operands that do not change along a block are read once for it, and where an
input is contiguous along another axis than y (NCHW to NHWC) a block is square and turned around in
shared memory.

Roles: in0, in1, ..., y; "weights" of an expectation, and "scratch" between two launches, belong to
the recipe. Addresses are taken for multiples of 16 bytes, what `Ref.offset` adds is looked at:
whoever places an operand elsewhere names it in `Kernel.unaligned`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.kernel import Kernel, Recipe
from twofour.kernels.cuda.problem import Walk
from twofour.kernels.cuda.source import function_of
from twofour.kernels.cuda.walk_axes import Tiling, axes_of, size, tilings
from twofour.kernels.cuda.walk_ops import FLOAT, FLOAT8, kind_of, known
from twofour.kernels.cuda.walk_rows import (
    REDUCTIONS,
    ROWS,
    Fold,
    block_of,
    fold_text,
    folds,
    rows_text,
    rows_tiling,
)
from twofour.kernels.cuda.walk_text import elements_text, roles_of

Array = NDArray[Any]
TACTIC = "walk"
_FLOAT8_FROM = 89
_MOST_GRID = 2**31 - 1
_SMALL = 1 << 16  # elements: so few take the time of a launch, however they are cut


def why_not(problem: Walk) -> str:
    """Why a walk has no kernel here; "" where it has one."""
    refs = (*problem.inputs, problem.y)
    if unknown := {ref.dtype for ref in refs} - set(DTYPES):
        return f"walks on a GPU take {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}"
    if 0 in problem.dims:
        return "it has no elements"
    if any(len(ref.strides) != len(problem.dims) for ref in refs):
        return f"an operand has no stride for each of the axes {list(problem.dims)}"
    if problem.op == "fill":
        return ""
    if problem.op == "gather" and problem.inputs[1].dtype not in ("int32", "int64"):
        return f"rows are chosen by integers, not {problem.inputs[1].dtype}"
    if problem.op in ROWS or problem.op in REDUCTIONS:
        return _why_no_rows(problem)
    return _why_no_elements(problem)


def _why_no_rows(problem: Walk) -> str:
    """Of a reduction, or an operation on rows."""
    kinds = [kind_of(ref.dtype) for ref in (*problem.inputs, problem.y)]
    takes = (FLOAT,) if problem.op in ROWS else (FLOAT, "int32", "int64")
    if len(kinds) != 2 or kinds[0] not in takes or kinds[1] != kinds[0]:
        return f"{problem.op} on a GPU is of {', '.join(takes)}, not of {', '.join(kinds)}"
    if problem.op in ("mean", "l2") and kinds[0] != FLOAT:
        return f"{problem.op} on a GPU is of real numbers, not of {kinds[0]}"
    return ""


def _why_no_elements(problem: Walk) -> str:
    """Of what is computed element by element."""
    steps = [(step.op, step.args, step.kind) for step in problem.steps]
    inputs = problem.inputs[:1] if problem.op == "gather" else problem.inputs
    if problem.op != "chain" and not steps:
        op = "copy" if problem.op == "gather" else problem.op
        steps = [(op, tuple(range(len(inputs))), problem.y.dtype)]
    kinds = [kind_of(ref.dtype) for ref in inputs]
    for op, args, kind in steps:
        own = [kinds[i] for i in args]
        if not own or not known(op, own[:1]):
            return f"no operation {op!r} of {', '.join(own) or 'nothing'} on a GPU"
        if op == "copy" and kind_of(kind) != own[0]:
            return f"a copy from {own[0]} to {kind}: expected a cast"
        kinds.append(kind_of(kind))
    if not steps or kinds[-1] != kind_of(problem.y.dtype):
        return f"the result is {kinds[-1] if steps else 'nothing'}, not {problem.y.dtype}"
    return ""


def recipes(
    problem: Walk, constants: Mapping[str, Array], capability: int, *, effort: int = 2
) -> tuple[Recipe, ...]:
    """Ways to run a walk, the best guess first.

    Args:
        problem: the walk.
        constants: role -> elements of the operands that lie beside the weights, in C order.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, 1 for a few, 2 for all.

    Returns:
        Nothing where it has no kernel, see `why_not`.
    """
    types = {ref.dtype for ref in (*problem.inputs, problem.y)}
    types |= {step.kind for step in problem.steps}
    if why_not(problem) or (FLOAT8 in types and capability < _FLOAT8_FROM):
        return ()
    if problem.op in REDUCTIONS:
        found = _reductions(problem, constants)
    elif problem.op in ROWS:
        found = _rows(problem, constants)
    else:
        found = _elements(problem, constants)
    few = math.prod(problem.dims) <= _SMALL
    most = (1, 2 if few else 3, 2 if few else 8)[min(effort, 2)]
    return tuple(recipe for recipe, _ in zip(found, range(most), strict=False))


def _elements(problem: Walk, constants: Mapping[str, Array]) -> Iterator[Recipe]:
    """Of what is computed element by element."""
    refs = (*problem.inputs, problem.y)
    sizes = [DTYPES[ref.dtype] for ref in refs]
    axes = axes_of(problem.dims, refs)
    for tiling in tilings(axes, sizes, runs=problem.op == "gather"):
        rows, columns, outer = tiling.pieces
        kernel = Kernel(
            function_of(elements_text(problem, tiling), "walk"),
            _operands(problem),
            {},
            (rows * columns * outer, 1, 1),
            tiling.warps,
        )
        if kernel.grid[0] <= _MOST_GRID:
            yield Recipe(TACTIC, _words(tiling), (kernel,), constants)


def _words(tiling: Tiling) -> str:
    side = "x".join(str(n) for n in tiling.block)
    return f"block {side}, {tiling.warps} warps"


def _operands(problem: Walk) -> tuple[tuple[str, str], ...]:
    """Roles with the types of their elements."""
    dtypes = [ref.dtype for ref in (*problem.inputs, problem.y)]
    return tuple(zip(roles_of(problem), dtypes, strict=True))


def _reductions(problem: Walk, constants: Mapping[str, Array]) -> Iterator[Recipe]:
    """In one launch, or in two where there would be few programs."""
    for block, warps in ((2048, 4), (4096, 8), (1024, 4)):
        launches = folds(problem)
        roles = [("in0", "y")] if len(launches) == 1 else [("in0", "scratch"), ("scratch", "y")]
        calls = tuple(
            _fold(fold, own, block, warps) for fold, own in zip(launches, roles, strict=True)
        )
        scratch = {}
        if len(launches) == 2:
            first = launches[0]
            elements = first.shares * size(first.axes[0])
            scratch = {"scratch": elements * DTYPES[first.y.dtype]}
        config = f"{len(calls)} launches, blocks of {block}, {warps} warps"
        yield Recipe(TACTIC, config, calls, constants, scratch)


def _fold(fold: Fold, roles: tuple[str, str], elements: int, warps: int) -> Kernel:
    block = block_of(fold, elements)
    text, programs = fold_text(fold, roles, block)
    operands = tuple(zip(roles, (fold.x.dtype, fold.y.dtype), strict=True))
    return Kernel(function_of(text, "reduction"), operands, {}, (programs, 1, 1), warps)


def _rows(problem: Walk, constants: Mapping[str, Array]) -> Iterator[Recipe]:
    """A program for some rows."""
    tiling = rows_tiling(problem)
    operands = list(_operands(problem))
    if problem.op == "expect":
        operands.insert(1, ("weights", FLOAT))
        constants = {**constants, "weights": np.array(problem.scalars[:-1], np.float32)}
    function = function_of(rows_text(problem, tiling), "rows")
    more = [tiling.warps, *(w for w in (tiling.warps * 2, tiling.warps // 2) if 1 <= w <= 16)]
    for warps in more:
        grid = (tiling.pieces[0], 1, 1)
        kernel = Kernel(function, tuple(operands), {}, grid, warps)
        words = f"block {tiling.block[0]}x{tiling.block[1]}, {warps} warps"
        yield Recipe(TACTIC, words, (kernel,), constants)
