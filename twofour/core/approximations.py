"""The numbers that core/functions.py computes exp, the activations and their relatives with.

The polynomials are minimax fits by linear programming on 2000 to 3000 Chebyshev points:

- `EXP`: e**r = 1 + r + r**2 q(r), relative error, |r| <= ln(2) / 2;
- `EXP2`: 2**f = 1 + f q(f), relative error, |f| <= 1/2; `EXP2_SHORT`: 1.1e-4, for results that
  are rounded to 8 bits;
- `LOG`: ln(1 + f) = f - f**2 / 2 + f**3 q(f), sqrt(1/2) <= 1 + f <= sqrt(2), relative error;
- a `Tail` T(a) = p(a)**(2**squarings) falls like exp(-a**2) with a short p, because the root of
  such a function is nearly flat. The error that is fitted is that of a T(a) in gelu, of T(a) in
  erf; p**n is linearised around the last p, six times;
- a `Table` is a T(a) as 16 parabolas, each the best one on its own piece; the last one ends half
  way down to 0.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUND127 = 12582912.0 + 127.0
"""1.5 * 2**23 + 127: added to |v| < 2**21 it rounds half to even to an integer n, and the low bits
of the sum are n + 127: shifted left by 23 they are the float 2**n."""
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln(2) in two parts: n * LN2_HIGH is exact."""
EXP = (1.0, 1.0, 0.499992281, 0.166671172, 0.041890651, 0.00831246655)
EXP2 = (1.0, 0.693147004, 0.240222424, 0.0555073358, 0.00967151299, 0.00132647273)
EXP2_SHORT = (1.0, 0.693282939, 0.242210967, 0.0550088904)
EXP_LOW, EXP_HIGH = -87.33654, 88.37
LOG = (
    0.333341926,
    -0.250019878,
    0.199536398,
    -0.165568456,
    0.149951771,
    -0.144278944,
    0.0864181519,
)
SQRT_HALF_BITS = 0x3F3504F3
"""sqrt(1/2) as a float32: what a number's bits are counted from, so that 1 + f is around 1."""
LEAST_NORMAL, SUBNORMAL_FACTOR = 2.0**-126, 2.0**23
SIGMOID_LIMIT, TANH_LIMIT = 87.0, 10.0
SIXTH = 1.0 / 6.0


@dataclass(frozen=True)
class Tail:
    """A falling function of a >= 0.

        T(a) = p(min(a, limit)) ** (2 ** squarings)

    Attributes:
        limit: from here on it is constant, and as small as its error.
        squarings: how often p is squared.
        coefficients: of p, the constant first.
    """

    limit: float
    squarings: int
    coefficients: tuple[float, ...]


QUARTERS = 2.0**21
"""Added to 0 <= a < 4 it rounds to quarters, whose number is then in the low bits of the sum."""


@dataclass(frozen=True)
class Table:
    """A function of a >= 0 as 16 parabolas, one around each multiple of 1/4.

        n = round(4 min(a, limit)),  T(a) = coefficients[0][n] + a (coefficients[1][n] + a ...)

    Attributes:
        limit: from here on it is constant, and as small as its error; below 3.875.
        coefficients: three rows of 16, the constant first.
    """

    limit: float
    coefficients: tuple[tuple[float, ...], ...]


GELU = Tail(
    5.3,
    4,
    (0.95760572, -0.0477798469, -0.0177671518, -0.00139624858, 0.000692238158, -4.55205518e-05),
)
GELU_SHORT = Table(
    3.874,
    (
        (
            *(1.02579656e-06, 0.000636566721, 0.0105226059, 0.0465588495),
            *(0.119179763, 0.220564693, 0.325265467, 0.402380407),
            *(0.430751026, 0.406295866, 0.342764139, 0.260972619),
            *(0.180590808, 0.114186756, 0.0662454888, 0.0369316116),
        ),
        (
            *(0.499878556, 0.49210003, 0.44118616, 0.326810181),
            *(0.160853848, -0.0200247616, -0.173264891, -0.26909411),
            *(-0.300018966, -0.277365863, -0.22398901, -0.161637634),
            *(-0.105618775, -0.0630128533, -0.0345182978, -0.0178717189),
        ),
        (
            *(-0.39706558, -0.373466223, -0.307395905, -0.216348931),
            *(-0.12137714, -0.0406204499, 0.0154866129, 0.0452700555),
            *(0.0536969416, 0.0484509319, 0.0372372121, 0.0253520701),
            *(0.0155905522, 0.00875551626, 0.0045210286, 0.00215941248),
        ),
    ),
)
GELU_TANH = Tail(
    4.8,
    4,
    (
        *(0.9576087, -0.047823444, -0.0175688379, -0.00175576797),
        *(0.001116195, -0.000235623389, 2.12373925e-05),
    ),
)
GELU_TANH_SHORT = Table(
    3.874,
    (
        (
            *(1.03079674e-06, 0.000639281003, 0.0105506917, 0.0465712138),
            *(0.118895583, 0.219603598, 0.323785603, 0.401546508),
            *(0.432005256, 0.410531014, 0.348570347, 0.265858501),
            *(0.182468027, 0.112589791, 0.0622875765, 0.0317377821),
        ),
        (
            *(0.499877959, 0.492065847, 0.441015452, 0.326676726),
            *(0.161384478, -0.0182906501, -0.17075938, -0.267362446),
            *(-0.300513029, -0.280683428, -0.228646368, -0.165607736),
            *(-0.107500389, -0.0626672655, -0.0327669978, -0.0155960554),
        ),
        (
            *(-0.397056371, -0.373353302, -0.307097882, -0.216070354),
            *(-0.121470824, -0.0412495583, 0.0145706851, 0.044585824),
            *(0.0536059774, 0.0490288436, 0.0381007828, 0.0260873735),
            *(0.0159633644, 0.00877133571, 0.00432758732, 0.0019153672),
        ),
    ),
)
ERFC = Tail(
    4.0,
    3,
    (
        *(1.0, -0.141049072, -0.0696095079, -0.00218389044),
        *(0.00679241868, -4.06758372e-05, -0.000377235992, 4.81755196e-05),
    ),
)
