"""Peaks are rates of real loops, and a plan's bound is the sum of its layers' bounds."""

from __future__ import annotations

import numpy as np
import pytest

from twofour.bench.suite.peak import (
    MACS,
    SUMS,
    TURNS,
    Peaks,
    _loop,
    family,
    ideal_us,
    measure_peaks,
)
from twofour.core.target import ISAS, Target, host_target, missing_features
from twofour.engine import Layer
from twofour.kernels.cpu.llvm import Source, compile_object, module_text
from twofour.runtime.cpu import Code, address, allocate


def targets() -> list[Target]:
    host = host_target()
    every = [Target(isa, host.arch, host.model) for isa in ISAS]
    return [target for target in every if not missing_features(target)]


@pytest.mark.parametrize("target", targets(), ids=str)
def test_each_family_has_a_rate(target: Target) -> None:
    peaks = measure_peaks(1, target)
    expected = set(MACS) if target.isa == "avx512vnni" else set(MACS) - {"float32 2:4"}
    assert set(peaks.gmacs) == expected
    assert all(0.1 < rate < 1e5 for rate in peaks.gmacs.values())


@pytest.mark.parametrize("name", MACS)
@pytest.mark.parametrize("target", targets(), ids=str)
def test_the_loops_do_the_multiply_adds_they_are_counted_for(target: Target, name: str) -> None:
    if name == "float32 2:4" and target.isa != "avx512vnni":
        pytest.skip("no such kernel: picking one of 16 floats a lane has no instruction there")
    function = _loop(name, 0, target.isa)
    code = Code([compile_object([Source(module_text([function]))], target)])
    memory = allocate(1 << 14)
    floats = name.startswith("float32")
    if floats:
        memory.view(np.float32)[:] = 1
    else:
        memory[:] = 1
    x = address(memory)
    weights = allocate(128)
    if floats:
        weights.view(np.float32)[:16] = 2
    else:
        weights[:64] = 2
    code.kernel("peak0")(x, address(weights), x, x, 0, 3, 0, 0)
    sums = memory.view(np.float32 if floats else np.int32)[16 * (TURNS + SUMS) :][: 16 * SUMS]
    each = 2 if floats else 2 * 4  # one product a lane, or four
    np.testing.assert_array_equal(sums, 3 * TURNS * each)


def test_layers_are_bound_by_the_loop_of_their_kernels() -> None:
    layers = [
        Layer("a", "Conv", "dense", precision="int8", macs=4_000_000),
        Layer("b", "Conv", "2:4 C", precision="int8", macs=6_000_000),
        Layer("c", "Conv", "2:4 pair", precision="int8", macs=8_000_000),
        Layer("d", "Conv", "2:4", precision="float32", macs=1_000_000),
        Layer("e", "Conv", "onnxruntime", precision="float32", macs=1_000_000),
        Layer("f", "Add", "pointwise"),
    ]
    assert [family(layer) for layer in layers[:5]] == [
        "int8 dense",
        "int8 2:4",
        "int8 2:4 pair",
        "float32 2:4",
        "float32 dense",
    ]
    rates = {"int8 dense": 2.0, "int8 2:4": 3.0, "int8 2:4 pair": 4.0}
    rates |= {"float32 dense": 0.5, "float32 2:4": 1.0}
    # Microseconds: 2000, 2000, 2000, 1000, 2000.
    assert ideal_us(layers, Peaks(rates)) == pytest.approx(9000)
