"""Explain: what each layer of an engine runs as, how long it takes, and why not otherwise.

Reads an engine's plan and nothing else. Times are those measured at build, or estimated where
that was for another machine; what a whole run takes beyond their sum are steps that were not timed,
such as fallbacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from twofour.core.errors import InputError
from twofour.core.plan import CHOSEN_LATER, IN_FLOAT32, is_sparse
from twofour.engine import Candidate, Layer, Plan

FALLBACK = "onnxruntime"
SPARSE, DENSE, OTHER, CONVERSION = "sparse", "dense", "other", "conversion"
LATER = "later"
KINDS = (SPARSE, DENSE, LATER, OTHER, CONVERSION, FALLBACK)
"""Of layers: products that skip zeros, products that do not, products of which that is not known
before an engine is loaded on its GPU, other kernels, conversions."""


@dataclass(frozen=True)
class Explained:
    """One layer.

    Attributes:
        name: in the source model's words.
        op: the fused operator.
        shape: in words.
        runs_as: tactic, precision and configuration.
        time_us: as measured at build; None where it was not.
        share: of the time of all timed layers, 0 to 1; None where it was not timed.
        best_dense_us: of the dense candidates; None if none was timed.
        best_sparse_us: of the sparse candidates; None if none was timed.
        gain: times as fast as the best dense candidate the best sparse one is; None without both.
        why: why it is not sparse, not integer or not a kernel of ours, the weightiest first.
        fallback: whether it runs on ONNX Runtime.
        kind: one of KINDS.
        precision: of its operands.
        moved_bytes: of the activations it reads and writes, and of its weights; 0 where not known.
        source: the nodes of the source model that it computes.
        cause: of a conversion, who made it necessary.
        step: that it runs in, counted within the profile; ONNX Runtime times a whole one.
    """

    name: str
    op: str
    shape: str
    runs_as: str
    time_us: float | None
    share: float | None
    best_dense_us: float | None
    best_sparse_us: float | None
    gain: float | None
    why: tuple[str, ...]
    fallback: bool
    kind: str
    precision: str
    moved_bytes: int
    source: tuple[str, ...]
    cause: str
    step: int


@dataclass(frozen=True)
class Total:
    """All layers of one tactic.

    Attributes:
        tactic: its name and precision.
        layers: how many.
        time_us: their sum; None if none was timed.
        share: of the time of all timed layers.
        macs: multiply-adds, counted as if dense.
    """

    tactic: str
    layers: int
    time_us: float | None
    share: float
    macs: int


def layers_of(plan: Plan, profile: int) -> tuple[Layer, ...]:
    """The layers of one profile, in the order they run in.

    Args:
        plan: of an engine.
        profile: its number, from 1.

    Raises:
        InputError: there is no such profile.
    """
    if not 1 <= profile <= len(plan.profiles):
        count = len(plan.profiles)
        raise InputError(f"no profile {profile} in this engine", [f"expected 1 to {count}"])
    found = [i for step in plan.profiles[profile - 1].steps for i in step.layers]
    return tuple(plan.layers[i] for i in found)


def explain(plan: Plan, profile: int = 1) -> tuple[Explained, ...]:
    """Every layer of a profile, in the order it runs in."""
    shown = layers_of(plan, profile)
    whole = _sum(layer.time_us for layer in shown) or 0.0
    steps = [n for n, step in enumerate(plan.profiles[profile - 1].steps) for _ in step.layers]
    return tuple(_explained(*each, whole) for each in zip(shown, steps, strict=True))


def totals(plan: Plan, profile: int = 1) -> tuple[Total, ...]:
    """The layers of a profile summed by tactic, the longest time first."""
    shown = layers_of(plan, profile)
    whole = _sum(layer.time_us for layer in shown) or 0.0
    groups: dict[str, list[Layer]] = {}
    for layer in shown:
        groups.setdefault(_with_precision(layer), []).append(layer)
    found = []
    for tactic, layers in groups.items():
        time_us = _sum(layer.time_us for layer in layers)
        share = time_us / whole if time_us and whole else 0.0
        found.append(Total(tactic, len(layers), time_us, share, sum(each.macs for each in layers)))
    return tuple(sorted(found, key=lambda total: -(total.time_us or 0.0)))


def find_layer(plan: Plan, name: str, profile: int = 1) -> Layer:
    """A layer by its name, or by a part of it that only one layer has.

    Raises:
        InputError: no layer has it, or several have.
    """
    shown = layers_of(plan, profile)
    exact = [layer for layer in shown if layer.name == name]
    found = exact or [layer for layer in shown if name in layer.name]
    if not found:
        names = [layer.name for layer in shown]
        raise InputError(f"no layer {name!r} in this engine", [f"it has {', '.join(names)}"])
    if len(found) > 1 and not exact:
        reason = f"it matches {', '.join(layer.name for layer in found)}"
        raise InputError(f"layer {name!r} is not unique", [reason], "give more of its name")
    return found[0]


def verdict(candidate: Candidate, chosen: Layer) -> str:
    """Why one candidate was taken, lost or was refused."""
    if candidate.time_us is None:
        return f"refused: {candidate.reason}"
    if (candidate.tactic, candidate.config) == (chosen.tactic, chosen.config):
        return "chosen"
    if not chosen.time_us:
        return "not chosen"
    return f"lost: {candidate.time_us / chosen.time_us:.2f} times the chosen one's time"


def kind_of(layer: Layer) -> str:
    """Which of KINDS a layer is."""
    if layer.tactic == FALLBACK:
        return FALLBACK
    if layer.cause:
        return CONVERSION
    if is_sparse(layer.tactic):
        return SPARSE
    if layer.tactic == CHOSEN_LATER:
        return LATER
    return DENSE if layer.pattern else OTHER


def _explained(layer: Layer, step: int, whole_us: float) -> Explained:
    own = [c for c in layer.candidates if not c.tactic.endswith(IN_FLOAT32)]
    dense = _best(c for c in own if not is_sparse(c.tactic))
    sparse = _best(c for c in own if is_sparse(c.tactic))
    share = layer.time_us / whole_us if layer.time_us is not None and whole_us else None
    return Explained(
        layer.name,
        layer.op,
        layer.shape,
        " ".join(part for part in (_with_precision(layer), layer.config) if part),
        layer.time_us,
        share,
        dense,
        sparse,
        dense / sparse if dense and sparse else None,
        _why(layer, dense, sparse),
        layer.tactic == FALLBACK,
        kind_of(layer),
        layer.precision,
        layer.work.moved_bytes + layer.weight_bytes,
        layer.source,
        layer.cause,
        step,
    )


def _why(layer: Layer, dense: float | None, sparse: float | None) -> tuple[str, ...]:
    """What decided, then what the build noted, then why each sparse tactic was refused."""
    reasons = []
    if dense and sparse and dense <= sparse:
        reasons.append(f"dense is faster: {dense:.2f} us, the best sparse kernel {sparse:.2f}")
    reasons += layer.notes
    if sparse is None and not is_sparse(layer.tactic):
        refused = (c for c in layer.candidates if is_sparse(c.tactic) and c.reason)
        for candidate in refused:
            if not any(candidate.reason in reason for reason in reasons):
                reasons.append(f"no {candidate.tactic}: {candidate.reason}")
    return tuple(dict.fromkeys(reasons))


def _with_precision(layer: Layer) -> str:
    return f"{layer.tactic} {layer.precision}".strip()


def _best(candidates: Iterable[Candidate]) -> float | None:
    return min((c.time_us for c in candidates if c.time_us is not None), default=None)


def _sum(times: Iterable[float | None]) -> float | None:
    """Of the times that there are; None if there is none."""
    known = [time for time in times if time is not None]
    return sum(known) if known else None
