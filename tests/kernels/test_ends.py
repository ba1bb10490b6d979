"""The dense kernel that joins the ends of filter rows equals the definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import Case, make, run, tactic, targets
from twofour.core.functions import Activation
from twofour.core.numerics import Window

TARGET = targets()[0]
ENDS = tactic("dense ends")
pytestmark = pytest.mark.skipif(TARGET.isa != "avx512vnni", reason="needs AVX-512 VNNI")

# Input channels and window: rows of 21, 9, 15, 5, 18, 6 and 9 inputs; ends of 1 or 2 of each.
SHAPES = {
    "3 channels, 7x7 stride 2": (3, Window((7, 7), (2, 2))),
    "3 channels, 3x3": (3, Window((3, 3))),
    "3 channels, 3x3 stride 2": (3, Window((3, 3), (2, 2))),
    "1 channel, 5x5": (1, Window((5, 5))),
    "6 channels, 3x3": (6, Window((3, 3))),
    "2 channels, 3x3, rows apart": (2, Window((3, 3), (1, 1), (2, 1))),
    "1 channel, 2x9": (1, Window((2, 9))),
    "3 channels, 5x3": (3, Window((5, 3))),
}


def check(case: Case) -> None:
    problem = case.problem()
    assert ENDS.refuse(problem, case.w, TARGET.isa) == ""
    configs = ENDS.configs(problem, TARGET.isa)
    configs.append(replace(configs[0], panels_outside=True, prefetch_bytes=256))
    for got in run(case, [(ENDS, config) for config in configs], TARGET):
        assert (got == case.expected()).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n", [16, 33, 64])
def test_equals_the_definition(shape, n) -> None:
    (c, window), rng = shape, np.random.default_rng(n)
    for zero in (0, 131, 255):
        for batch in (1, 2):
            options = {"activation": Activation("Relu"), "x_zero": zero, "y_zero": zero}
            check(make(rng, batch=batch, height=19, width=23, c=c, n=n, window=window, **options))


def test_extreme_values_and_a_residual() -> None:
    case = make(np.random.default_rng(0), height=9, width=9, c=3, n=32, add="int8")
    for x in (0, 255):
        for w in (-128, 127):
            check(replace(case, x=np.full_like(case.x, x), w=np.full_like(case.w, w)))


def test_each_weight_meets_its_own_input() -> None:
    """One weight of 1, the others 0: the result is the input that it belongs to."""
    case = make(np.random.default_rng(1), height=7, width=7, c=3, n=16, window=Window((7, 7)))
    for place in range(case.w[0].size):
        w = np.zeros_like(case.w)
        w.reshape(16, -1)[:, place] = 1
        check(replace(case, w=w))


@pytest.mark.parametrize(
    ("c", "window", "reason"),
    [
        (8, Window((3, 3)), "rows|fours"),
        (3, Window((1, 7)), "fours"),
        (1, Window((3, 1)), "fours"),
        (3, Window((3, 3), (1, 1), (1, 2)), "taps lie apart"),
    ],
)
def test_refuses_with_the_reason(c, window, reason) -> None:
    case = make(np.random.default_rng(2), height=9, width=9, c=c, n=16, window=window)
    with pytest.raises(AssertionError, match=reason):
        assert ENDS.refuse(case.problem(), case.w, TARGET.isa) == ""


def test_refuses_other_instruction_sets() -> None:
    case = make(np.random.default_rng(2), height=9, width=9, c=3, n=16)
    assert "AVX-512" in ENDS.refuse(case.problem(), case.w, "avx2")
