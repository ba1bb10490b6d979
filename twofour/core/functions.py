"""The definition of exp, the activations and their relatives, as sequences of float32 operations.

Each function here is one multiplication, addition, comparison or bit operation after the other,
every one rounded to float32 (a fused multiply-add where it says `fma`), in the order written.
Kernels emit the same sequence (kernels/cpu/functions.py) and give the same bits on any CPU.

Max errors against float64, as tests/core/test_functions.py measures them:

    exp         2.0e-7 relative, -87.3 <= x <= 88.3; 0 below, inf above
    log         1.5e-7 relative; -inf at 0, NaN below
    softplus    3.0e-7 * max(1, x)    softsign         1.2e-7
    sigmoid     1.1e-7                silu             1.5e-7 * max(1, |x|)
    tanh        2.0e-7                erf              7.2e-7
    gelu        8.2e-7 * max(1, x)    gelu_short       1.1e-4 * max(1, x)
    gelu_tanh   1.3e-6 * max(1, x)    gelu_tanh_short  1.1e-4 * max(1, x)

The short forms take 10 operations instead of 19, three of them table look-ups in a register. They
are for results that are rounded further at once, to bfloat16 or to bytes, where their error is far
below a step. Most that become bytes go another way, which is shorter still: core/gates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.approximations import (
    ERFC,
    EXP,
    EXP2,
    EXP_HIGH,
    EXP_LOW,
    GELU,
    GELU_SHORT,
    GELU_TANH,
    GELU_TANH_SHORT,
    LEAST_NORMAL,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    LOG2_E,
    QUARTERS,
    ROUND127,
    SIGMOID_LIMIT,
    SIXTH,
    SQRT_HALF_BITS,
    SUBNORMAL_FACTOR,
    TANH_LIMIT,
    Table,
    Tail,
)
from twofour.core.fma import fma

Array = NDArray[Any]
_F = np.float32


@np.errstate(all="ignore")
def exp(x: Array) -> Array:
    """e**x = 2**n * e**r, r = x - n ln(2), n the nearest integer to x / ln(2).

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; 0 below EXP_LOW (where the result would not be normal), infinity
        above EXP_HIGH; NaN stays NaN.
    """
    x = np.asarray(x, np.float32)
    shifted = x * _F(LOG2_E) + _F(ROUND127)
    n = shifted - _F(ROUND127)
    r = x - n * _F(LN2_HIGH)
    r = r - n * _F(LN2_LOW)
    y = _polynomial(r, EXP) * _power_of_two(shifted)
    y = np.where(x < _F(EXP_LOW), _F(0), y)
    return np.where(x > _F(EXP_HIGH), _F(np.inf), y)


@np.errstate(all="ignore")
def log(x: Array) -> Array:
    """The natural logarithm: x = 2**n (1 + f), ln(x) = n ln(2) + f - f**2 / 2 + f**3 q(f).

    Numbers below LEAST_NORMAL are multiplied by 2**23 first.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; minus infinity at 0, NaN below it; NaN stays NaN.
    """
    x = np.asarray(x, np.float32)
    small = x < _F(LEAST_NORMAL)
    bits = np.where(small, x * _F(SUBNORMAL_FACTOR), x).view(np.int32)
    n = (bits - np.int32(SQRT_HALF_BITS)) >> 23
    f = (bits - (n << 23)).view(np.float32) - _F(1)
    power = n.astype(np.float32) - np.where(small, _F(23), _F(0))
    square = f * f
    y = (_polynomial(f, LOG) * f) * square
    y = (y + power * _F(LN2_LOW)) - _F(0.5) * square
    y = (f + y) + power * _F(LN2_HIGH)
    y = np.where(x > _F(0), y, _F(np.nan))
    y = np.where(x == _F(0), _F(-np.inf), y)
    return np.where(x == _F(np.inf), x, y)


@np.errstate(all="ignore")
def softplus(x: Array) -> Array:
    """Softplus, ln(1 + e**x) = max(x, 0) + ln(1 + e**-|x|).

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    x = np.asarray(x, np.float32)
    return np.where(x < _F(0), _F(0), x) + log(_F(1) + exp(_F(-0.0) - np.abs(x)))


