"""Gates in kernels equal their definition: every 16-bit input, every instruction set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import Case, gated, make, run, tactic, targets
from twofour.core.functions import Activation
from twofour.core.gates import REACH
from twofour.core.numerics import Epilogue, Window

TARGETS = targets()
IDS = {"ids": str}


def check(case: Case, target, name: str = "dense") -> np.ndarray:
    """The expected bytes, which the tactic's best guess gives."""
    t = tactic(name)
    config = t.configs(case.problem(), target.isa)[0]
    (got,), want = run(case, [(t, config)], target), case.expected()
    wrong = np.argwhere(got != want)
    assert not wrong.size, f"{len(wrong)} wrong, first {wrong[0]}: {got[tuple(wrong[0])]}"
    return want


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("name", REACH)
@pytest.mark.parametrize("y_scale", [0.0095, 0.02, 0.19, 40.0])
def test_every_input(target, name, y_scale) -> None:
    """256 inputs times 256 biases are all values of 16 bits; the first and last saturate."""
    ones, steps = np.ones(256, np.float32), np.arange(256, dtype=np.float32)
    epilogue = Epilogue(ones, ones, activation=Activation(name), zero_point=5, unsigned=True)
    x = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)
    case = Case(x, np.ones((256, 1, 1, 1), np.int8), epilogue, Window((1, 1)), x_zero=0)
    case = gated(case, y_scale)
    bias = (256 * steps - 2**15) * np.float32(1.01)
    for zero in (0, 128):
        exact = replace(case.epilogue, scale=ones, bias=bias, zero_point=zero)
        want = check(replace(case, epilogue=exact, bounded=zero == 0), target)
        assert {zero, 255} <= set(np.unique(want))


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("n", [16, 20, 48])
@pytest.mark.parametrize("add", ["", "int8", "float32"])
def test_in_kernels(target, n, add) -> None:
    """With residuals, where blocks are not full, and in every tactic."""
    rng = np.random.default_rng(n)
    for name, pattern in (("dense", ""), ("2:4 H", "2:4"), ("2:4/pair", "2:4/pair")):
        if n % 32 and pattern == "2:4/pair":
            continue
        activation = Activation("Gelu")
        case = make(rng, c=16, n=n, add=add, pattern=pattern, activation=activation, y_zero=40)
        want = check(gated(case, 0.05), target, name)
        assert len(np.unique(want)) > 20


@pytest.mark.parametrize("target", TARGETS, **IDS)
def test_results_that_do_not_fit_or_are_no_numbers(target) -> None:
    case = make(np.random.default_rng(3), c=16, n=16, add="float32", activation=Activation("Silu"))
    case = gated(case, 0.05)
    for factor in (1e6, 1e12, 1e30):
        scale = case.epilogue.scale * np.float32(factor)
        check(replace(case, epilogue=replace(case.epilogue, scale=scale)), target)
    for value in (np.nan, np.inf, -np.inf):
        with np.errstate(invalid="ignore"):
            check(replace(case, residual=np.full_like(case.residual, value)), target)
