"""What a metric is: what it keeps of each sample, the figure, and how sure that is.

`metrics.py` has those that there are.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.data import Batch
from twofour.core.errors import InputError

Array = NDArray[Any]
Rows = Mapping[str, Array]
_DRAWS, _MANY = 200, 2_000_000
_DRAW_S, _LEAST_DRAWS = 0.01, 20  # of a function of the user's own
Unseen = Callable[[Rows, Array], tuple[Rows, Rows, Array] | None]


def _nothing_unseen(rows: Rows, labels: Array) -> None:
    """Of metrics whose samples tell more than right and wrong."""


@dataclass(frozen=True)
class Metric:
    """One way to judge a network.

    Attributes:
        name: as the user gives it.
        rows: outputs of a batch, its output's name, and the batch -> what is kept: arrays [n, ...].
        score: what was kept of all samples, and the labels [S, ...] -> the figure.
        higher_is_better: whether more of it is better.
        unit: "%" or "".
        group: how many neighbouring samples belong together; groups are independent, so that
            drawing them anew tells what is chance. 0 where they are not.
        slow: what a score takes is not known: it is measured before samples are drawn anew.
        unseen: what was kept, and labels -> two samples that nobody drew, as rows of a network, of
            another, and labels [2, ...]: only the one network is right on the first, only the other
            on the second; None where rows tell more than right and wrong.
    """

    name: str
    rows: Callable[[Rows, str, Batch], dict[str, Array]]
    score: Callable[[Rows, Array], float]
    higher_is_better: bool = True
    unit: str = ""
    group: int = 1
    slow: bool = False
    unseen: Unseen = _nothing_unseen

    @property
    def resampled(self) -> bool:
        """Whether drawing samples anew tells what is chance."""
        return self.group > 0

    def groups(self, kept: Kept) -> int:
        """How many groups of samples there are.

        Raises:
            InputError: the last one is not whole.
        """
        count, left = divmod(len(kept.labels), self.group)
        if left:
            raise InputError(
                f"metric {self.name} has groups of {self.group} samples",
                [f"expected a multiple of {self.group} samples, got {len(kept.labels)}"],
                f"judge on {count * self.group} samples, or mend the function's attribute 'group'",
            )
        return count

    def drawn(self, kept: Kept, draw: np.random.Generator) -> Array:
        """As many samples as there are, groups drawn with replacement: int64 indices."""
        count = self.groups(kept)
        first = draw.integers(0, count, count) * self.group
        return (first[:, None] + np.arange(self.group)).reshape(-1)

    def gain(self, before: float, after: float) -> float:
        """By how much `after` is better; negative where it is worse."""
        return after - before if self.higher_is_better else before - after

    def error(self, before: Kept, after: Kept) -> float | None:
        """Standard error of the gain: how far chance, in choosing the samples, may have moved it.

        The samples are drawn anew, the same for both (a paired bootstrap).
        Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993.
        """
        if not self.resampled:
            return None
        return float(np.std(self.drawn_gains(before, after, self.draws(before, _DRAWS))))

    def draws(self, kept: Kept, wanted: int) -> int:
        """How often samples are drawn anew: as wanted, less often where that would take long.

        Raises:
            InputError: the last group is not whole.
        """
        self.groups(kept)
        if self.slow:
            began = time.perf_counter()
            self.score(kept.rows, kept.labels)
            each = max(time.perf_counter() - began, 1e-9)
            return max(_LEAST_DRAWS, min(wanted, int(wanted * _DRAW_S / each)))
        large = sum(array.size for array in kept.rows.values()) > _MANY
        return wanted // 10 if large else wanted

    def drawn_gains(self, before: Kept, after: Kept, draws: int) -> Array:
        """What the gain would be on other samples: drawn anew with replacement, alike for both.

        Args:
            before: of one network.
            after: of another, on the same samples.
            draws: how often; the same ones each time.

        Returns:
            float64 [draws].
        """
        draw = np.random.default_rng(0)
        gains = []
        for _ in range(draws):
            index = self.drawn(before, draw)
            figures = [
                self.score({k: v[index] for k, v in each.rows.items()}, each.labels[index])
                for each in (before, after)
            ]
            gains.append(self.gain(*figures))
        return np.array(gains, np.float64)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a metric needs of one network, of all samples.

    Attributes:
        rows: arrays [S, ...].
        labels: [S, ...].
        figure: the metric.
        outputs_sha256: of all outputs; "" where they are no floats, since networks that choose the
            same classes need not be the same.
    """

    rows: Rows
    labels: Array
    figure: float
    outputs_sha256: str = ""


class Scorer:
    """Collects what a metric needs of one network over a stream of batches.

    Args:
        metric: the metric.
        output: name of the output that it reads; the user's own functions get all.
    """

    def __init__(self, metric: Metric, output: str) -> None:
        """Nothing is collected yet."""
        self._metric, self._output = metric, output
        self._rows: list[dict[str, Array]] = []
        self._digest = _Digest()

    def add(self, outputs: Rows, batch: Batch) -> None:
        """Keeps what the metric needs of a batch.

        Raises:
            InputError: there are no labels, or outputs and labels do not match.
        """
        if batch.labels is None:
            raise InputError(
                f"metric {self._metric.name} needs labels",
                ["expected an array 'labels' in the data, got none"],
                "add one label a sample: numpy.savez('data.npz', x=..., labels=...)",
            )
        rows = self._metric.rows(outputs, self._output, batch)
        self._rows.append(rows | {_LABELS: batch.labels})
        self._digest.add(outputs)

    def result(self) -> Kept:
        """Of all that was added."""
        rows = {k: np.concatenate([part[k] for part in self._rows]) for k in self._rows[0]}
        labels = rows.pop(_LABELS)
        figure = float(self._metric.score(rows, labels))
        return Kept(rows, labels, figure, self._digest.result())


_LABELS = " labels"  # no output has a blank in front


class _Digest:
    """Of all outputs, whatever the batches are."""

    def __init__(self) -> None:
        self._each: dict[tuple[str, str], Any] = {}
        self._floats = True

    def add(self, outputs: Rows) -> None:
        """Goes on with a batch."""
        for name, array in outputs.items():
            self._floats &= array.dtype.kind == "f"
            hasher = self._each.setdefault((name, array.dtype.name), hashlib.sha256())
            hasher.update(np.ascontiguousarray(array).data)

    def result(self) -> str:
        """Of all that was added."""
        found = sorted((*key, hasher.hexdigest()) for key, hasher in self._each.items())
        return hashlib.sha256(repr(found).encode()).hexdigest() if self._floats else ""
