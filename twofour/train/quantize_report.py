"""What a Quantizer rounds, and what stays float: told as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

COLUMNS = 100
_NAME_COLUMNS = 44


@dataclass(frozen=True)
class PlaceReport:
    """One scale, or one layer or sum that stays float.

    Attributes:
        name: of the quantizer; of what stays float, its layer or function.
        kind: `weight`, `activation` or `float`.
        form: `int8` or `uint8`; "" of what stays float.
        shape: of a weight.
        tensors: the layers that read a weight; the tensors that share the scale.
        scale: the largest of a weight's; None before calibration.
        reason: why it stays float.
    """

    name: str
    kind: str
    form: str = ""
    shape: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    scale: float | None = None
    reason: str = ""


def table(entries: Iterable[PlaceReport]) -> str:
    """Text of at most 100 columns, with totals."""
    every = list(entries)
    lines = [f"{'name':{_NAME_COLUMNS}} {'kind':10} {'form':5} {'scale':>10}  shape or reason"]
    for entry in every:
        name = textwrap.shorten(entry.name, _NAME_COLUMNS, placeholder="...")
        scale = "" if entry.scale is None else f"{entry.scale:.4g}"
        first = f"{name:{_NAME_COLUMNS}} {entry.kind:10} {entry.form:5} {scale:>10}  "
        shape = "x".join(map(str, entry.shape))
        shared = f"shared by {len(entry.tensors)}" if len(entry.tensors) > 1 else ""
        note = entry.reason or " ".join(part for part in (shape, shared) if part)
        wrapped = textwrap.wrap(note, COLUMNS - len(first)) or [""]
        lines.append((first + wrapped[0]).rstrip())
        lines += [" " * len(first) + line for line in wrapped[1:]]
    counts = [sum(e.kind == kind for e in every) for kind in ("weight", "activation", "float")]
    lines.append(f"{counts[0]} weights, {counts[1]} scales of activations, {counts[2]} float")
    return "\n".join(lines)
