"""Two kernels for the engine of tests/cuda_engines.py: y = 2 x, and y = x + w."""

# mypy: ignore-errors
from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import triton
import triton.language as tl

from tests.cuda_engines import COUNT, cuda_engine
from twofour.core.cuda import Cuda
from twofour.core.target import Target
from twofour.engine import Engine
from twofour.kernels.cuda.kernel import Compiled, Kernel, compile_kernel

BLOCK = COUNT // 2


@triton.jit
def double_kernel(x, y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, 2 * tl.load(x + at))


@triton.jit
def add_kernel(x, w, y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at) + tl.load(w + at))


def compiled(capability: int) -> dict[str, Compiled]:
    """Both, by the names that the engine's objects have."""
    found = {}
    for name, function, roles in (
        ("double", double_kernel, "xy"),
        ("add", add_kernel, "xwy"),
    ):
        operands = tuple((role, "float32") for role in roles)
        kernel = Kernel(function, operands, {"SIZE": BLOCK}, (2, 1, 1), warps=1)
        found[name] = compile_kernel(kernel, capability)
    return found


def gpu_engine(capability: int) -> Engine:
    """The engine y = 2 x + w with code for this GPU."""
    made = cuda_engine(gpu=f"sm{capability}")
    target = Target("cuda", platform.machine(), "this GPU", cuda=Cuda(f"sm{capability}"))
    code = {
        name: np.frombuffer(each.cubin, np.uint8) for name, each in compiled(capability).items()
    }
    return Engine(replace(made.plan, target=target), made.weights, code, made.subgraphs)
