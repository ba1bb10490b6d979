"""The step `round` of quantization: weights in the integers that change outputs the least.

    group the layers by how many Gram matrices fit the memory
    for each group: run the samples through the float model up to these layers (capture.py)
        for each weight: settle integers and scales (core/rounding.py)

Layers that read one weight share its integers, chosen for the sum of what they all read. Layers
that read one input share its Gram matrix and factor.

The inputs are those of the float model. Those of the quantized one, layer after layer, take longer
and are no better; correcting towards the float model's outputs is worse for some networks
(docs/rounding.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.progress import Report, silent
from twofour.core.rounding import OrderedFactor, Rounded, round_weight, rounding_factor
from twofour.onnx_tools.capture import (
    Reading,
    Samples,
    capture,
    counted_gram,
    reading_of,
    why_unreadable,
)
from twofour.onnx_tools.insert import not_finite_weight
from twofour.onnx_tools.jobs import Job, Room, within
from twofour.onnx_tools.weights import Weight, find_weight

MEMORY_BYTES = 2**30
"""What the Gram matrices of a group of layers may take together."""

Array = NDArray[Any]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class RoundedWeights:
    """What became of the weights.

    Attributes:
        weights: layer -> its weight as int8, laid out as the layer reads it, and float32 [N]
            scales of the output channels, by name.
        cost_left: layer -> what its rounding costs as a share of what the nearest integers cost,
            ||(w - w8 * scale) X||^2 with the damping of `rounding_factor`.
        left: layer -> why its weight goes to the nearest integers, by name.
    """

    weights: Mapping[str, tuple[Array, Array]]
    cost_left: Mapping[str, float]
    left: Mapping[str, str]


def round_weights(
    model: ir.Model,
    layers: Sequence[ir.Node],
    samples: Samples,
    progress: Report = silent,
    memory_bytes: int = MEMORY_BYTES,
) -> RoundedWeights:
    """Rounds the weights of layers to int8 so that their outputs on the samples change little.

    Deterministic: the same model, samples and number of threads give the same integers.

    Args:
        model: float, prepared; stays as it is.
        layers: of its main graph, each a Conv, Gemm or MatMul with a constant float32 weight.
        samples: what the model will see, some hundred; gone through once for each group of layers.
        progress: called after each batch and each weight, with the weights done.
        memory_bytes: that the Gram matrices of a group of layers may take.

    Raises:
        InputError: the data does not fit, or it, a weight or an input of a layer is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.

    Source: see `core/rounding.py`.
    """
    found = {layer: _weight_of(layer) for layer in layers}
    left = {str(layer.name): why_unreadable(model, layer, w) for layer, w in found.items()}
    left = {name: reason for name, reason in left.items() if reason}
    readers: dict[tuple[ir.Value, tuple[int, ...]], list[ir.Node]] = {}
    for layer, weight in found.items():
        if str(layer.name) not in left:
            readers.setdefault((weight.source, weight.axes), []).append(layer)
    jobs = [
        Job(str(group[0].name), found[group[0]], tuple(reading_of(n, found[n]) for n in group))
        for group in readers.values()
    ]
    outcomes = _outcomes(model, jobs, samples, progress, Room(memory_bytes, 2))
    weights, cost_left = {}, {}
    for group, job, outcome in zip(readers.values(), jobs, outcomes, strict=True):
        for name in (str(layer.name) for layer in group):
            if isinstance(outcome, str):
                left[name] = outcome
            else:
                weights[name] = job.weight.as_stored(outcome.w8), outcome.scale
                cost_left[name] = outcome.cost_left
    return RoundedWeights(weights, cost_left, left)


def _weight_of(layer: ir.Node) -> Weight:
    weight = find_weight(layer)
    if weight is None:
        raise ValueError(f"{layer.name!r} has no constant weight")
    if not np.isfinite(weight.values).all():
        raise not_finite_weight(layer, weight.stored)
    return weight


def _outcomes(
    model: ir.Model, jobs: Sequence[Job], samples: Samples, progress: Report, room: Room
) -> Iterator[Rounded | str]:
    """Rounds each weight; a text says why one is left."""
    done = 0
    for group in room.groups(jobs):
        fitting = [job for job in group if not room.too_small_for(job)]
        readings = [reading for job in fitting for reading in job.readings]
        told = within(progress, done, len(jobs))
        sums = capture(model, readings, counted_gram, samples, told) if readings else {}
        factors: dict[tuple[Reading, ...], list[OrderedFactor]] = {}
        for job in group:
            yield room.too_small_for(job) or _outcome(job, sums, factors)
            done += 1
            progress(done, len(jobs), job.name)


def _outcome(
    job: Job, sums: dict[Reading, Float64], factors: dict[tuple[Reading, ...], list[OrderedFactor]]
) -> Rounded | str:
    known = [sums[reading] for reading in job.readings if reading in sums]
    if not known:
        return "no sample reaches it"
    if job.readings not in factors:
        total: Float64 = sum(known[1:], known[0])
        factors.clear()  # what follows rarely reads the same
        factors[job.readings] = [rounding_factor(each[:-1], each[-1, 0]) for each in total]
    parts = np.split(job.weight.values, len(known[0]))
    solved = [
        round_weight(part, each) for part, each in zip(parts, factors[job.readings], strict=True)
    ]
    return Rounded(
        np.concatenate([each.w8 for each in solved]),
        np.concatenate([each.scale for each in solved]),
        np.concatenate([each.cost for each in solved]),
        np.concatenate([each.nearest_cost for each in solved]),
    )
