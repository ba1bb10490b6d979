"""Shell patterns that mean exactly these nodes."""

from __future__ import annotations

from collections.abc import Iterable
from glob import escape

from twofour.compiler.prunable import Network


def exactly(names: Iterable[str], model: Network) -> tuple[str, ...]:
    """A pattern for each name that a node of the model has, as `QuantizeOptions.exclude` takes it.

    Args:
        names: of nodes; those that the model has not are left out.
        model: that is to be quantized, prepared.
    """
    known = {node.name for node in model.graph}
    return tuple(_escaped(name) for name in dict.fromkeys(names) if name and name in known)


def _escaped(name: str) -> str:
    """`op:` at its beginning would mean operators."""
    return f"[o]{escape(name[1:])}" if name.startswith("op:") else escape(name)
