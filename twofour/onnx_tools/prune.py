"""Prunes the weights of an ONNX file in one shot, by magnitude, without training.

All weights that `weights.py` finds, in bodies of If, Loop and Scan too. One that several nodes read
is pruned for all of them; where two read it along different axes, it gets the pattern along both.

Good for measuring what a pattern gains in time. Accuracy is kept by fine-tuning afterwards
(`twofour.train`), not by this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from twofour.core.masks import magnitude_mask
from twofour.core.patterns import Pattern, energy_kept, ineligible, is_pattern
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
        model: float or quantized; stays as it is. In the new one functions are inlined.
        pattern: such as `2:4` or `2:4/pair`.
        skip: shell patterns of names of nodes or weights that stay dense.
        keep: patterns such as `4:8`; a weight that has one of them stays as it is.

    Returns:
        A new model, and what became of each weight of a Conv, Gemm or MatMul.

    Raises:
        InputError: there is no such pattern.
    """
    model, skip = model.clone(), tuple(skip)
    if model.functions:
        common_passes.InlinePass()(model)
    patterns = tuple(Pattern.parse(each) for each in (pattern, *keep))
    report = []
    for layer, weight in layer_weights(model):
        names = (layer.name or "", weight.name)
        left = any(fnmatchcase(name, glob) for name in names for glob in skip)
        reason, kept = ("excluded by name", 1.0) if left else _prune_one(weight, patterns)
        report.append(Pruned(*names, reason, kept))
    return model, tuple(report)


def _prune_one(weight: Weight, patterns: tuple[Pattern, ...]) -> tuple[str, float]:
    """Prunes the weight to the first of the patterns, unless it has one of them.

    Returns:
        The reason why not, and the energy kept.
    """
    pattern = patterns[0]
    if reason := ineligible(weight.values.shape, pattern):
        return reason, 1.0
    if not np.isfinite(weight.values).all():
        return "it holds NaN or infinite values", 1.0
    if held := [each for each in patterns if is_pattern(weight.values, each)]:
        return f"already {held[0]}", 1.0
    mask = magnitude_mask(weight.values, pattern)
    _store(weight, np.where(weight.as_stored(mask), weight.stored, weight.zero))
    return "", energy_kept(weight.values, mask)


def _store(weight: Weight, array: Array) -> None:
    """Writes the weight to where it was read: an initializer or a Constant node."""
    value = weight.source
    old = ir.convenience.get_const_tensor(value)
    dtype = None if old is None else old.dtype
    tensor = ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=weight.name)
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
