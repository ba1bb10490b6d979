"""A version that computes what another one answers, to be compared with it: its answers go nowhere.

traffic: {split: {3: 100}, shadow: 4, shadow_percent: 10}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.errors import ServeError
from twofour.serve.models.queue import Outputs
from twofour.serve.models.version import Ticket, Version

Array = NDArray[Any]


@dataclass(slots=True)
class Comparison:
    """How the answers of a shadow differ from those that clients got.

    Attributes:
        compared: requests.
        failed: that the shadow refused or could not compute, while the other answered.
        same_top: rows whose largest value is at the same place, of outputs of two dimensions.
        tops: such rows.
        cosine_sum: of the cosines of all outputs, of which there are `cosines`.
        cosines: outputs that were compared.
        lowest_cosine: of an output.
    """

    compared: int = 0
    failed: int = 0
    same_top: int = 0
    tops: int = 0
    cosine_sum: float = 0.0
    cosines: int = 0
    lowest_cosine: float = 1.0

    def add(self, given: Outputs, shadow: Outputs) -> None:
        """Compares two answers to one request."""
        self.compared += 1
        for name in given.keys() & shadow.keys():
            a, b = given[name], shadow[name]
            if a.shape != b.shape or a.dtype.kind not in "fiu" or not a.size:
                continue
            found = _cosine(a, b)
            self.cosines += 1
            self.cosine_sum += found
            self.lowest_cosine = min(self.lowest_cosine, found)
            if a.ndim == 2:
                self.tops += len(a)
                self.same_top += int(np.count_nonzero(a.argmax(1) == b.argmax(1)))


class Shadowing:
    """One request on its way through both versions.

    The shadow gets it behind all others, and where its queue is full it gets none.
    """

    def __init__(
        self, version: Version, inputs: Mapping[str, Array], arrived_ns: int, into: Comparison
    ) -> None:
        """Hands the shadow its copy: the arrays of the request, which nobody writes to."""
        self._into = into
        self._given: Outputs | None = None
        self._shadow: Outputs | Exception | None = None
        try:
            ticket = Ticket(arrived_ns, level=version.config.queue.levels)
            version.submit(inputs, ticket, self._computed)
        except ServeError as e:
            self._shadow = e

    def answered(self, outputs: Outputs) -> None:
        """What the client got; nothing is compared where it got an error."""
        self._given = outputs
        self._compare()

    def _computed(self, result: Outputs | Exception) -> None:
        self._shadow = result
        self._compare()

    def _compare(self) -> None:
        if self._given is None or self._shadow is None:
            return
        if isinstance(self._shadow, Exception):
            self._into.failed += 1
        else:
            self._into.add(self._given, self._shadow)


def _cosine(a: Array, b: Array) -> float:
    x, y = (np.asarray(each, np.float64).ravel() for each in (a, b))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float(np.array_equal(x, y, equal_nan=True))
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else float(not x.any() and not y.any())
