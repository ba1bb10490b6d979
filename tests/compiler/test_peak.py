"""Peaks are rates of real loops, and a plan's bound is the sum of its layers' bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from twofour.compiler.peak import (
    MACS,
    SUMS,
    TURNS,
    Peaks,
    family,
    ideal_us,
    lacks,
    measure_peaks,
    multiply_adds,
)
from twofour.core.bfloat16 import to_bf16
from twofour.core.target import ISAS, Target, host_target, missing_features, why_no_bf16
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
    with_bf16 = replace(target, bf16=not why_no_bf16(target))
    assert set(peaks.gmacs) == {name for name in MACS if not lacks(with_bf16, name)}
    assert ("float32 2:4" in peaks.gmacs) == (target.isa == "avx512vnni")
    assert ("bfloat16 dense" in peaks.gmacs) == with_bf16.bf16
    assert all(0.1 < rate < 1e5 for rate in peaks.gmacs.values())


@pytest.mark.parametrize("name", MACS)
@pytest.mark.parametrize("target", targets(), ids=str)
def test_the_loops_do_the_multiply_adds_they_are_counted_for(target: Target, name: str) -> None:
    target = replace(target, bf16=not why_no_bf16(target))
    if lacks(target, name):
        pytest.skip("no such kernel: there is no instruction for it")
    function = multiply_adds(name, 0, target.isa)
    code = Code([compile_object([Source(module_text([function]))], target)])
    memory = allocate(1 << 14)
    dtype = {"int8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}[name.partition(" ")[0]]
    one, two = to_bf16(np.array([1, 2], np.float32)) if dtype == np.uint16 else (1, 2)
    memory.view(dtype)[:] = one
    x = address(memory)
    weights = allocate(128)
    weights[:64].view(dtype)[:] = two
    weights[64:] = np.tile(np.arange(4), 16)  # indices of bytes
    code.kernel("peak0")(x, address(weights), x, x, 0, 3, 0, 0)
    kind = np.int32 if dtype == np.uint8 else np.float32
    sums = memory.view(kind)[16 * (TURNS + SUMS) :][: 16 * SUMS]
    each = 2 * 4 // np.dtype(dtype).itemsize  # one product a lane, or two, or four
    np.testing.assert_array_equal(sums, 3 * TURNS * each)


def test_layers_are_bound_by_the_loop_of_their_kernels() -> None:
    layers = [
        Layer("a", "Conv", "dense", precision="int8", macs=4_000_000),
        Layer("b", "Conv", "2:4 C", precision="int8", macs=6_000_000),
        Layer("c", "Conv", "2:4 pair", precision="int8", macs=8_000_000),
        Layer("d", "Conv", "2:4", precision="float32", macs=1_000_000),
        Layer("g", "BConv", "2:4 pair", precision="bfloat16", macs=3_000_000),
        Layer("h", "BConv", "4:8", precision="bfloat16", macs=5_000_000),
        Layer("e", "Conv", "onnxruntime", precision="float32", macs=1_000_000),
        Layer("f", "Add", "pointwise"),
    ]
    assert [family(layer) for layer in layers[:7]] == [
        "int8 dense",
        "int8 2:4",
        "int8 2:4 pair",
        "float32 2:4",
        "bfloat16 2:4 pair",
        "bfloat16 2:4",
        "float32 dense",
    ]
    rates = {"int8 dense": 2.0, "int8 2:4": 3.0, "int8 2:4 pair": 4.0}
    rates |= {
        "float32 dense": 0.5,
        "float32 2:4": 1.0,
        "bfloat16 2:4 pair": 1.5,
        "bfloat16 2:4": 1.0,
    }
    # Microseconds: 2000, 2000, 2000, 1000, 2000, 5000, 2000.
    assert ideal_us(layers, Peaks(rates)) == pytest.approx(16000)
