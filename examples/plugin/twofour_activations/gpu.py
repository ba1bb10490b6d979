"""The kernel of `example.SquaredRelu` for GPUs: imported only where an engine is built for one."""

import math

import triton
import triton.language as tl

from twofour.kernels.cuda.kernel import Kernel, Recipe

TYPES = ("float32", "float16", "bfloat16")


@triton.jit
def squared_relu(x, y, SCALE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of y = max(x, 0)^2 * SCALE."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32), 0.0)
    tl.store(y + at, (value * value * SCALE).to(y.dtype.element_ty), mask=at < COUNT)


def why_not(problem, capability):
    """Why there is no kernel for these operands; "" if there is one."""
    dtype = problem.inputs[0].dtype
    return "" if dtype in TYPES else f"it takes floats, not {dtype}"


def recipes(problem, capability, *, effort=2):
    """One kernel, with the elements of a program to be timed."""
    (x,), (y,) = problem.inputs, problem.outputs
    operands = ((x.name, x.dtype), (y.name, y.dtype))
    found = []
    for block in (1024, 512, 2048)[: effort + 1]:
        numbers = {
            "SCALE": problem.attributes["scale"],
            "COUNT": math.prod(y.shape),
            "BLOCK": block,
        }
        grid = (-(-numbers["COUNT"] // block), 1, 1)
        call = Kernel(squared_relu, operands, numbers, grid)
        found.append(Recipe("squared relu", f"{block} a program", (call,)))
    return found
