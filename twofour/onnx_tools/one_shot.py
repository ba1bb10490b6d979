"""Wanda and SparseGPT on the weights of an ONNX file, layer after layer.

    order the layers as they run
    for each group of layers whose statistics fit the memory:
        run the samples through the model up to these layers, all before them pruned already
        add up each input's statistic (capture.py), forget the inputs
        choose masks, and with SparseGPT new values; write them into the model

So later layers see, and make up for, what pruning changed in earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core import criteria
from twofour.core.data import Data, DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.masks import mask_of
from twofour.core.patterns import PAIR_BLOCK, Pattern, ineligible
from twofour.core.progress import Report, silent
from twofour.core.sparsegpt import Factor, factor, sparsegpt
from twofour.onnx_tools.capture import Reading, Samples, capture, gram, squares
from twofour.onnx_tools.jobs import Job, Room, within

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Method = Literal["wanda", "sparsegpt"]


@dataclass(frozen=True)
class Calibration:
    """How weights are pruned with the help of data.

    Attributes:
        data: what the model will see, without labels: some hundred samples. See `core/data.py` and
            `core/feeds.py`. Gone through several times, so it cannot be a generator.
        method: `wanda` chooses masks by |w| times the norm of the input it is multiplied with;
            `sparsegpt` also changes what stays, so that it makes up for what goes.
        samples: use so many at most; None for all.
        memory_bytes: that the statistics of a group of layers may take.
        damping: of SparseGPT, as a share of the mean of the Gram matrix's diagonal.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        progress: called after each batch, with the layers done.

    Source: Sun et al. 2023, arXiv:2306.11695 (Wanda); Frantar and Alistarh 2023, arXiv:2301.00774.
    """

    data: DataLike
    method: Method = "sparsegpt"
    samples: int | None = None
    memory_bytes: int = 2**30
    damping: float = 0.01
    threads: int = 0
    progress: Report = field(default=silent, compare=False)

    def __post_init__(self) -> None:
        """Refuses values that mean nothing. Raises InputError."""
        if self.method not in get_args(Method):
            raise _refused("method", " or ".join(get_args(Method)), self.method)
        if self.samples is not None and self.samples < 1:
            raise _refused("samples", "at least 1", self.samples)
        if self.memory_bytes < 1:
            raise _refused("memory_bytes", "at least 1", self.memory_bytes)
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise _refused("damping", "a number above 0", self.damping)
        if self.threads < 0:
            raise _refused("threads", "0 or more", self.threads)


@dataclass(frozen=True)
class Outcome:
    """What became of a weight.

    Attributes:
        reason: why it stays as it was; "" where it was pruned.
        values: the new ones, laid out like `Weight.values`; None where it stays.
        mask: bool like `values`.
        output_error: ||(w - w') X|| / ||w X|| over all samples; None where no Gram matrix tells.
        damping: that SparseGPT had to take; None for others.
    """

    reason: str = ""
    values: Array | None = None
    mask: NDArray[np.bool_] | None = None
    output_error: float | None = None
    damping: float | None = None


def prune_layers(
    model: ir.Model, jobs: Sequence[Job], pattern: Pattern, calibration: Calibration
) -> Iterator[tuple[Job, Outcome]]:
    """Prunes weights in the order in which the layers run.

    Whoever takes an outcome writes it into the model before it takes the next one: what later
    layers read comes from the model as it is then.

    Args:
        model: run as it is at that time.
        jobs: in the order of the layers.
        pattern: that the weights can have.
        calibration: data, method and limits.

    Yields:
        Each job with its outcome.

    Raises:
        InputError: the data is not usable (see `capture`).
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    names = [str(value.name) for value in model.graph.inputs]
    data = _repeatable(calibration.data, names)
    samples = Samples(data, calibration.samples, calibration.threads)
    statistic = gram if calibration.method == "sparsegpt" else squares
    done, report = 0, calibration.progress
    room = Room(calibration.memory_bytes, 2 if calibration.method == "sparsegpt" else 1)
    for group in room.groups(jobs):
        fitting = [job for job in group if not room.too_small_for(job)]
        readings = [reading for job in fitting for reading in job.readings]
        told = within(report, done, len(jobs))
        sums = capture(model, readings, statistic, samples, told) if readings else {}
        solver = _Solver(sums, pattern, calibration)
        for job in group:
            reason = room.too_small_for(job)
            yield job, Outcome(reason) if reason else solver.outcome(job)
            done += 1
            report(done, len(jobs), job.name)


def _repeatable(data: DataLike, names: Sequence[str]) -> Data:
    if isinstance(data, Iterator):
        raise InputError(
            "calibration data cannot be a generator",
            [f"it is gone through several times, got {type(data).__name__}"],
            "give a list of batches, a dict of arrays, a file, or module:function",
        )
    return as_data(data, names)


class _Solver:
    """Prunes the weights of a group of layers."""

    def __init__(
        self, sums: dict[Reading, Float64], pattern: Pattern, calibration: Calibration
    ) -> None:
        self._sums = sums
        self._pattern = pattern
        self._calibration = calibration
        self._factors: dict[tuple[Reading, ...], list[Factor]] = {}

    def outcome(self, job: Job) -> Outcome:
        """Prunes one weight."""
        known = [self._sums[reading] for reading in job.readings if reading in self._sums]
        if not known:
            return Outcome("no sample reaches it")
        total: Float64 = sum(known[1:], known[0])
        if not total.any():
            return Outcome("its input is 0 for all samples")
        if self._calibration.method == "wanda":
            return _by_wanda(job.weight.values, total, self._pattern)
        rows = len(job.weight.values) // len(total)
        if reason := ineligible((rows, *job.weight.values.shape[1:]), self._pattern):
            return Outcome(f"of a group of its output channels, {reason}")
        paired = self._pattern.pair and len(job.weight.values) >= PAIR_BLOCK
        if paired and len(total) > 1 and rows % PAIR_BLOCK:
            return Outcome(
                f"its groups of {rows} output channels split the blocks of {PAIR_BLOCK} "
                f"in which channels share masks"
            )
        return self._by_sparsegpt(job, total)

    def _by_sparsegpt(self, job: Job, grams: Float64) -> Outcome:
        if job.readings not in self._factors:
            self._factors = {job.readings: [factor(g, self._calibration.damping) for g in grams]}
        factors = self._factors[job.readings]
        w = job.weight.values.astype(np.float32, copy=False)
        parts = np.split(w, len(grams))
        solved = [
            sparsegpt(part, each, self._pattern) for part, each in zip(parts, factors, strict=True)
        ]
        values = np.concatenate([new for new, _ in solved])
        return Outcome(
            values=values,
            mask=np.concatenate([mask for _, mask in solved]),
            output_error=_output_error(w, values, grams),
            damping=max(each.damping for each in factors),
        )


def _by_wanda(w: Array, sums: Float64, pattern: Pattern) -> Outcome:
    """Keeps the weights whose products with their inputs are largest; values stay."""
    groups, channels, *kernel = len(sums), *w.shape[1:]
    by_tap = sums.reshape(groups, *kernel, channels)
    squares_of = np.repeat(np.moveaxis(by_tap, -1, 1), len(w) // groups, axis=0)
    mask = mask_of(criteria.wanda(w.astype(np.float64), squares_of), pattern)
    return Outcome(values=np.where(mask, w, np.zeros((), w.dtype)), mask=mask)


def _output_error(w: Array, new: Array, grams: Float64) -> float:
    """||(w - w') X|| / ||w X||, from the Gram matrix of each group."""

    def energy(values: Array) -> float:
        rows = np.moveaxis(values, 1, -1).reshape(len(grams), -1, grams.shape[-1])
        parts = zip(rows.astype(np.float64), grams, strict=True)
        return sum(float(np.vdot(part @ each, part)) for part, each in parts)

    whole = energy(w)
    return math.sqrt(max(energy(w - new), 0.0) / whole) if whole > 0 else 0.0


def _refused(name: str, expected: str, value: object) -> InputError:
    return InputError(
        f"bad calibration option {name}", [f"expected {expected}, got {value!r}"], "change it"
    )
