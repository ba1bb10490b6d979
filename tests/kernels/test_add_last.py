"""Residuals behind the activation, y = f(acc) + r: kernels equal the definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.bf16 import TARGET, needs_bf16
from tests.kernels.harness import Case, adding_last, float_bound, gated, make, run, tactic, targets
from twofour.core.functions import CLAMPS, PLAIN, Activation
from twofour.core.gates import REACH, Gate
from twofour.core.numerics import Epilogue, Window
from twofour.kernels.cpu.tactic import tactics

TARGETS = targets()
IDS = {"ids": str}
SILU = Activation("Silu")
NAMES = [name for name in PLAIN if name not in CLAMPS]


def of_each(cases: list) -> list[tuple]:
    """All cases on the best instruction set, every third one on the others."""
    return [(t, case) for t in TARGETS for case in cases[:: 1 if t is TARGETS[0] else 3]]


def check(case: Case, target, name: str = "dense") -> np.ndarray:
    """The expected results, which the tactic's best guess gives."""
    t = tactic(name)
    config = t.configs(case.problem(), target.isa)[0]
    (got,), want = run(case, [(t, config)], target), case.expected()
    wrong = np.argwhere(got != want)
    assert not wrong.size, f"{len(wrong)} wrong, first {wrong[0]}: {got[tuple(wrong[0])]}"
    return want


@pytest.mark.parametrize(("target", "name"), of_each(NAMES), **IDS)
@pytest.mark.parametrize("out", ["int8", "float32"])
def test_integer_sums(target, name, out) -> None:
    """Without a table; also where the last block of channels is not full."""
    rng = np.random.default_rng(0)
    for n, add, y_zero in ((16, "int8", 117), (20, "int8", 0), (20, "float32", 40)):
        case = make(rng, c=16, n=n, add=add, out=out, activation=Activation(name), y_zero=40)
        r_scale = 0.37 if add == "int8" else 11.3
        case = adding_last(case, r_scale, y_zero if out == "int8" else 0)
        assert len(np.unique(check(case, target))) > 20


@pytest.mark.parametrize("target", TARGETS[:1], **IDS)
@pytest.mark.parametrize("name", ["2:4 H", "2:4 C"])
def test_sparse_weights(target, name) -> None:
    rng = np.random.default_rng(1)
    for out in ("int8", "float32"):
        case = make(rng, c=16, n=32, add="int8", out=out, pattern="2:4", activation=SILU)
        check(adding_last(case, y_zero=100), target, name)
    case = make(rng, c=16, n=32, add="int8", pattern="2:4", activation=SILU, y_zero=40)
    check(gated(case, 0.05, (0.8, 128)), target, name)


@pytest.mark.parametrize("target", TARGETS, **IDS)
def test_depthwise(target) -> None:
    rng = np.random.default_rng(2)
    case = make(rng, c=40, n=40, groups=40, add="int8", activation=SILU, y_zero=40)
    names = [t.name for t in tactics() if t.depthwise and t.dtype == "int8"]
    for name in (name for name in names if tactic(name).is_for(target.isa)):
        check(adding_last(case), target, name)
        check(gated(case, 0.05, (0.8, 7)), target, name)


def check_floats(dtype: str, target) -> None:
    """The slope of an activation is at most 1.13, so errors of the sums hardly grow."""
    rng, t = np.random.default_rng(3), tactic("dense", dtype)
    for name in NAMES:
        case = make(rng, c=16, n=20, dtype=dtype, add=dtype, activation=Activation(name))
        case = adding_last(case, 1.0)
        config = t.configs(case.problem(), target.isa)[0]
        (got,) = run(case, [(t, config)], target)
        assert (np.abs(got - case.expected()) <= 1.13 * float_bound(case) + 1e-6).all(), name


@pytest.mark.parametrize("target", TARGETS, **IDS)
def test_float_sums(target) -> None:
    check_floats("float32", target)


@needs_bf16
def test_bfloat16() -> None:
    check_floats("bfloat16", TARGET)


SCALES = [(0.019, 1.0), (0.2, 0.013), (0.05, 1.99), (1, 3)]


@pytest.mark.parametrize(
    ("target", "case"), of_each([(n, *scales) for scales in SCALES for n in REACH]), **IDS
)
def test_every_byte_and_many_sums_by_the_table(target, case) -> None:
    """256 residuals times 256 biases; the first and last saturate."""
    name, y_scale, r_scale = case
    ones, steps = np.ones(256, np.float32), np.arange(256, dtype=np.float32)
    epilogue = Epilogue(ones, ones, activation=Activation(name), zero_point=5, unsigned=True)
    x = np.zeros((1, 256, 1, 1), np.uint8)
    r = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1), 256, 3)
    w = np.ones((256, 1, 1, 1), np.int8)
    whole = Case(x, w, epilogue, Window((1, 1)), x_zero=0, residual=r)
    bias = (256 * steps - 2**15) * np.float32(1.01)
    for zero, r_zero in ((0, 0), (128, 128), (3, 255)):
        one = gated(whole, y_scale, (r_scale, r_zero))
        exact = replace(one.epilogue, scale=ones, bias=bias, zero_point=zero)
        want = check(replace(one, epilogue=exact, bounded=zero == 0), target)
        assert 255 in want


def test_the_table_is_near_the_real_numbers() -> None:
    """Off by the error of the table, one unit of r, and the last rounding."""
    rng = np.random.default_rng(4)
    value = rng.uniform(-12, 12, 100_000)
    r = rng.integers(0, 256, value.size).astype(np.uint8)
    for y_scale, r_scale, r_zero in ((0.1, 1.0, 128), (0.2, 0.4, 3), (0.09, 1.7, 128)):
        gate = Gate.of("Silu", y_scale, r_scale, r_zero)
        assert gate is not None
        got = gate.apply((value / gate.step).astype(np.float32), 77, r).astype(float)
        silu = value / (1 + np.exp(-value)) / y_scale
        exact = np.clip(silu + (r.astype(float) - r_zero) * r_scale + 77, 0, 255)
        bound = 0.5 + 7.5e-4 / y_scale + 2.75 / 2**gate.bits
        assert np.abs(got - exact).max() <= bound


def test_a_residual_that_fits_no_16_bits_has_no_table() -> None:
    assert Gate.of("Silu", 0.1, 3.9) is not None
    assert Gate.of("Silu", 0.1, 4.1) is None
