"""How near the outputs of a quantized model are to those of the float model, on a few samples.

A cosine of 0.99 is a noise of 0.14 times the signal, 17 dB. That tells calibrations that failed
from those that did not, with few samples and without labels: plain INT8 has 0.9995 on the residual
networks of CIFAR-10, which lose nothing by it, and 0.985 on MiniLM, which does. What a task loses,
only its metric says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.core.data import DataLike, as_data
from twofour.core.feeds import runs
from twofour.onnx_tools.edit import Array
from twofour.onnx_tools.reference import Reference

LEAST_COSINE = 0.99
"""Below it a calibrated model is warned about."""
SAMPLES = 16


@dataclass(frozen=True)
class OutputAgreement:
    """One output of both models.

    Attributes:
        name: of the output.
        cosine: of the values of a sample with those of the float model, the mean of the samples;
            0 where values are not finite.
        worst_cosine: the least of the samples.
        sqnr_db: energy of the float model's values over that of the differences; infinite where
            all are equal.
    """

    name: str
    cosine: float
    worst_cosine: float
    sqnr_db: float


@dataclass(frozen=True)
class Agreement:
    """All outputs of floats.

    Attributes:
        outputs: in the order of the model.
        samples: how many were run.
    """

    outputs: tuple[OutputAgreement, ...]
    samples: int

    def below(self, least: float) -> tuple[OutputAgreement, ...]:
        """The outputs whose cosine is less, the worst first."""
        low = [each for each in self.outputs if each.cosine < least]
        return tuple(sorted(low, key=lambda each: each.cosine))


def agreement(floats: ir.Model, quantized: ir.Model, data: DataLike, threads: int = 0) -> Agreement:
    """Runs both models on the first samples, as they are written.

    Args:
        floats: the float model.
        quantized: with the same inputs and outputs.
        data: as for calibration.
        threads: of ONNX Runtime; 0 for as many as there are cores.

    Raises:
        InputError: the data does not fit.
        UnsupportedError: ONNX Runtime cannot run a model.
    """
    models = [Reference(each, threads=threads, optimized=True) for each in (floats, quantized)]
    forms = models[0].inputs
    source = as_data(data, [form.name for form in forms])
    sums: dict[str, _Sums] = {}
    count = 0
    for run in runs(source, forms, 1, SAMPLES):
        want, got = (model.run(run.feeds) for model in models)
        count += len(run.batch)
        for name, array in want.items():
            if array.dtype.kind == "f":
                sums.setdefault(name, _Sums()).add(array, got[name])
    return Agreement(tuple(each.result(name) for name, each in sums.items()), count)


class _Sums:
    """What is added up for one output."""

    def __init__(self) -> None:
        self._cosines: list[float] = []
        self._signal = self._noise = 0.0

    def add(self, want: Array, got: Array) -> None:
        a, b = (each.astype(np.float64).ravel() for each in (want, got))
        if a.size == 0 and b.size == 0:
            return
        if a.shape != b.shape or not np.isfinite(b).all():
            self._cosines.append(0.0)
            self._noise = math.inf
            return
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        equal = float(np.array_equal(a, b))
        self._cosines.append(float(a @ b) / norms if norms > 0 else equal)
        self._signal += float(a @ a)
        self._noise += float(np.square(a - b).sum())

    def result(self, name: str) -> OutputAgreement:
        cosines = self._cosines or [1.0]
        sqnr = _decibels(self._signal, self._noise)
        return OutputAgreement(name, float(np.mean(cosines)), min(cosines), sqnr)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
