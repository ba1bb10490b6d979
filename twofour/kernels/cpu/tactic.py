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
from typing import Any

from numpy.typing import NDArray

import twofour.kernels.cpu as home
from twofour.kernels.cpu.packing import Format
from twofour.kernels.cpu.problem import Config, ConvProblem

Weights = NDArray[Any]


@dataclass(frozen=True)
class Tactic:
    """One way to run a convolution.

    Attributes:
        name: as reports show it.
        dtype: of the inputs, "int8" or "float32".
        pattern: the weight pattern it exploits; "" for dense.
        format: the packed format and its inner loop.
        refuse: why it cannot take a problem with weights [groups * n, c, KH, KW] on an instruction
            set; "" if it can.
        configs: its configurations for a problem on an instruction set, best guess first.
    """

    name: str
    dtype: str
    pattern: str
    format: Format
    refuse: Callable[[ConvProblem, Weights, str], str]
    configs: Callable[[ConvProblem, str], list[Config]]


@cache
def tactics() -> tuple[Tactic, ...]:
    """All tactics, in the order of their files."""
    names = sorted(
        m.name for m in pkgutil.iter_modules(home.__path__) if m.name.startswith("conv_")
    )
    modules = [importlib.import_module(f"{home.__name__}.{name}") for name in names]
    return tuple(tactic for module in modules for tactic in module.TACTICS)
