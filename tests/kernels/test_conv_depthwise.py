"""Every depthwise tactic equals the definition, bit for bit for integers, within bounds for floats.

Tactics x instruction sets x configurations x channels x windows x data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import Case, float_bound, gated, make, run, targets
from twofour.core.functions import Activation
from twofour.core.gates import REACH
from twofour.core.numerics import Epilogue, Window
from twofour.kernels.cpu.conv_depthwise import Interleaved
from twofour.kernels.cpu.depthwise_tile import places_of, quads_of
from twofour.kernels.cpu.problem import Config, ConvProblem, Strides
from twofour.kernels.cpu.tactic import Tactic, tactics

TARGETS = targets()
ALL = [t for t in tactics() if t.depthwise and t.dtype != "bfloat16"]  # see test_conv_bf16.py
INTEGER = [t for t in ALL if t.dtype == "int8"]
(FLOAT,) = (t for t in ALL if t.dtype == "float32")
IDS = {"ids": str}
WINDOWS = {
    "3x3": Window((3, 3)),
    "3x3 stride 2": Window((3, 3), (2, 2)),
    "5x5": Window((5, 5)),
    "5x5 stride 2": Window((5, 5), (2, 2)),
    "7x7": Window((7, 7)),
    "3x3 dilation 2": Window((3, 3), (1, 1), (2, 2)),
    "3x3 stride 2 dilation 3": Window((3, 3), (2, 2), (3, 3)),
    "1x3": Window((1, 3)),
    "4x1 stride 1x3": Window((4, 1), (1, 3)),
    "2x2 stride 3": Window((2, 2), (3, 3)),
    "1x1": Window((1, 1)),
}


def depthwise(rng, c: int, window: Window = WINDOWS["3x3"], **options) -> Case:
    """A case of `c` channels."""
    return make(rng, c=c, n=c, groups=c, window=window, **options)


def configs_for(t: Tactic, problem: ConvProblem, isa: str, every: bool) -> list[Config]:
    """All and one tile of a single position; or, as on the portable paths, the first."""
    configs = t.configs(problem, isa)
    assert configs
    if not every or isa != TARGETS[0].isa:
        return configs[:1]
    return [*configs, replace(configs[0], tile_h=1, tile_w=1)]


def check(case: Case, target, among: list[Tactic] = INTEGER, *, every: bool = False) -> int:
    """The tactics, in `every` configuration, give the expected bytes; returns how many ran."""
    problem, expected = case.problem(), case.expected()
    assert problem.depthwise
    able = [t for t in among if not t.refuse(problem, case.w, target.isa)]
    options = [(t, c) for t in able for c in configs_for(t, problem, target.isa, every)]
    for (t, config), got in zip(options, run(case, options, target), strict=True):
        assert got.dtype == expected.dtype
        wrong = np.argwhere(got != expected)
        assert wrong.size == 0, f"{t.name} {config}: {len(wrong)} wrong, first {wrong[0]}"
    return len(options)


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(target, window) -> None:
    rng = np.random.default_rng(0)
    case = depthwise(
        rng, 80, window, batch=2, height=16, width=19, activation=Activation("Relu"), x_zero=7
    )
    assert check(case, target, every=True) >= 1
    check(replace(case, x_gap=16, y_gap=3, bounded=True), target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("c", [2, 15, 16, 17, 20, 24, 31, 33, 48, 49, 63, 64, 65, 72, 144])
def test_channels_that_do_not_fill_a_register(target, c) -> None:
    """Up to 16, 32 and 64 channels are strips of columns side by side, of any width."""
    rng = np.random.default_rng(c)
    for width in (3, 11):
        case = depthwise(rng, c, height=6, width=width)
        check(replace(case, y_gap=5, bounded=True), target, every=True)
    if target is TARGETS[0]:
        check(depthwise(rng, c, height=5, width=8), target)
        check(depthwise(rng, c, height=5, width=7, add="int8"), target)
        check(depthwise(rng, c, height=5, width=7, out="float32"), target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
def test_extreme_values(target) -> None:
    """All weights -128 or 127, all inputs 0 or 255, zero points at both ends, 49 taps."""
    base = depthwise(np.random.default_rng(1), 20, WINDOWS["7x7"], height=8, width=8)
    for x in (0, 255):
        for w in (-128, 127):
            for zero in (0, 255):
                scale = np.full(20, 1 / (3 * 128), np.float32)
                epilogue = Epilogue(scale, base.epilogue.bias, zero_point=zero, unsigned=True)
                epilogue = epilogue.in_stored_steps()
                case = replace(base, x=np.full_like(base.x, x), epilogue=epilogue, x_zero=zero)
                check(replace(case, w=np.full_like(base.w, w)), target)


ACTIVATIONS = [
    Activation(),
    Activation("Relu"),
    Activation("Clip", 0.0, 20.6),
    Activation("Clip", -3.5, 2.5),
    Activation("Clip", -50.2, -10.7),
    Activation("HardSwish"),
    Activation("Silu"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name} {a.low} {a.high}")
@pytest.mark.parametrize("out", ["int8", "float32"])
def test_epilogues(activation, out) -> None:
    rng = np.random.default_rng(2)
    for add in ("", "int8", "float32"):
        for zero in (0, 3, 255):
            case = depthwise(
                rng, 40, add=add, out=out, activation=activation, y_zero=zero, x_zero=zero
            )
            check(case, TARGETS[0])
            if out == "int8" and activation.name in REACH:
                check(gated(case, 0.07), TARGETS[0])


def test_results_far_outside_the_range_saturate() -> None:
    """Also those that do not fit int32, and what is no number."""
    case = depthwise(np.random.default_rng(3), 80)
    for factor in (1e6, 1e12, 1e30, np.inf):
        scale = case.epilogue.scale * np.float32(factor)
        with np.errstate(all="ignore"):
            check(replace(case, epilogue=replace(case.epilogue, scale=scale)), TARGETS[0])


def test_ties_round_to_even() -> None:
    """Sums of one weight 1 with scale 0.5 lie halfway between two integers for odd inputs."""
    x = np.repeat(np.arange(256, dtype=np.uint8), 64).reshape(1, 16, 16, 64)
    for zero in (0, 1):
        half = Epilogue(
            np.full(64, 0.5, np.float32), np.zeros(64, np.float32), zero_point=zero, unsigned=True
        ).in_stored_steps()
        ones = np.ones((64, 1, 1, 1), np.int8)
        check(Case(x, ones, half, Window((1, 1)), groups=64, x_zero=0), TARGETS[0])


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_floats(target, window) -> None:
    rng = np.random.default_rng(4)
    for c, options in (
        (16, {}),
        (20, {"add": "float32", "activation": Activation("Relu")}),
        (33, {"activation": Activation("Clip", 0.0, 6.0)}),
    ):
        case = depthwise(rng, c, window, height=16, width=12, dtype="float32", **options)
        configs = configs_for(FLOAT, case.problem(), target.isa, c == 20)
        for got in run(case, [(FLOAT, config) for config in configs], target):
            assert (np.abs(got - case.expected()) <= float_bound(case)).all()


@pytest.mark.parametrize("t", ALL, ids=lambda t: f"{t.name} {t.dtype}")
def test_any_division_of_the_work_gives_the_same_bytes(t) -> None:
    case = depthwise(np.random.default_rng(5), 80, height=20, width=9, dtype=t.dtype)
    options = [(t, c) for c in configs_for(t, case.problem(), TARGETS[0].isa, True)]
    whole = run(case, options, TARGETS[0])
    for parts in (2, 3, 7):
        for one, other in zip(whole, run(case, options, TARGETS[0], parts), strict=True):
            assert (one == other).all()


def test_quads_are_as_few_as_can_be() -> None:
    """Two rows share the quads of a 3x3, four those of a 5x5; other rows never cost more."""

    def problem(window: Window) -> ConvProblem:
        case = depthwise(np.random.default_rng(6), 64, window, height=40, width=40)
        return case.problem()

    for window, shared in ((WINDOWS["3x3"], 2), (WINDOWS["5x5"], 4), (WINDOWS["7x7"], 2)):
        rows = [[rows for rows, _ in quads_of(problem(window), i)] for i in range(8)]
        assert all(row == rows[0] for row in rows[:shared])
        assert rows[shared] != rows[0]
    for window in WINDOWS.values():
        (kernel, _), (stride, _), (dilation, _) = window.kernel, window.stride, window.dilation
        for row in range(8):
            quads = quads_of(problem(window), row)
            assert len(quads) == -(-kernel // 4)
            found = {t: r for rows, taps in quads for r, t in zip(rows, taps, strict=True)}
            wanted = {t: row * stride + t * dilation for t in range(kernel)}
            assert {t: found[t] for t in wanted} == wanted
    assert len(places_of(problem(WINDOWS["3x3"]), 8)) == 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(list(WINDOWS.values())),
    st.sampled_from(["avx512vnni", "avx2", "vector"]),
)
def test_configurations_are_legal_and_distinct(out_h, out_w, window, isa) -> None:
    strides = Strides(1 << 20, 1 << 12, 64)
    parts = window.kernel, window.stride, window.dilation
    for t in ALL:
        problem = ConvProblem(
            1, out_h, out_w, 1, 1, t.dtype, strides, strides, t.dtype, *parts, groups=64
        )
        configs = t.configs(problem, isa)
        assert configs
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert 1 <= config.tile_h <= out_h
            assert 1 <= config.tile_w <= out_w
            pieces, panels = t.kernel.work(problem, config)
            assert pieces >= 1
            assert panels == 64 // (16 * config.blocks)


class Forgetful(Interleaved):
    """Packs the last tap of the last channel as another one."""

    def pack(self, w, problem, config, epilogue, x_zero_point):
        w = w.copy()
        w[-1, 0, -1, -1] ^= 64
        return super().pack(w, problem, config, epilogue, x_zero_point)


@pytest.mark.skipif(TARGETS[0].isa != "avx512vnni", reason="needs AVX-512 with VNNI")
def test_a_wrong_weight_is_noticed() -> None:
    """What the tests above compare can differ."""
    wide = next(t for t in INTEGER if isinstance(t.kernel, Interleaved))
    wrong = replace(wide, kernel=Forgetful())
    case = depthwise(np.random.default_rng(7), 80, height=5, width=5)
    assert check(case, TARGETS[0], [wide])
    with pytest.raises(AssertionError, match="wrong, first"):
        check(case, TARGETS[0], [wrong])
