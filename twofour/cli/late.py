"""Packages that others import and few commands use are read when they are first used.

`onnx_ir` imports sympy for its symbolic dimensions: 0.2 s, a fifth of what `twofour inspect` may
take, and most models have none. `onnxscript` imports all operators of the reference evaluator.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

MODULES = frozenset({"sympy", "onnx_ir._symbolic_shapes", "onnx.reference.ops"})
"""The second reads the first at once, so both wait."""


class _Late:
    """Finds what the path finder finds, and runs it at the first look at one of its names."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in MODULES else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def import_late() -> None:
    """From now on `MODULES` are read when they are used; those already read stay."""
    if _Late not in sys.meta_path:
        sys.meta_path.insert(0, _Late)
