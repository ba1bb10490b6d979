"""How the range of a tensor is chosen from what calibration saw, and the scale from the range."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.histogram import HALF, Histogram

Method = Literal["mse", "entropy", "percentile", "minmax", "average"]
Activation = Literal["int8", "uint8"]


@dataclass(frozen=True)
class RangeOptions:
    """How a range is chosen.

    Attributes:
        method: `minmax` takes all that was seen; `average` the moving average of the batches' ends;
            `percentile` leaves out the largest magnitudes; `mse` has the least square error;
            `entropy` the least Kullback-Leibler divergence.
        activation: `int8` is symmetric (zero point 0); `uint8` is asymmetric.
        percentile: for the method of this name, the share of values inside the range, in percent.
    """

    method: Method = "mse"
    activation: Activation = "int8"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Refuses values that mean nothing. Raises InputError."""
        require_choice("method", self.method, Method)
        require_choice("activation", self.activation, Activation)
        if not 50 < self.percentile <= 100:
            raise refused("percentile", "above 50, up to 100", self.percentile)


def require_choice(name: str, value: object, choice: Any) -> None:
    """Raises InputError if an option is none of a Literal's values."""
    if value not in get_args(choice):
        raise refused(name, " or ".join(get_args(choice)), value)


def refused(name: str, expected: str, value: object) -> InputError:
    """What tells that an option has a value that means nothing."""
    return InputError(
        f"bad quantization option {name}", [f"expected {expected}, got {value!r}"], "change it"
    )


@dataclass(frozen=True)
class Range:
    """The values, `low <= 0 <= high` or not, that should come through quantization unclipped."""

    low: float
    high: float


@dataclass(frozen=True)
class Affine:
    """x = (q - zero_point) * scale.

    Attributes:
        scale: > 0, a float32 number.
        zero_point: a value of `dtype`.
        dtype: int8 or uint8.
    """

    scale: float
    zero_point: int
    dtype: np.dtype[Any]


def affine(span: Range, activation: Activation) -> Affine:
    """The quantization whose ends are the range's, zero being exact.

    Args:
        span: the range; widened to hold zero.
        activation: `int8` gives scale = max(|low|, |high|) / 127 and zero point 0; `uint8` gives
            scale = (high - low) / 255 and the zero point that puts `low` at 0.
    """
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    if activation == "int8":
        return Affine(_scale(max(-low, high) / 127), 0, np.dtype(np.int8))
    scale = _scale((high - low) / 255)
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, 255)), np.dtype(np.uint8))


def _scale(scale: float) -> float:
    """As float32 that can be divided by: 1 for a tensor of zeros, and never too small."""
    return float(np.float32(max(scale, 2.0**-120))) if scale > 0 else 1.0


def choose_range(histogram: Histogram, options: RangeOptions) -> Range:
    """The range that the options' method takes from what was seen, and never more than that.

    A symmetric scheme (`int8`) chooses the largest magnitude T to keep; the range is what was seen,
    cut at -T and T. An asymmetric one (`uint8`) chooses both ends: `percentile` takes the shortest
    range around zero that holds its share; `mse` and `entropy` begin with the best T and then move
    one end at a time as long as that gains.

    Sources: `average`: Jacob et al. 2018, arXiv:1712.05877, section 3.1, with the constant of
    torch's MovingAverageMinMaxObserver (`histogram.AVERAGING`). `entropy`: S. Migacz, 8-bit
    Inference with TensorRT, GTC 2017. `mse`, `percentile`: Wu et al. 2020, arXiv:2004.09602,
    section 5.
    """
    if histogram.peak == 0:
        return Range(0.0, 0.0)
    found = _METHODS[options.method](histogram, options)
    return Range(max(histogram.low, found.low), min(histogram.high, found.high))


def _minmax(histogram: Histogram, options: RangeOptions) -> Range:
    return Range(histogram.low, histogram.high)


def _average(histogram: Histogram, options: RangeOptions) -> Range:
    return Range(*(histogram.averaged or (0.0, 0.0)))


def _percentile(histogram: Histogram, options: RangeOptions) -> Range:
    total = histogram.zeros + int(histogram.counts.sum())
    above, below = histogram.counts[HALF:], histogram.counts[HALF - 1 :: -1]
    left_out = total * (1 - options.percentile / 100)
    width = histogram.limit / HALF
    if options.activation == "int8":
        threshold = width * int(_bins_kept(above + below, np.array([left_out]))[0])
        return Range(-threshold, threshold)
    kept_below = np.arange(HALF + 1)
    lost_below = int(below.sum()) - np.concatenate([[0], np.cumsum(below)])
    kept_below, lost_below = kept_below[lost_below <= left_out], lost_below[lost_below <= left_out]
    kept_above = _bins_kept(above, left_out - lost_below)
    best = int(np.argmin(kept_below + kept_above))
    return Range(-width * int(kept_below[best]), width * int(kept_above[best]))


def _bins_kept(counts: NDArray[np.int64], left_out: NDArray[Any]) -> NDArray[np.intp]:
    """The fewest bins from zero up behind which at most so many values lie."""
    beyond = int(counts.sum()) - np.concatenate([[0], np.cumsum(counts)])
    return np.searchsorted(-beyond, -left_out)


def _mse(histogram: Histogram, options: RangeOptions) -> Range:
    """Tries ends from the peak down to 1/32 of it, where a bin is still below a step."""
    tried = [histogram.peak * 2 ** (-step / 16) for step in range(5 * 16 + 1)]
    return _best(histogram, options, tried, _SquareError(histogram, options.activation))