@np.errstate(all="ignore")
def softsign(x: Array) -> Array:
    """Softsign, x / (1 + |x|).

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN where x is infinite or NaN.
    """
    x = np.asarray(x, np.float32)
    return x / (_F(1) + np.abs(x))


@np.errstate(all="ignore")
def sigmoid(x: Array) -> Array:
    """1 / (1 + e**-x), x limited to +-SIGMOID_LIMIT.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    limited = clip(x, -SIGMOID_LIMIT, SIGMOID_LIMIT)
    return _F(1) / (_F(1) + _exp2(limited * _F(-LOG2_E)))


@np.errstate(all="ignore")
def tanh(x: Array) -> Array:
    """1 - 2 / (1 + e**2x), x limited to +-TANH_LIMIT.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    limited = clip(x, -TANH_LIMIT, TANH_LIMIT)
    return _F(1) - _F(2) / (_F(1) + _exp2(limited * _F(2 * LOG2_E)))


@np.errstate(all="ignore")
def erf(x: Array) -> Array:
    """The error function: 1 - T(|x|) with the sign of x, T = ERFC.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    x = np.asarray(x, np.float32)
    size = _F(1) - _tail(_limited(x, ERFC), ERFC)
    return (size.view(np.uint32) | (x.view(np.uint32) & np.uint32(1 << 31))).view(np.float32)


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, x * Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)).

    Phi is the distribution function of the standard normal distribution.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _gelu(x, GELU)


def gelu_short(x: Array) -> Array:
    """`gelu` for results that are rounded further at once."""
    return _gelu_short(x, GELU_SHORT)


@np.errstate(all="ignore")
def _gelu_short(x: Array, table: Table) -> Array:
    """max(0, x) - T(|x|)."""
    x = np.asarray(x, np.float32)
    a = _least(_F(table.limit), np.abs(x))
    place = (a + _F(QUARTERS)).view(np.int32) & 15
    c0, c1, c2 = (np.array(row, np.float32)[place] for row in table.coefficients)
    return np.asarray(_most(_F(0), x) - fma(fma(c2, a, c1), a, c0))


def gelu_tanh(x: Array) -> Array:
    """Gelu by tanh: x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))), computed like `gelu`.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    return _gelu(x, GELU_TANH)


def gelu_tanh_short(x: Array) -> Array:
    """`gelu_tanh` for results that are rounded further at once."""
    return _gelu_short(x, GELU_TANH_SHORT)


@np.errstate(all="ignore")
def silu(x: Array) -> Array:
    """The product x * sigmoid(x), its factor x limited to -SIGMOID_LIMIT from below.

    Args:
        x: float32, any shape.

    Returns:
        float32, the shape of `x`; NaN stays NaN.
    """
    return _most(_F(-SIGMOID_LIMIT), np.asarray(x, np.float32)) * sigmoid(x)


@np.errstate(all="ignore")
def hard_sigmoid(x: Array) -> Array:
    """min(max(x / 6 + 1/2, 0), 1), float32, the shape of `x`; NaN stays NaN."""
    return clip(np.asarray(x, np.float32) * _F(SIXTH) + _F(0.5), 0.0, 1.0)


@np.errstate(all="ignore")
def hard_swish(x: Array) -> Array:
    """The product x * hard_sigmoid(x), float32, the shape of `x`; NaN for NaN and -infinity."""
    x = np.asarray(x, np.float32)
    return np.asarray(x * hard_sigmoid(x))


def relu(x: Array) -> Array:
    """max(x, 0), float32, the shape of `x`; NaN stays NaN."""
    return _most(_F(0), np.asarray(x, np.float32))


def clip(x: Array, low: float, high: float) -> Array:
    """min(max(x, low), high), float32, the shape of `x`; NaN stays NaN."""
    return _least(_F(high), _most(_F(low), np.asarray(x, np.float32)))


