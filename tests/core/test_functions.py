"""The activation functions against float64, at their ends, and on values that are no numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twofour.core import functions
from twofour.core.functions import CLAMPS, PLAIN, SHORT, Activation

DENSE = np.concatenate(
    [
        np.linspace(-87.3, 88.3, 400_001),
        np.linspace(-6, 6, 400_001),
        np.geomspace(1e-9, 80, 20_001),
        -np.geomspace(1e-9, 80, 20_001),
    ]
).astype(np.float32)
REAL = DENSE.astype(np.float64)
ERF = np.array([math.erf(value / math.sqrt(2)) for value in REAL])
LARGE = np.maximum(1, REAL)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu_by_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


EXACT = {
    "exp": (np.exp(REAL), np.exp(REAL), 2.0e-7),
    "sigmoid": (logistic(REAL), 1, 1.1e-7),
    "tanh": (np.tanh(REAL), 1, 2.0e-7),
    "silu": (REAL * logistic(REAL), np.maximum(1, np.abs(REAL)), 1.5e-7),
    "gelu": (REAL * 0.5 * (1 + ERF), LARGE, 8.2e-7),
    "gelu_short": (REAL * 0.5 * (1 + ERF), LARGE, 1.1e-4),
    "gelu_tanh": (gelu_by_tanh(REAL), LARGE, 1.3e-6),
    "gelu_tanh_short": (gelu_by_tanh(REAL), LARGE, 1.1e-4),
    "hard_sigmoid": (np.clip(REAL / 6 + 0.5, 0, 1), 1, 1.2e-7),
    "hard_swish": (REAL * np.clip(REAL / 6 + 0.5, 0, 1), np.maximum(1, np.abs(REAL)), 1.2e-7),
    "relu": (np.maximum(REAL, 0), 1, 0.0),
    "softplus": (np.logaddexp(0, REAL), LARGE, 3.0e-7),
    "softsign": (REAL / (1 + np.abs(REAL)), 1, 1.2e-7),
}


@pytest.mark.parametrize("name", EXACT)
def test_errors_are_as_the_docstring_says(name) -> None:
    exact, size, bound = EXACT[name]
    got = getattr(functions, name)(DENSE)
    assert got.dtype == np.float32
    assert np.max(np.abs(got - exact) / size) <= bound


def test_the_error_of_erf() -> None:
    exact = np.array([math.erf(value) for value in REAL])
    assert np.max(np.abs(functions.erf(DENSE) - exact)) <= 7.2e-7


@pytest.mark.parametrize(
    ("name", "at_minus", "at_plus"),
    [
        ("exp", 0, np.inf),
        ("sigmoid", 0, 1),
        ("tanh", -1, 1),
        ("erf", -1, 1),
        ("silu", 0, np.inf),
        ("gelu", 0, np.inf),
        ("gelu_short", 0, np.inf),
        ("gelu_tanh", 0, np.inf),
        ("gelu_tanh_short", 0, np.inf),
        ("hard_sigmoid", 0, 1),
        ("hard_swish", 0, np.inf),
        ("relu", 0, np.inf),
    ],
)
def test_far_ends_and_no_numbers(name, at_minus, at_plus) -> None:
    function = getattr(functions, name)
    largest = np.finfo(np.float32).max
    far = function(np.array([-largest, -100, np.inf], np.float32))
    np.testing.assert_allclose(far, [at_minus, at_minus, at_plus], atol=2e-4)
    assert np.isnan(function(np.array([np.nan], np.float32))).all()
    if name != "hard_swish":  # there -inf * 0 is no number, as in ONNX
        np.testing.assert_allclose(function(np.float32([-np.inf])), [at_minus], atol=2e-4)


def test_exp_of_zero_is_one() -> None:
    assert (functions.exp(np.float32([0.0, -0.0])) == 1).all()


def test_signs_and_zeros() -> None:
    zeros = np.float32([0.0, -0.0])
    for name in ("erf", "gelu", "gelu_tanh", "silu", "hard_swish", "relu"):
        got = getattr(functions, name)(zeros)
        assert (got == 0).all(), name
    x = DENSE[DENSE > 0]
    assert (functions.erf(-x) == -functions.erf(x)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_an_activation_applies_its_function(name) -> None:
    one = Activation(name)
    assert (one.apply(DENSE) == PLAIN[name](DENSE)).all()
    assert (one.apply(DENSE, short=True) == SHORT[name](DENSE)).all()
    assert one.clamps == (name in CLAMPS)


def test_clip_keeps_within_its_bounds() -> None:
    got = Activation("Clip", -0.5, 6.0).apply(np.float32([-3, -0.5, 1, 6, 9, np.nan]))
    np.testing.assert_array_equal(got, np.float32([-0.5, -0.5, 1, 6, 6, np.nan]))
    assert Activation("Clip", -0.5).bounds() == (-0.5, np.inf)
    assert Activation("Relu").bounds() == (0.0, np.inf)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("Mish",), "no activation 'Mish'; expected one of"),
        (("Relu", 0.0, 6.0), "Relu has no bounds"),
        (("", 0.0), "no activation has no bounds"),
        (("Clip", 2.0, 1.0), "expected low <= high"),
        (("Clip", np.nan, 1.0), "expected low <= high"),
    ],
)
def test_refused_activations(arguments, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        Activation(*arguments)


def test_the_error_of_log_and_its_ends() -> None:
    x = np.geomspace(1e-44, 3.4e38, 400_001).astype(np.float32)
    x = np.concatenate([x, np.linspace(0.3, 3, 400_001, dtype=np.float32)])
    exact = np.log(x.astype(np.float64))
    off = np.abs(functions.log(x) - exact)
    assert np.max(off[exact != 0] / np.abs(exact[exact != 0])) <= 1.5e-7
    assert (off[exact == 0] == 0).all()
    ends = functions.log(np.float32([0.0, -0.0, np.inf, -1.0, -np.inf, np.nan]))
    assert (ends[:3] == np.float32([-np.inf, -np.inf, np.inf])).all()
    assert np.isnan(ends[3:]).all()
