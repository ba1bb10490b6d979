"""The emitted activation functions equal their definitions bit for bit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.kernels.harness import targets
from twofour.core import functions as definition
from twofour.core.functions import PLAIN, Activation
from twofour.core.target import Target
from twofour.kernels.cpu import functions as emitters
from twofour.kernels.cpu.llvm import Function, Source, compile_object, module_text
from twofour.kernels.cpu.vector import LANES, every, float_bits
from twofour.runtime.cpu import Code, address

TARGETS = targets()
CLIP = (-0.75, 6.0)
NAMES = [*PLAIN, "Clip"]
FORMS = [
    *((name, short) for name in NAMES for short in (False, True)),
    *(("exp", False), ("erf", False), ("log", False)),
]
EXTREMES = np.float32(
    [
        *(np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-39),
        *(3.4e38, -3.4e38, 88.37, 88.38, 88.72, 88.73, -87.33, -87.34, -88.4, -103.9, -104.0),
        *(0.5, -0.5, 3.0, -3.0, 3.9, -3.9, 4.8, 5.3, -5.3, 10.0, -10.0, 87.0, -87.0, 6.0, -0.75),
    ]
)


def expected(name: str, short: bool, x: np.ndarray) -> np.ndarray:
    if name in ("exp", "erf", "log"):
        return getattr(definition, name)(x)
    return Activation(name, *(CLIP if name == "Clip" else ())).apply(x, short=short)


def write(index: int, name: str, short: bool, lanes: int, isa: str) -> str:
    """A kernel: y[0..t1) = name(x[0..t1)); t1 is a multiple of 16."""
    pointers = [("ptr noalias", "x"), ("ptr", "w"), ("ptr noalias", "y"), ("ptr", "r")]
    f = Function(f"f{index}", [*pointers, *(("i64", p) for p in ("t0", "t1", "p0", "p1"))])
    kind = "float" if lanes == 1 else f"<{lanes} x float>"
    text = [float_bits(bound) for bound in CLIP]
    bounds = tuple(text if lanes == 1 else [every("float", t, lanes) for t in text])

    def turn(i, _):
        at = f.int_op("mul", i, 4)
        x = f.load(kind, "%x", at, 4)
        if name in ("exp", "erf", "log"):
            y = getattr(emitters, f"emit_{name}")(f, x, lanes)
        else:
            v = emitters.Floats(f, lanes, isa)
            y = emitters.emit_activation(v, name, x, bounds, short=short)
        f.store(kind, y, "%y", at, 4)
        return []

    f.loop("%t0", "%t1", [], turn, lanes)
    return module_text([f])


@cache
def code(target: Target, lanes: int) -> Code:
    """One object with every function."""
    texts = [write(i, name, short, lanes, target.isa) for i, (name, short) in enumerate(FORMS)]
    return Code([compile_object([Source(t, vectorize=lanes == 1) for t in texts], target)])


def run(target: Target, lanes: int, index: int, x: np.ndarray) -> np.ndarray:
    padded = np.resize(x, -(-x.size // LANES) * LANES)
    y = np.full_like(padded, 7.0)
    code(target, lanes).kernel(f"f{index}")(address(padded), 0, address(y), 0, 0, padded.size, 0, 1)
    return y[: x.size]


def bits(x: np.ndarray) -> np.ndarray:
    """The bits, those of all NaNs alike."""
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("lanes", [1, LANES])
def test_every_function_bit_for_bit(target, lanes) -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate(
        [
            EXTREMES,
            rng.integers(0, 1 << 32, 200_000, np.uint32).view(np.float32),
            rng.normal(scale=4, size=200_000).astype(np.float32),
            np.linspace(-104, 89, 100_000, dtype=np.float32),
        ]
    )
    for index, (name, short) in enumerate(FORMS):
        want, got = expected(name, short, x), run(target, lanes, index, x)
        wrong = np.flatnonzero(bits(got) != bits(want))
        assert not wrong.size, f"{name}({x[wrong[0]]!r}): {got[wrong[0]]!r}, not {want[wrong[0]]!r}"


@given(arrays(np.uint32, 48), st.integers(0, len(FORMS) - 1), st.sampled_from(TARGETS))
def test_any_bits(raw, index, target) -> None:
    x = raw.view(np.float32)
    assert (bits(run(target, LANES, index, x)) == bits(expected(*FORMS[index], x))).all()


def test_what_has_no_emitter() -> None:
    f = Function("f", [])
    for name in ("Mish", "Clip"):
        with pytest.raises(ValueError, match="no emitter for activation"):
            emitters.emit_activation(emitters.Floats(f), name, "%x")
