"""Prunes the weights of an ONNX file in one shot, by magnitude, without training.

Good for measuring what a pattern gains in time. Accuracy is kept by fine-tuning afterwards
(`twofour.train`), not by this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from twofour.core.patterns import Pattern, energy_kept, ineligible, is_pattern, magnitude_mask
from twofour.onnx_tools.edit import Array
from twofour.onnx_tools.weights import Weight, layer_weights


@dataclass(frozen=True)
class Pruned:
    """What became of one weight.

    Attributes:
        node: name of the layer.
        weight: name of the initializer.
        reason: why it was left as it was; "" where it was pruned.
        energy_kept: share of the sum of squares that is left, 0 to 1.
    """

    node: str
    weight: str
    reason: str = ""
    energy_kept: float = 1.0


def prune(
    model: ir.Model,
    pattern: str | Pattern = "2:4",
    skip: Iterable[str] = (),
    keep: Iterable[str | Pattern] = (),
) -> tuple[ir.Model, tuple[Pruned, ...]]:
    """Sets the smallest weights of each group to zero.

    Args:
        model: float or quantized; stays as it is.
        pattern: such as `2:4` or `2:4/pair`.
        skip: shell patterns of names of nodes or weights that stay dense.
        keep: patterns such as `4:8`; a weight that has one of them stays as it is.

    Returns:
        A new model, and what became of each weight of a Conv, Gemm or MatMul.

    Raises:
        InputError: there is no such pattern.
    """
    model, skip = model.clone(), tuple(skip)
    patterns = tuple(Pattern.parse(each) for each in (pattern, *keep))
    report = []
    for layer, weight in layer_weights(model):
        names = (layer.name or "", weight.name)
        left = any(fnmatchcase(name, glob) for name in names for glob in skip)
        reason, kept = ("excluded by name", 1.0) if left else _prune_one(model, weight, patterns)
        report.append(Pruned(*names, reason, kept))
    return model, tuple(report)


def _prune_one(model: ir.Model, weight: Weight, patterns: tuple[Pattern, ...]) -> tuple[str, float]:
    """Prunes the initializer to the first of the patterns, unless it has one of them.

    Returns:
        The reason why not, and the energy kept.
    """
    pattern = patterns[0]
    if reason := ineligible(weight.values.shape, pattern):
        return reason, 1.0
    if held := [each for each in patterns if is_pattern(weight.values, each)]:
        return f"already {held[0]}", 1.0
    value = model.graph.initializers.get(weight.name)
    turned = _orientation(weight)
    if value is None or turned is None:
        return "the weight is computed in the graph: fold constants first", 1.0
    mask = magnitude_mask(weight.values, pattern)
    pruned = np.where(mask.T if turned else mask, weight.stored, np.zeros((), weight.stored.dtype))
    value.const_value = ir.tensor(np.ascontiguousarray(pruned), name=weight.name)
    return "", energy_kept(weight.values, mask)


def _orientation(weight: Weight) -> bool | None:
    """Whether the stored array is the transposed weight; None if it is neither of the two."""
    if _same(weight.stored, weight.values):
        return False
    return True if weight.stored.ndim == 2 and _same(weight.stored.T, weight.values) else None


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