def _entropy(histogram: Histogram, options: RangeOptions) -> Range:
    """Cuts where the histogram, told apart in the steps of a byte only, says most about itself."""
    cost = _Divergence(histogram, options.activation)
    return _best(histogram, options, cost.ends, cost)


Cost = Callable[[float, float], float]


def _best(histogram: Histogram, options: RangeOptions, ends: list[float], cost: Cost) -> Range:
    """The range of least cost(low, high); of equal ones the first tried, and `ends` fall."""
    cost = functools.cache(cost)  # each round tries what the last one did if nothing changed
    low, high = histogram.low, histogram.high
    ends = ends or [histogram.peak]
    threshold = min(ends, key=lambda end: cost(max(low, -end), min(high, end)))
    span = Range(max(low, -threshold), min(high, threshold))
    least = cost(span.low, span.high)
    while options.activation == "uint8" and low < 0 < high:
        before = least
        for upper in (True, False):
            spans = [Range(span.low, end) if upper else Range(-end, span.high) for end in ends]
            spans = [each for each in spans if low <= each.low and each.high <= high]
            spans += [Range(span.low, high) if upper else Range(low, span.high)]
            found = min(spans, key=lambda each: cost(each.low, each.high))
            if cost(found.low, found.high) < least:
                span, least = found, cost(found.low, found.high)
        if least >= before:
            break
    return span


class _SquareError:
    """(low, high) -> the sum of squared errors of what was seen, quantized with this range.

    A step takes all bins that round to it. With prefix sums S0, S1, S2 of counts, counts * x and
    counts * x**2 its error is S2 - 2 q S1 + q**2 S0, so that a range costs 256 steps and not as
    many as there are bins.
    """

    def __init__(self, histogram: Histogram, activation: Activation) -> None:
        self._activation = activation
        self._width = histogram.limit / HALF
        x = (np.arange(2 * HALF) + 0.5 - HALF) * self._width
        powers = [histogram.counts.astype(np.float64) * x**power for power in range(3)]
        self._sums = [np.concatenate([[0.0], np.cumsum(each)]) for each in powers]

    def __call__(self, low: float, high: float) -> float:
        scheme = affine(Range(low, high), self._activation)
        info, point = np.iinfo(scheme.dtype), scheme.zero_point
        steps = np.arange(info.min - point, info.max - point + 1) * scheme.scale
        borders = (steps[:-1] + steps[1:]) / 2
        # The first bin whose centre lies at the border or behind it.
        first = np.ceil(borders / self._width + HALF - 0.5).clip(0, 2 * HALF).astype(np.intp)
        first = np.concatenate([[0], first, [2 * HALF]])
        s0, s1, s2 = (each[first[1:]] - each[first[:-1]] for each in self._sums)
        return float(np.sum(s2 - 2 * steps * s1 + steps**2 * s0))


class _Divergence:
    """(low, high) -> KL(P || Q): what quantization to this range hides of the distribution.

    P are the counts inside the range, those outside added to its last bins; Q the same bins when
    only the steps of a byte are told apart: each step's sum, spread over its bins that are not
    empty. Conventions, those of TensorRT's entropy calibration as NVIDIA's pytorch-quantization
    has it: magnitudes, 128 steps of a signed byte and 256 of an unsigned one, the step next to zero
    counted as its neighbour is; and exact zeros, which any scheme keeps, as nothing.
    Ours: bins of limit / 4096, which are 2048 to 4096 up to the peak where theirs are 2048; every
    16th end is tried where theirs is every one; and for `uint8` with values of both signs, which
    TensorRT does not have, bins of either sign and 256 steps from end to end.

    Attributes:
        ends: magnitudes to try, falling.
    """

    _BINS, _STRIDE = 4096, 16

    def __init__(self, histogram: Histogram, activation: Activation) -> None:
        coarse = HALF // self._BINS
        self._width = histogram.limit / self._BINS
        self._signed = activation == "uint8" and histogram.low < 0 < histogram.high
        self._levels = 128 if activation == "int8" else 256
        fine = histogram.counts if self._signed else histogram.magnitudes()
        counts = fine.reshape(-1, coarse).sum(axis=1).astype(np.float64)
        zero = self._BINS if self._signed else 0
        counts[zero] = counts[zero + 1]
        if self._signed:
            counts[zero - 1] = counts[zero - 2]
        self._counts, self._zero = counts, zero
        last = -(-histogram.peak // self._width)
        least = self._levels // 2 if self._signed else self._levels
        stops = np.arange(last, least - 1, -self._STRIDE)
        self.ends = [float(stop) * self._width for stop in stops]

    def __call__(self, low: float, high: float) -> float:
        above, below = (int(np.ceil(abs(end) / self._width)) for end in (high, low))
        if self._signed:
            return self._of(self._zero - below, self._zero + above)
        return self._of(0, max(above, below))

    def _of(self, start: int, stop: int) -> float:
        kept = self._counts[start:stop]
        step_of = np.arange(len(kept)) * self._levels // len(kept)
        filled = kept > 0
        totals = np.bincount(step_of, weights=kept, minlength=self._levels)
        places = np.bincount(step_of, weights=filled, minlength=self._levels)
        spread = np.where(filled, (totals / np.maximum(places, 1))[step_of], 0.0)
        p = kept.copy()
        p[-1] += self._counts[stop:].sum()
        p[0] += self._counts[:start].sum()
        if not spread.sum():
            return math.inf
        p, q = p / p.sum(), spread / spread.sum()
        some = p > 0
        return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))


_METHODS: dict[str, Callable[[Histogram, RangeOptions], Range]] = {
    "minmax": _minmax,
    "average": _average,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
