"""Tactics: the ways to run a convolution or matrix product on a CPU, found by file name.

A tactic is a file `conv_*.py` beside this one with a module constant `TACTICS`. It refuses what it
cannot do, with a reason a user can act on, and lists its configurations, best guess first. Which
one is used is decided by time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import twofour.kernels.cpu as home
from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.problem import Config, ConvProblem

Weights = NDArray[Any]
WIDE = ("avx512vnni", "avx2", "vector")
"""Instruction sets with kernels of 16 lanes a register, or written as if."""


class Kernel(Protocol):
    """Code and packed weights of a tactic; `nest.Tiled` makes both of a packed format."""

    def emit(self, name: str, problem: ConvProblem, config: Config, isa: str) -> str:
        """The kernel as an LLVM module; its symbol is `name`, its signature that of nest.py."""
        ...

    def pack(
        self,
        w: Weights,
        problem: ConvProblem,
        config: Config,
        epilogue: Epilogue,
        x_zero_point: int,
    ) -> NDArray[np.uint8]:
        """Weights and constants as the kernel reads them.

        Args:
            w: [groups * n, c, KH, KW], int8 or float32.
            problem: the problem.
            config: the kernel's configuration.
            epilogue: its constants; zero points as stored.
            x_zero_point: of the input as stored (uint8).
        """
        ...

    def work(self, problem: ConvProblem, config: Config) -> tuple[int, int]:
        """Row pieces and panels, which threads share."""
        ...


@dataclass(frozen=True)
class Tactic:
    """One way to run a convolution.

    Attributes:
        name: as reports show it.
        dtype: of the inputs, "int8", "bfloat16" or "float32".
        pattern: the weight pattern it exploits; "" for dense.
        kernel: its code and packed weights.
        refuse: why it cannot take a problem with weights [groups * n, c, KH, KW] on an instruction
            set; "" if it can.
        configs: its configurations for a problem on an instruction set, best guess first.
        depthwise: it takes depthwise convolutions, and only these; the others take the rest.
        most_positions: with more outputs a channel another tactic is faster; None if there is none.
        only: the instruction sets that it is for; () for all. On others it is not even refused.
    """

    name: str
    dtype: str
    pattern: str
    kernel: Kernel
    refuse: Callable[[ConvProblem, Weights, str], str]
    configs: Callable[[ConvProblem, str], list[Config]]
    depthwise: bool = False
    most_positions: int | None = None
    only: tuple[str, ...] = ()

    def is_for(self, isa: str) -> bool:
        """Whether it is to be considered on an instruction set at all."""
        return not self.only or isa in self.only

    def why_slow(self, problem: ConvProblem) -> str:
        """Why another tactic is faster; "" if that is not known beforehand."""
        positions, most = problem.batch * problem.out_h * problem.out_w, self.most_positions
        if most is None or positions <= most or problem.open_rows:
            return ""
        return f"faster than others for up to {most} outputs a channel: this layer has {positions}"


@cache
def tactics() -> tuple[Tactic, ...]:
    """All tactics, in the order of their files."""
    names = sorted(
        m.name for m in pkgutil.iter_modules(home.__path__) if m.name.startswith("conv_")
    )
    modules = [importlib.import_module(f"{home.__name__}.{name}") for name in names]
    return tuple(tactic for module in modules for tactic in module.TACTICS)
