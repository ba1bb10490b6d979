"""What a plugin is written with: the one module that a package with an operator imports.

    from twofour.plugins import Code, CpuTactic, Operator, Problem, Stage, kernel

See docs/plugins.md for an example of a whole package.
"""

from __future__ import annotations

from twofour.core.plugins import (
    GROUP,
    Array,
    Attribute,
    Attributes,
    Code,
    CpuTactic,
    CudaTactic,
    Installed,
    Operand,
    Operator,
    Problem,
    Shape,
    Stage,
    Typed,
    find,
    installed,
)
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.vector import float_bits

__all__ = [
    "GROUP",
    "Array",
    "Attribute",
    "Attributes",
    "Code",
    "CpuTactic",
    "CudaTactic",
    "Function",
    "Installed",
    "Operand",
    "Operator",
    "Problem",
    "Shape",
    "Stage",
    "Target",
    "Typed",
    "Value",
    "find",
    "float_bits",
    "installed",
    "kernel",
    "module_text",
    "pointers",
]


def kernel(name: str = "kernel") -> Function:
    """A function with the signature of a stage's kernel, to be written."""
    return Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )


def pointers(f: Function, problem: Problem) -> list[Value]:
    """Loads the pointers of all operands, inputs that are there first, and of the workspace.

    Args:
        f: of `kernel`.
        problem: what it computes.
    """
    return [f.load("ptr", "%x", 8 * i, 8) for i in range(len(problem.operands) + 1)]