PLAIN: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "Relu": relu,
    "HardSwish": hard_swish,
    "HardSigmoid": hard_sigmoid,
    "Sigmoid": sigmoid,
    "Silu": silu,
    "Gelu": gelu,
    "GeluTanh": gelu_tanh,
    "Tanh": tanh,
}
"""Activations without parameters, by name."""
SHORT: dict[str, Callable[[Array], Array]] = PLAIN | {
    "Gelu": gelu_short,
    "GeluTanh": gelu_tanh_short,
}
"""The same where the result is rounded further at once."""
CLAMPS = ("", "Relu", "Clip")
"""Those that only bound their input: f(x) / s = f'(x / s) with bounds divided by s."""


@dataclass(frozen=True)
class Activation:
    """What is applied to each result.

    Attributes:
        name: "" for none, "Clip", or a key of PLAIN.
        low: smallest result of Clip.
        high: largest result of Clip.
    """

    name: str = ""
    low: float = -np.inf
    high: float = np.inf

    def __post_init__(self) -> None:
        """Refuses unknown names and bounds that make no sense."""
        if self.name != "Clip" and self.name not in PLAIN:
            raise ValueError(f"no activation {self.name!r}; expected one of {[*PLAIN, 'Clip']}")
        if self.name != "Clip" and (self.low, self.high) != (-np.inf, np.inf):
            raise ValueError(f"{self.name or 'no activation'} has no bounds")
        if not self.low <= self.high:
            raise ValueError(f"Clip to [{self.low}, {self.high}]: expected low <= high")

    @property
    def clamps(self) -> bool:
        """Whether it only bounds its input, and so is part of the saturation of a quantized y."""
        return self.name in CLAMPS

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest result of one that clamps."""
        return (0.0, np.inf) if self.name == "Relu" else (self.low, self.high)

    def divided(self, step: float) -> Activation:
        """The one that clamps x / step where this one clamps x; for Clip, others have no unit."""
        return replace(self, low=self.low / step, high=self.high / step)

    def apply(self, x: Array, *, short: bool = False) -> Array:
        """The activation of each element.

        Args:
            x: float32, any shape.
            short: use the short form where there is one: the result is rounded further.

        Returns:
            float32, the shape of `x`.
        """
        if self.name == "Clip":
            return clip(x, self.low, self.high)
        return (SHORT if short else PLAIN)[self.name](np.asarray(x, np.float32))


NO_ACTIVATION = Activation()


def _least(a: Array | np.float32, b: Array | np.float32) -> Array:
    """Minimum: a where a < b, else b: b where one is NaN."""
    return np.where(a < b, a, b)


def _most(a: Array | np.float32, b: Array | np.float32) -> Array:
    """Maximum: a where a > b, else b: b where one is NaN."""
    return np.where(a > b, a, b)


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule; the constant coefficient comes first."""
    value: Array = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + _F(coefficient)
    return value


def _power_of_two(shifted: Array) -> Array:
    """2**n from n + ROUND127."""
    return (np.asarray(shifted).view(np.uint32) << np.uint32(23)).view(np.float32)


def _exp2(x: Array) -> Array:
    """2**x for |x| <= 126."""
    shifted = x + _F(ROUND127)
    return _polynomial(x - (shifted - _F(ROUND127)), EXP2) * _power_of_two(shifted)


def _limited(x: Array, tail: Tail) -> Array:
    """min(|x|, limit)."""
    return _least(_F(tail.limit), np.abs(x))


def _tail(a: Array, tail: Tail) -> Array:
    """T(a) for a <= limit, see `Tail`."""
    value = _polynomial(a, tail.coefficients)
    for _ in range(tail.squarings):
        value = value * value
    return value


@np.errstate(all="ignore")
def _gelu(x: Array, tail: Tail) -> Array:
    """max(x, 0) - a T(a), a = min(|x|, limit)."""
    x = np.asarray(x, np.float32)
    a = _limited(x, tail)
    return np.asarray(relu(x) - a * _tail(a, tail))
