"""Kernels -> machine code, on all cores: what takes the time of a build.

Triton's compiler holds Python's lock, so processes share the work. They are forked, do not touch
the GPU, which may be in use by then, and hand back code alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from twofour.core.errors import Error
from twofour.core.machine import usable_cores
from twofour.kernels.cuda.kernel import (
    REFUSALS,
    Compiled,
    Kernel,
    NvidiaSource,
    compile_kernel,
)
from twofour.kernels.cuda.nvrtc import compile_source

Code = Compiled | str
"""Machine code; or why there is none."""
Tell = Callable[[int, int], None]
Key = TypeVar("Key")
Kept = TypeVar("Kept")
_FEW = 3
_work: list[Kernel | NvidiaSource] = []
_MOST_KNOWN = 4096
_known: dict[tuple[Any, int], Code] = {}
"""What this process has compiled, the oldest first: some hundred kernels a network."""


def key_of(kernel: Kernel | NvidiaSource) -> tuple[Any, ...]:
    """Equal for kernels with equal code."""
    if isinstance(kernel, NvidiaSource):
        return (kernel.text, kernel.symbol)
    constants = tuple(sorted((name, repr(value)) for name, value in kernel.constants.items()))
    function = kernel.function
    own = (getattr(function, "cache_key", None) or id(function), kernel.operands, constants)
    return (*own, kernel.warps, kernel.stages, kernel.unaligned)


def compile_all(
    kernels: Sequence[Kernel | NvidiaSource], capability: int, tell: Tell | None = None
) -> list[Code]:
    """The code of each kernel, in order; what this process has compiled before is taken from there.

    Args:
        kernels: what to compile.
        capability: of the GPU, 90 for 9.0.
        tell: called with how many of how many are done.
    """
    keys = [(key_of(kernel), capability) for kernel in kernels]
    found = {key: code for key in keys if (code := _known.get(key)) is not None}
    fresh = {key: kernel for key, kernel in zip(keys, kernels, strict=True) if key not in found}
    made = dict(zip(fresh, _compiled([*fresh.values()], capability, tell), strict=True))
    remember(_known, made, _MOST_KNOWN)
    found |= made
    return [found[key] for key in keys]


def remember(known: dict[Key, Kept], more: Mapping[Key, Kept], most: int) -> None:
    """Adds what is new, and forgets the oldest beyond so many; other threads may do so too."""
    known.update(more)
    for key in [*known][: max(0, len(known) - most)]:
        known.pop(key, None)


def _compiled(
    kernels: Sequence[Kernel | NvidiaSource], capability: int, tell: Tell | None
) -> list[Code]:
    cores = min(usable_cores(), len(kernels))
    if cores < 2 or len(kernels) <= _FEW:
        return [_one(kernel, capability) for kernel in kernels]
    _work[:] = kernels  # functions of Triton cannot be sent: a forked process has them
    found: list[Code] = [""] * len(kernels)
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(cores, context) as pool:
            waiting = {pool.submit(_numbered, i, capability): i for i in range(len(kernels))}
            for done, future in enumerate(as_completed(waiting), 1):
                found[waiting[future]] = future.result()
                if tell is not None:
                    tell(done, len(kernels))
    finally:
        _work.clear()
    return found


def _numbered(index: int, capability: int) -> Code:
    return _one(_work[index], capability)


def _one(kernel: Kernel | NvidiaSource, capability: int) -> Code:
    try:
        if isinstance(kernel, NvidiaSource):
            made: Compiled = compile_source(kernel, capability)
            return made
        return compile_kernel(kernel, capability)
    except (Error, *REFUSALS) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:] or ['']}"
