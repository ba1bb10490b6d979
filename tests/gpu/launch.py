"""Starts compiled kernels on a GPU as the runtime does: addresses, then null pointers.

Memory is torch's, so is the stream; all else is the driver's interface.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cuda.bindings import driver

from twofour.kernels.cuda.kernel import Compiled, Kernel, NvidiaSource, Recipe, compile_kernel
from twofour.kernels.cuda.nvrtc import compile_source


def capability() -> int:
    """Of the GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def require_alone() -> None:
    """Skips what takes times where other processes of the tests are on the GPU as well."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("times need a GPU of their own: run without -n, with -s")


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gave; fails where it did."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"{error!r}: {driver.cuGetErrorString(error)}")
    return values[0] if len(values) == 1 else values


_MADE: dict[tuple[NvidiaSource, int], Compiled] = {}


def compile_text(source: NvidiaSource, capability: int) -> Compiled:
    """Machine code of a kernel in CUDA C++, compiled once."""
    key = source, capability
    if key not in _MADE:
        _MADE[key] = compile_source(source, capability)
    return _MADE[key]


def compile_all(found: Iterable[Recipe], capability: int) -> None:
    """Compiles all kernels in CUDA C++ of these recipes, in a process for each CPU."""
    calls = {call for recipe in found for call in recipe.calls if isinstance(call, NvidiaSource)}
    wanted = [call for call in calls if (call, capability) not in _MADE]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        made = pool.map(compile_source, wanted, [capability] * len(wanted))
        _MADE.update(zip([(call, capability) for call in wanted], made, strict=True))


@functools.cache
def _function(cubin: bytes, symbol: str, shared_bytes: int) -> Any:
    """The kernel of a cubin, loaded once."""
    module = checked(driver.cuModuleLoadData(cubin))
    function = checked(driver.cuModuleGetFunction(module, symbol.encode()))
    if shared_bytes > 48 * 1024:
        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, which, shared_bytes))
    return function


def start(compiled: Compiled, grid: tuple[int, int, int], tensors: list[torch.Tensor]) -> None:
    """Starts a kernel on torch's stream; the pointers are those of the tensors."""
    function = _function(compiled.cubin, compiled.symbol, compiled.shared_bytes)
    addresses = [tensor.data_ptr() for tensor in tensors] + [0] * compiled.nulls
    types = tuple([ctypes.c_void_p] * len(addresses))
    stream = torch.cuda.current_stream().cuda_stream
    block = (compiled.threads, 1, 1)
    arguments = (tuple(addresses), types)
    shared = compiled.shared_bytes
    checked(driver.cuLaunchKernel(function, *grid, *block, shared, stream, arguments, 0))


def prepared(
    what: Kernel | NvidiaSource | Recipe, tensors: Mapping[str, torch.Tensor], capability: int
) -> Callable[[], None]:
    """A function that starts a kernel, or all kernels of a recipe, on tensors of the GPU by role.

    The constants and the scratch of a recipe are put on the GPU here. Nothing waits for the end.
    """
    if isinstance(what, Recipe):
        tensors = dict(tensors) | {
            role: torch.from_numpy(np.array(array)).cuda() for role, array in what.constants.items()
        }
        tensors |= {
            role: torch.full((size,), 85, dtype=torch.uint8, device="cuda")
            for role, size in what.scratch.items()
        }
        calls = [prepared(call, tensors, capability) for call in what.calls]
        return lambda: [call() for call in calls] and None
    make = compile_text if isinstance(what, NvidiaSource) else compile_kernel
    compiled, pointers = make(what, capability), [tensors[role] for role in what.roles]
    return lambda: start(compiled, what.grid, pointers)


def launch(
    what: Kernel | NvidiaSource | Recipe, tensors: Mapping[str, torch.Tensor], capability: int
) -> None:
    """Runs a kernel, or all kernels of a recipe, on tensors of the GPU by role; waits for it."""
    torch.zeros(1, device="cuda")
    prepared(what, tensors, capability)()
    torch.cuda.synchronize()


def median_us(run: Callable[[], object], repeats: int = 20, rounds: int = 7) -> float:
    """Microseconds of one run: the median of rounds of a CUDA graph with `repeats` of them."""
    run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    times = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / repeats)
    return statistics.median(times[1:])
