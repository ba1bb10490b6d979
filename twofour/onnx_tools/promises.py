"""Promises kept at each hand-over: the patterns that a file records are those its weights have.

    export_onnx, prune      write them (`promise`)
    quantize                hands them on to the int8 weights (`carry`), zeros stay zeros
    build, inspect          check them (`require_kept`, `check`)

A promise of a name that no layer's weight has cannot be checked: another tool renamed it, or folded
it into something else. That is a note, not an error: what such a tool makes is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from twofour.core import promises
from twofour.core.errors import GateError
from twofour.core.patterns import why_not
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.weights import Weight, layer_weights

_SHOWN = 8
_FIX = (
    "prune again (twofour prune), keep the mask while training (Sparsifier.attach), or drop the "
    f"promise: build with --sparsity disable, or remove the metadata entry {promises.KEY!r}"
)


@dataclass(frozen=True)
class Promise:
    """One promise of a file, and what became of it.

    Attributes:
        weight: name of the initializer.
        pattern: promised.
        layers: names of the layers that read it; none where it cannot be checked.
        broken: why the weight does not have the pattern, and where; "" where it has it.
    """

    weight: str
    pattern: str
    layers: tuple[str, ...]
    broken: str = ""


@dataclass(frozen=True)
class Promises:
    """What a file promises.

    Attributes:
        entries: in the order of the layers, at last those that cannot be checked.
        notes: what of the metadata cannot be understood or checked, in words.
    """

    entries: tuple[Promise, ...]
    notes: tuple[str, ...]


def check(model: ir.Model) -> Promises:
    """Holds the weights of a model against the patterns that its metadata promises.

    Args:
        model: float or quantized.
    """
    text = model.metadata_props.get(promises.KEY)
    if text is None:
        return Promises((), ())
    promised, notes = promises.from_text(text)
    model = _inlined(model)
    layers: dict[str, list[str]] = {}
    broken: dict[str, str] = {}
    for layer, weight in layer_weights(model):
        if weight.name not in promised:
            continue
        reason = why_not(weight.values, promised[weight.name])
        layers.setdefault(weight.name, []).append(layer.name or "")
        if reason is not None and weight.name not in broken:
            broken[weight.name] = f"{layer.op_type} {layer.name!r}: {reason}"
    found = [
        Promise(name, promised[name], tuple(read_by), broken.get(name, ""))
        for name, read_by in layers.items()
    ]
    gone = [name for name in promised if name not in layers]
    found += [Promise(name, promised[name], ()) for name in gone]
    if gone:
        some = ", ".join(repr(name[:80]) for name in gone[:4]) + (", ..." if gone[4:] else "")
        notes += (f"no layer has {len(gone)} of the weights whose pattern is promised: {some}",)
    return Promises(tuple(found), notes)


def require_kept(model: ir.Model, what: str = "the model") -> tuple[str, ...]:
    """Refuses a model that breaks what it promises.

    Args:
        model: float or quantized.
        what: broke them, for the message.

    Returns:
        The notes of `check`.

    Raises:
        GateError: names the first violation in each weight that has one.
    """
    found = check(model)
    broken = [each for each in found.entries if each.broken]
    if not broken:
        return found.notes
    reasons = [
        f"weight {each.weight!r} of {each.broken}; expected {each.pattern}"
        for each in broken[:_SHOWN]
    ]
    reasons += [f"and {len(broken) - _SHOWN} more"] if broken[_SHOWN:] else []
    checkable = sum(bool(each.layers) for each in found.entries)
    raise GateError(
        f"{what} breaks the promised sparsity pattern of {len(broken)} of {checkable} weights",
        reasons,
        _FIX,
    )


def promise(model: ir.Model, patterns: Mapping[str, str]) -> None:
    """Writes promises into the metadata of a model, beside those that it has.

    Args:
        model: changed.
        patterns: name of the initializer -> name of the pattern.
    """
    known, _ = promises.from_text(model.metadata_props.get(promises.KEY, "{}"))
    if merged := known | dict(patterns):
        model.metadata_props[promises.KEY] = promises.to_text(merged)


def carry(before: ir.Model, after: ir.Model) -> None:
    """Hands the promises on to what the weights are called now, found by what layers compute.

    Args:
        before: with its promises.
        after: made from it; its metadata is changed. A promise that no layer of `before` had the
            weight of stays as it was.

    Raises:
        GateError: a layer with a promised weight is gone, or has a constant weight no more.
    """
    promised, _ = promises.from_text(before.metadata_props.get(promises.KEY, "{}"))
    if not promised:
        return
    named = list(_placed(after))
    made = {(str(layer.outputs[0].name), at): weight.name for layer, at, weight in named}
    by_name = {(layer.name, at): weight.name for layer, at, weight in named if layer.name}
    kept, renamed, lost = dict(promised), dict[str, str](), list[str]()
    for layer, at, weight in _placed(_inlined(before)):
        if weight.name not in promised:
            continue
        kept.pop(weight.name, None)
        now = made.get((str(layer.outputs[0].name), at)) or by_name.get((layer.name or "", at))
        if now is None:
            lost.append(f"{layer.op_type} {layer.name!r}, weight {weight.name!r}")
        else:
            renamed[now] = promised[weight.name]
    if lost:
        raise GateError(
            f"{len(lost)} layers lost a weight whose pattern is promised",
            lost[:_SHOWN],
            "find the step that dropped them",
        )
    after.metadata_props[promises.KEY] = promises.to_text(kept | renamed)


def _placed(model: ir.Model) -> Iterator[tuple[ir.Node, int, Weight]]:
    """Each layer, which of its weights, and the weight."""
    last: ir.Node | None = None
    at = 0
    for layer, weight in layer_weights(model):
        at = at + 1 if layer is last else 0
        last = layer
        yield layer, at, weight


def _inlined(model: ir.Model) -> ir.Model:
    """Layers may stand in functions of the model; itself where it has none."""
    if model.functions:
        model = model.clone()
        inline(model)
    return model


def without_promises(model: ir.Model) -> ir.Model:
    """The model without its promises; itself where it has none. The given one stays as it is."""
    if promises.KEY not in model.metadata_props:
        return model
    model = model.clone()
    del model.metadata_props[promises.KEY]
    return model
