"""Compiling many kernels side by side, before anything is timed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable

from tests.gpu import launch
from twofour.kernels.cuda.kernel import REFUSALS, Kernel, Recipe, compile_kernel

_WAITING: list[tuple[Kernel, int]] = []


def _compile(index: int) -> None:
    """In a process of its own: the machine code is kept in Triton's cache on disk."""
    kernel, number = _WAITING[index]
    try:
        compile_kernel(kernel, number)
    except REFUSALS:
        pass  # said when its turn comes


def compile_all(recipes: Iterable[Recipe], number: int) -> None:
    """All kernels of these recipes, in Triton and in CUDA C++, for a GPU with that capability."""
    found = list(recipes)
    kernels = [call for recipe in found for call in recipe.calls if isinstance(call, Kernel)]
    different = {repr((k.function, k.operands, k.constants, k.warps, k.stages)): k for k in kernels}
    _WAITING[:] = [(kernel, number) for kernel in different.values()]
    with multiprocessing.get_context("fork").Pool() as pool:
        pool.map(_compile, range(len(_WAITING)), chunksize=1)
    launch.compile_all(found, number)
