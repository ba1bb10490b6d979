"""Prunes the weights of an ONNX file in one shot, without training.

By magnitude all weights that `weights.py` finds, in bodies of If, Loop and Scan too. One that
several nodes read is pruned for all of them; where two read it along different axes, it gets the
pattern along both. With data (`one_shot.py`) those whose inputs can be captured; others are left as
they were, with the reason: experts (experts.py), for one. What routes tokens to experts is not
pruned at all.

Everything else in the file stays as it was, but that functions are inlined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

import numpy as np
import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask
from twofour.core.patterns import Pattern, energy_kept, ineligible, is_pattern
from twofour.onnx_tools.capture import reading_of, why_unreadable
from twofour.onnx_tools.edit import Array, is_standard
from twofour.onnx_tools.experts import ROUTES, routers
from twofour.onnx_tools.jobs import Job
from twofour.onnx_tools.one_shot import Calibration, Outcome, prune_layers
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.promises import check, promise, require_kept
from twofour.onnx_tools.weights import Weight, layer_weights


@dataclass(frozen=True)
class Pruned:
    """What became of one weight.

    Attributes:
        node: name of the layer.
        weight: name of the initializer.
        reason: why it was left as it was; "" where it was pruned.
        energy_kept: share of the sum of squares of the old values that is left, 0 to 1.
        method: magnitude, wanda or sparsegpt; "" where it was left as it was.
        output_error: how much the layer's outputs change on the samples, as a share of their norm;
            None where the method does not tell.
        damping: of SparseGPT, more than was asked for where the layer needed it; else None.
    """

    node: str
    weight: str
    reason: str = ""
    energy_kept: float = 1.0
    method: str = ""
    output_error: float | None = None
    damping: float | None = None


def prune(
    model: ir.Model,
    pattern: str | Pattern = "2:4",
    skip: Iterable[str] = (),
    keep: Iterable[str | Pattern] = (),
    include: Iterable[str] = ("*",),
    calibration: Calibration | None = None,
) -> tuple[ir.Model, tuple[Pruned, ...]]:
    """Sets weights to zero, as many in each group as the pattern wants.

    Deterministic: the same model and data give the same weights.

    Args:
        model: float or quantized; stays as it is. In the new one functions are inlined.
        pattern: such as `2:4` or `2:4/pair`.
        skip: shell patterns of names of nodes or weights that stay dense.
        keep: patterns such as `4:8`; a weight that has one of them stays as it is.
        include: shell patterns of names of nodes or weights; others stay dense.
        calibration: data, and what to do with it; None for magnitude: the smallest weights go.

    Returns:
        A new model, whose metadata promises the pattern of the weights that have it, and what
        became of each weight of a Conv, Gemm or MatMul.

    Raises:
        InputError: there is no such pattern; a name of `skip` matches nothing; the data is not
            usable (see `capture.capture`).
        UnsupportedError: the model has to run for the data, and ONNX Runtime cannot run it.
        GateError: a weight that stays as it is breaks what the model promises.
    """
    model = model.clone()
    if model.functions:
        inline(model)
    patterns = tuple(Pattern.parse(each) for each in (pattern, *keep))
    names = _Names(tuple(include), tuple(skip))
    names.require_matches(model)
    if calibration is None:
        report = tuple(_by_magnitude(model, patterns, names))
    else:
        report = tuple(_by_data(model, patterns, names, calibration))
    promise(model, dict(_to_promise(model, patterns[0])))
    require_kept(model, "pruning")
    return model, report


@dataclass(frozen=True)
class _Names:
    """Which layers the user means."""

    include: tuple[str, ...]
    skip: tuple[str, ...]

    def why_not(self, layer: ir.Node, weight: Weight) -> str:
        """Why a layer stays as it is; "" where it is meant."""
        names = (layer.name or "", weight.name)
        if any(fnmatchcase(name, glob) for name in names for glob in self.skip):
            return "excluded by name"
        if not any(fnmatchcase(name, glob) for name in names for glob in self.include):
            return "not included by name"
        return ""

    def require_matches(self, model: ir.Model) -> None:
        """Refuses a name that means nothing; any will do for a model without layers."""
        pairs = [(layer.name or "", weight.name) for layer, weight in layer_weights(model)]
        if pairs:
            require_matches((*self.include, *self.skip), chain.from_iterable(pairs))


def require_matches(globs: Iterable[str], names: Iterable[str]) -> None:
    """Refuses shell patterns that match nothing, such as names with a slip in them.

    Args:
        globs: shell patterns.
        names: of layers and weights.

    Raises:
        InputError: one of them matches no name.
    """
    known = sorted(set(names) - {""})
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise InputError(
                f"{glob!r} matches no layer",
                [f"layers and weights are: {', '.join(known) or 'none'}"],
                "choose some of these names",
            )


def _to_promise(model: ir.Model, pattern: Pattern) -> Iterator[tuple[str, str]]:
    """The names of weights that have the pattern; not those that keep a stricter promise.

    Weights in two bodies may have one name, and two layers may read one along different axes: such
    a name is left out unless all that it stands for has the pattern.
    """
    values: dict[str, list[Array]] = {}
    for _, weight in layer_weights(model):
        values.setdefault(weight.name, []).append(weight.values)
    promised = {each.weight: each for each in check(model).entries}
    for name, arrays in values.items():
        old = promised.get(name)
        stays = old and not old.broken and Pattern.parse(old.pattern).demands(pattern)
        if not stays and all(is_pattern(w, pattern) for w in arrays):
            yield name, str(pattern)


def _why_not(weight: Weight, patterns: Sequence[Pattern]) -> str:
    """Why a weight cannot be pruned to the first of the patterns, or need not be; else ""."""
    if reason := ineligible(weight.values.shape, patterns[0]):
        return reason
    if not np.isfinite(weight.values).all():
        return "it holds NaN or infinite values"
    held = (each for each in patterns if is_pattern(weight.values, each))
    return next((f"already {each}" for each in held), "")


def _by_magnitude(model: ir.Model, patterns: Sequence[Pattern], names: _Names) -> Iterator[Pruned]:
    """Prunes one weight after the other, as the last one left it."""
    routing = dict.fromkeys(routers(model.graph.all_nodes()), ROUTES)
    for layer, weight in layer_weights(model):
        called = (layer.name or "", weight.name)
        known = routing.get(layer, "") or names.why_not(layer, weight)
        if reason := known or _why_not(weight, patterns):
            yield Pruned(*called, reason)
            continue
        mask = magnitude_mask(weight.values, patterns[0])
        weight.store(np.where(weight.as_stored(mask), weight.stored, weight.zero))
        yield Pruned(*called, "", energy_kept(weight.values, mask), "magnitude")


def _by_data(
    model: ir.Model, patterns: Sequence[Pattern], names: _Names, calibration: Calibration
) -> list[Pruned]:
    """Prunes what can be captured, and says of each layer what became of it, in their order."""
    layers = list(layer_weights(model))
    reasons = {layer: names.why_not(layer, weight) for layer, weight in layers}
    reasons |= dict.fromkeys(reasons.keys() & routers(model.graph.all_nodes()), ROUTES)
    readers: dict[ir.Value, list[tuple[ir.Node, Weight]]] = {}
    for layer, weight in layers:
        if not reasons[layer]:
            readers.setdefault(weight.source, []).append((layer, weight))
    jobs: dict[ir.Node, Job] = {}
    first: dict[ir.Node, ir.Node] = {}
    for group in readers.values():
        reason = _why_none_of(model, group, patterns)
        reasons |= {layer: reason for layer, _ in group}
        if not reason:
            leader, weight = group[0]
            readings = tuple(reading_of(*each) for each in group)
            jobs[leader] = Job(leader.name or "", weight, readings)
            first |= {layer: leader for layer, _ in group}
    done = {}
    outcomes = prune_layers(model, list(jobs.values()), patterns[0], calibration)
    for layer, (job, outcome) in zip(jobs, outcomes, strict=True):
        done[layer] = _applied(job, outcome, calibration.method)
    for layer, leader in first.items():
        reasons[layer] = done[leader].reason or f"already {patterns[0]}"
    return [
        done.get(layer) or Pruned(layer.name or "", weight.name, reasons[layer])
        for layer, weight in layers
    ]


def _why_none_of(
    model: ir.Model, readers: Sequence[tuple[ir.Node, Weight]], patterns: Sequence[Pattern]
) -> str:
    """Why a weight is not pruned by data for the layers that read it; else ""."""
    if len({weight.axes for _, weight in readers}) > 1:
        return "layers read it along different axes"
    uses = readers[0][1].source.uses()
    if tables := [node for node, at in uses if is_standard(node, "Gather") and at == 0]:
        return f"it is an embedding as well, read by Gather {tables[0].name!r}"
    unreadable = (why_unreadable(model, layer, weight) for layer, weight in readers)
    return _why_not(readers[0][1], patterns) or next(filter(None, unreadable), "")


def _applied(job: Job, outcome: Outcome, method: str) -> Pruned:
    """Writes a new weight into the model."""
    weight = job.weight
    if outcome.values is None or outcome.mask is None:
        return Pruned(job.name, weight.name, outcome.reason)
    weight.store(weight.as_stored(outcome.values).astype(weight.stored.dtype))
    return Pruned(
        job.name,
        weight.name,
        "",
        energy_kept(weight.values, outcome.mask),
        method,
        outcome.output_error,
        outcome.damping,
    )
