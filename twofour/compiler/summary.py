"""An engine in a few lines: what takes its time, what its conversions cost, what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twofour.compiler.explain import CONVERSION, DENSE, FALLBACK, KINDS, kind_of, layers_of
from twofour.compiler.reasons import NO_BF16, NO_Q
from twofour.engine import Layer, Plan

_NOTABLE = 0.03
"""Of the time: less is not worth a word."""
_NOT_SPARSE = "the weight is not 2:4: output channel"


@dataclass(frozen=True)
class Part:
    """All layers of one kind.

    Attributes:
        kind: see `explain.KINDS`.
        layers: how many.
        time_us: their sum.
        share: of all layers, 0 to 1.
    """

    kind: str
    layers: int
    time_us: float
    share: float


@dataclass(frozen=True)
class Conversion:
    """A layer that changes how a value is stored, and computes nothing.

    Attributes:
        name: of the layer.
        op: what it does.
        shape: in words.
        time_us: None where it was not timed.
        share: of all layers, 0 to 1; None where it was not timed.
        moved_bytes: that it reads and writes.
        cause: who made it necessary.
    """

    name: str
    op: str
    shape: str
    time_us: float | None
    share: float | None
    moved_bytes: int
    cause: str


def parts(plan: Plan, profile: int = 1) -> tuple[Part, ...]:
    """The time of each kind of layer, kinds without layers left out."""
    layers = layers_of(plan, profile)
    whole = _sum(layers)
    found = []
    for kind in KINDS:
        own = [layer for layer in layers if kind_of(layer) == kind]
        if own:
            found.append(Part(kind, len(own), _sum(own), _sum(own) / whole if whole else 0.0))
    return tuple(found)


def conversions(plan: Plan, profile: int = 1) -> tuple[Conversion, ...]:
    """Every conversion, the longest first."""
    layers = layers_of(plan, profile)
    whole = _sum(layers)
    found = [
        Conversion(
            layer.name,
            layer.op,
            layer.shape,
            layer.time_us,
            layer.time_us / whole if layer.time_us is not None and whole else None,
            layer.work.moved_bytes,
            layer.cause,
        )
        for layer in layers
        if kind_of(layer) == CONVERSION
    ]
    return tuple(sorted(found, key=lambda each: -(each.time_us or 0.0)))


def advice(plan: Plan, profile: int = 1) -> tuple[str, ...]:
    """What is worth doing next, the largest share of the time first."""
    layers = layers_of(plan, profile)
    whole = _sum(layers)
    found = [(share, text) for share, text in _ideas(layers, whole) if share >= _NOTABLE]
    return tuple(f"{share:.0%} of the time: {text}" for share, text in sorted(found, reverse=True))


def _ideas(layers: Sequence[Layer], whole: float) -> Iterator[tuple[float, str]]:
    """Each with the share of the time that it is about."""

    def share(some: Sequence[Layer]) -> float:
        return _sum(some) / whole if whole else 0.0

    fallbacks = [layer for layer in layers if kind_of(layer) == FALLBACK]
    if fallbacks:
        ops = ", ".join(dict.fromkeys(layer.op for layer in fallbacks))
        reason = next((note for layer in fallbacks for note in layer.notes), "no kernel")
        yield share(fallbacks), f"runs on ONNX Runtime ({_short(ops)}): {_short(reason)}"
    moved = [layer for layer in layers if kind_of(layer) == CONVERSION]
    if moved:
        worst = max(moved, key=lambda layer: layer.time_us or 0.0)
        yield share(moved), f"conversions (--conversions), the longest {worst.name}: {worst.cause}"
    dense = [layer for layer in layers if kind_of(layer) == DENSE]
    prunable = [each for each in dense if any(n.startswith(_NOT_SPARSE) for n in each.notes)]
    if prunable:
        yield share(prunable), f"{_products(prunable)} with weights that are not 2:4: twofour prune"
    floats = [layer for layer in layers if layer.pattern and NO_Q in layer.notes]
    if floats:
        also = ", or build --bf16" if any(NO_BF16 in layer.notes for layer in floats) else ""
        yield share(floats), f"{_products(floats)} not in INT8: twofour quantize{also}"


def _products(layers: Sequence[Layer]) -> str:
    return f"{len(layers)} product{'s' * (len(layers) > 1)}"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _sum(layers: Sequence[Layer]) -> float:
    """Of the times that there are."""
    return sum(layer.time_us or 0.0 for layer in layers)
