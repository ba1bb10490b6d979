"""How far one tensor lies from another, summed over a stream of batches.

    SQNR = 10 log10(sum(reference^2) / sum((got - reference)^2))    in dB; equal tensors: infinite

Only sums are kept, so memory does not grow with the data.
Source of the measure: Jain, "Digital coding of waveforms", 1984 (signal to quantization noise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.noise import decibels

Array = NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far a tensor lies from the reference's, over all samples.

    Attributes:
        name: of the tensor.
        shape: of one sample.
        max_abs: largest absolute difference of two elements.
        mean_abs: mean absolute difference.
        reference_max_abs: largest absolute value of the reference.
        cosine: of both as vectors; 1 means the same direction.
        sqnr_db: see the module; infinite where all are equal.
        equal: share of elements that are exactly equal, 0 to 1.
        worst_sample: index of the sample with the largest difference; None where all are equal.
        not_finite: elements that are NaN or infinite in one of both and not the same in the other;
            they count in no other figure but `equal`.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    reference_max_abs: float
    cosine: float
    sqnr_db: float
    equal: float
    worst_sample: int | None
    not_finite: int


class Sums:
    """Adds up what a `Difference` is computed from.

    Args:
        name: of the tensor, for messages.
    """

    def __init__(self, name: str) -> None:
        """Nothing is added yet."""
        self._name = name
        self._shape: tuple[int, ...] = ()
        self._elements = self._finite = self._equal = self._not_finite = 0
        self._signal = self._noise = self._got = self._dot = self._abs = 0.0
        self._most = self._peak = 0.0
        self._worst: int | None = None

    def add(self, reference: Array, got: Array, start: int) -> None:
        """Adds a batch.

        Args:
            reference: [n, ...], numbers or booleans.
            got: the same shape.
            start: index of the first sample.

        Raises:
            InputError: the shapes differ.
        """
        if reference.shape != got.shape:
            raise InputError(
                f"{self._name!r} has another shape in the engine than in the model",
                [f"expected {list(reference.shape)}", f"got {list(got.shape)}"],
                "give the model that the engine was built from",
            )
        self._shape = reference.shape[1:]
        a, b = reference.astype(np.float64), got.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        usable = np.isfinite(a) & np.isfinite(b)
        self._elements += a.size
        self._finite += int(usable.sum())
        self._equal += int(same.sum())
        self._not_finite += int((~usable & ~same).sum())
        if not usable.all():
            a, b = np.where(usable, a, 0.0), np.where(usable, b, 0.0)
        self._add_finite(a, b, start)

    def _add_finite(self, a: Array, b: Array, start: int) -> None:
        error = np.abs(b - a)
        self._signal += float(np.vdot(a, a))
        self._got += float(np.vdot(b, b))
        self._dot += float(np.vdot(a, b))
        self._noise += float(np.vdot(error, error))
        self._abs += float(error.sum())
        self._peak = max(self._peak, float(np.abs(a).max(initial=0.0)))
        for_each = error.reshape(len(error), -1).max(axis=1, initial=0.0)
        if for_each.max(initial=0.0) > self._most:
            self._most = float(for_each.max())
            self._worst = start + int(for_each.argmax())

    def result(self) -> Difference:
        """The figures of all that was added."""
        return Difference(
            self._name,
            self._shape,
            self._most,
            self._abs / max(self._finite, 1),
            self._peak,
            self._cosine(),
            decibels(self._signal, self._noise),
            self._equal / max(self._elements, 1),
            self._worst,
            self._not_finite,
        )

    def _cosine(self) -> float:
        if self._noise == 0:
            return 1.0
        norms = math.sqrt(self._signal) * math.sqrt(self._got)
        return self._dot / norms if norms else 0.0
