"""Gates against float64, at the ends of their range, and where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twofour.core.functions import PLAIN, Activation
from twofour.core.gates import REACH, SEGMENTS, Gate
from twofour.core.numerics import Epilogue, requantize

ERROR = {"Gelu": 2.0e-4, "GeluTanh": 2.0e-4, "Silu": 7.5e-4}
SCALES = (0.0095, 0.0105, 0.0157, 0.02, 0.05, 0.19, 1.3, 10.0, 1e4)


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """The activation in float64."""
    if name == "Gelu":
        return x * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x]))
    if name == "GeluTanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-np.maximum(x, -700)))


@pytest.mark.parametrize("name", REACH)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("zero", [0, 7, 128, 255])
def test_errors_are_as_the_docstring_says(name, scale, zero) -> None:
    gate = Gate.of(name, scale)
    assert gate is not None
    ends = (-300 - zero) * scale, (300 - zero) * scale
    x = np.concatenate([np.linspace(-12, 12, 20_001), np.linspace(*ends, 20_001), [-1e9, 1e9]])
    got = gate.apply((x / gate.step).astype(np.float32), zero)
    want = np.clip(exact(name, x) / scale + zero, 0, 255)
    assert got.dtype == np.uint8
    assert np.abs(got - want).max() <= 0.5 + ERROR[name] / scale + 1.75 / 2**gate.bits


@pytest.mark.parametrize("name", REACH)
@pytest.mark.parametrize("scale", SCALES)
def test_all_numbers_fit_16_bits(name, scale) -> None:
    """The rules that kernels rely on: no sum but the last one can leave int16."""
    gate = Gate.of(name, scale)
    a = np.arange(gate.limit + 1)
    n = (a * gate.index) >> 16
    assert 0 <= gate.limit < 2**15
    assert 0 < gate.index < 2**16
    assert n.max() < SEGMENTS
    t = gate.base[n] + ((a * gate.slope[n].astype(int) + 2**14) >> 15)
    for zero in (0, 255):
        first = gate.base.astype(int) + (zero << gate.bits)
        assert -(2**15) <= min(first.min(), t.min() + (zero << gate.bits))
        assert max(first.max(), t.max() + (zero << gate.bits)) < 2**15
    assert 2**15 >> gate.bits >= 256, "the saturation of X is that of y"


def test_what_is_no_number_or_beyond_all_reach() -> None:
    gate = Gate.of("Gelu", 0.02)
    values = np.float32([np.nan, -np.inf, -3e38, 0, 3e38, np.inf])
    assert gate.apply(values, 9).tolist() == [9, 9, 9, 9, 255, 255]


@pytest.mark.parametrize("name", [*PLAIN, "Clip"])
def test_which_activations_are_gates(name) -> None:
    assert (Gate.of(name, 0.05) is not None) == (name in REACH)


@pytest.mark.parametrize("name", REACH)
def test_a_scale_too_small_for_16_bits_has_no_table(name) -> None:
    least = REACH[name] / 1023.5
    assert Gate.of(name, least).bits == 5
    assert Gate.of(name, least * 0.99) is None


def test_requantize_by_a_gate() -> None:
    gate = Gate.of("Silu", 0.05)
    random = np.random.default_rng(0)
    acc = random.integers(-30_000, 30_000, (50, 3)).astype(np.int32)
    scale, bias = (random.uniform(0.1, 1, 3).astype(np.float32) for _ in range(2))
    residual = random.normal(size=acc.shape).astype(np.float32)
    epilogue = Epilogue(scale, bias, 2.5, Activation("Silu"), 30, unsigned=True, gate=gate)
    plain = Epilogue(scale, bias, 2.5)
    want = gate.apply(requantize(acc, plain, residual), 30)
    assert (requantize(acc, epilogue, residual) == want).all()
    assert len(np.unique(want)) > 50
