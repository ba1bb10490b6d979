"""Walks with random operands, run in the interpreter or on a GPU, and compared with numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.kernels.cuda.interpret import TORCH, values_of
from tests.kernels.cuda.walk_reference import REAL, expected
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.problem import Ref, Walk
from twofour.kernels.cuda.walk import recipes, why_not

Runner = Callable[[Recipe, dict[str, torch.Tensor]], None]
# Of a result's last bits: functions of a GPU, fused operations, sums in another order.
EPS = {
    "float32": 4e-6,
    "float16": 2.0**-11 + 4e-6,
    "bfloat16": 2.0**-8 + 4e-6,
    "float8e4m3fn": 2.0**-4,
}


@dataclass(frozen=True)
class Layout:
    """How an operand lies.

    Attributes:
        order: its axes, the outermost first.
        gaps: elements left out behind each of them.
        repeated: axes along which it does not move.
        turned: axes along which it goes back.
        start: elements before it.
    """

    order: tuple[int, ...]
    gaps: tuple[int, ...] = ()
    repeated: frozenset[int] = frozenset()
    turned: frozenset[int] = frozenset()
    start: int = 0

    def ref(self, dtype: str, dims: Sequence[int]) -> tuple[Ref, int]:
        """Where it lies, and elements it takes."""
        strides, step, offset = [0] * len(dims), 1, self.start
        gaps = self.gaps or (0,) * len(dims)
        for axis in reversed(self.order):
            if axis in self.repeated:
                continue
            sign = -1 if axis in self.turned else 1
            strides[axis] = sign * step
            offset += (dims[axis] - 1) * step if sign < 0 else 0
            step *= dims[axis] + gaps[axis]
        return Ref(dtype, tuple(strides), offset), self.start + step + 3


def plain(rank: int) -> Layout:
    """In the walk's own order, without gaps."""
    return Layout(tuple(range(rank)))


def values(dtype: str, count: int, seed: int, *, special: bool = False) -> torch.Tensor:
    """Seeded elements; exact in float8, and with `special` NaN and infinities among them."""
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return torch.from_numpy(random.integers(0, 2, count).astype(bool))
    if dtype in ("int8", "uint8"):
        low, high = (0, 256) if dtype == "uint8" else (-128, 128)
        return torch.from_numpy(random.integers(low, high, count).astype(dtype))
    if dtype in ("int32", "int64"):
        return torch.from_numpy(random.integers(-9, 10, count).astype(dtype))
    found = random.integers(-15, 16, count) / 4 if dtype == "float8e4m3fn" else (
        random.normal(0, 3, count)
    )  # fmt: skip
    if special:
        found[random.integers(0, count, 1 + count // 8)] = np.nan
        found[random.integers(0, count, 1 + count // 8)] = np.inf
        found[random.integers(0, count, 1 + count // 8)] = -np.inf
    return torch.from_numpy(found.astype(np.float32)).to(TORCH[dtype])


def check(
    problem: Walk,
    inputs: Sequence[torch.Tensor],
    y: torch.Tensor,
    run: Runner,
    *,
    effort: int = 2,
    scale: float = 1.0,
) -> None:
    """All recipes of a walk against numpy; what a walk does not write stays as it is.

    Args:
        problem: the walk.
        inputs: its operands, flat.
        y: what lies where the result goes, flat.
        run: runs a recipe on tensors by role.
        effort: of the search.
        scale: how much larger than its result what is summed up is.
    """
    assert why_not(problem) == ""
    wanted = expected(problem, inputs, y)
    found = recipes(problem, {}, 90, effort=effort)
    assert found
    for recipe in found:
        got = y.clone()
        run(recipe, {**{f"in{i}": x for i, x in enumerate(inputs)}, "y": got})
        compare(values_of(got), wanted, problem, f"{problem.op}, {recipe.config}", scale)


def compare(got: Any, wanted: Any, problem: Walk, where: str, scale: float) -> None:
    """Integers equal (quantized ones to a step, for ties), floats to their last bits."""
    dtype = problem.y.dtype
    if dtype not in REAL:
        ops = {problem.op, *(step.op for step in problem.steps)}
        room = int("quantize" in ops and len(problem.steps) != 1)
        far = np.abs(got.astype(np.int64) - wanted.astype(np.int64)) > room
        assert not far.any(), message(got, wanted, far, where)
        return
    wanted = wanted.astype(np.float32)
    with np.errstate(all="ignore"):
        bound = EPS[dtype] * np.maximum(np.abs(wanted), scale)
        near = (np.abs(got - wanted) <= bound) | (got == wanted) | (got != got) & (wanted != wanted)
        if dtype == "float16":
            near |= np.isinf(got) & (np.abs(wanted) > 65000) & (np.sign(got) == np.sign(wanted))
    assert near.all(), message(got, wanted, ~near, where)


def message(got: Any, wanted: Any, far: Any, where: str) -> str:
    """The first elements that differ."""
    at = np.flatnonzero(far)
    shown = [(int(i), got.flat[i].item(), wanted.flat[i].item()) for i in at[:5]]
    return f"{where}: {at.size} of {got.size} differ: (index, got, expected) {shown}"
