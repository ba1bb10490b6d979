"""Every convolution tactic equals the definition, bit for bit.

Tactics x instruction sets x configurations x sizes x data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import Case, float_bound, make, of_this_machine, run, tactic, targets
from twofour.core.functions import CLAMPS, PLAIN, Activation
from twofour.core.numerics import Epilogue, Window
from twofour.core.patterns import is_pattern
from twofour.kernels.cpu.problem import Config, ConvProblem, Strides, merge_groups
from twofour.kernels.cpu.tactic import Tactic

TARGETS = targets()
ENDS = tactic("dense ends")  # for few channels alone: see tests/kernels/test_ends.py
INTEGER = [t for t in of_this_machine("int8") if t is not ENDS]
IDS = {"ids": str}


def options_for(t: Tactic, problem: ConvProblem, isa: str) -> list[tuple[Tactic, Config]]:
    """All its configurations, with the other loop order, and one prefetching.

    On the portable paths, which differ in single operations but not in how the loops run, the
    best guess alone: their code takes long to generate.
    """
    configs = t.configs(problem, isa)
    assert configs
    if isa != TARGETS[0].isa:
        return [(t, configs[0])]
    other = replace(configs[0], panels_outside=not configs[0].panels_outside)
    return [(t, c) for c in (*configs, other, replace(configs[0], prefetch_bytes=256))]


def check(case: Case, t: Tactic, target) -> None:
    """All configurations of the tactic give the expected bytes."""
    problem = case.problem()
    assert t.refuse(problem, case.w, target.isa) == ""
    expected = case.expected()
    for (_, config), got in zip(
        options := options_for(t, problem, target.isa), run(case, options, target), strict=True
    ):
        assert got.dtype == expected.dtype
        wrong = np.argwhere(got != expected)
        assert wrong.size == 0, (
            f"{t.name} {config} of {len(options)}: {len(wrong)} wrong, first {wrong[0]}"
        )


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("t", INTEGER, ids=lambda t: t.name)
@pytest.mark.parametrize("m", [1, 27, 28, 29])
def test_matrix_products_around_the_tile_and_vector_width(t, target, m) -> None:
    rng = np.random.default_rng(m)
    for n, k in ((16, 8), (32, 40), (96, 136)):
        if t.pattern == "2:4/pair" and n == 16:
            continue
        check(
            make(rng, height=m, width=1, c=k, n=n, window=Window((1, 1)), pattern=t.pattern),
            t,
            target,
        )


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("n", [1, 15, 17, 31, 33])
@pytest.mark.parametrize("out", ["int8", "float32"])
def test_outputs_that_do_not_fill_the_last_block(target, n, out) -> None:
    rng = np.random.default_rng(n)
    for name in ("dense", "2:4 H", "2:4 C"):
        case = make(
            rng,
            height=3,
            width=3,
            c=12,
            n=n,
            window=Window((1, 1)),
            out=out,
            pattern=tactic(name).pattern,
            add="int8",
        )
        check(replace(case, y_gap=3), tactic(name), target)


@pytest.mark.parametrize("target", TARGETS[:1], **IDS)
@pytest.mark.parametrize("t", INTEGER, ids=lambda t: t.name)
def test_long_sums_of_extreme_values(t, target) -> None:
    """K = 4096, all weights -128 or 127, all inputs 0 or 255, zero points at both ends."""
    base = make(
        np.random.default_rng(0),
        height=5,
        width=1,
        c=4096,
        n=32,
        window=Window((1, 1)),
        pattern=t.pattern,
    )
    kept = base.w != 0
    for x in (0, 255):
        for w in (-128, 127):
            for zero in (0, 255):
                scale = np.full(32, 1 / (255 * 128), np.float32)
                epilogue = Epilogue(scale, base.epilogue.bias, zero_point=zero, unsigned=True)
                epilogue = epilogue.in_stored_steps()
                case = replace(
                    base,
                    x=np.full_like(base.x, x),
                    w=np.where(kept, w, 0).astype(np.int8),
                    epilogue=epilogue,
                    x_zero=zero,
                )
                check(case, t, target)


WINDOWS = {
    "3x3": Window((3, 3)),
    "3x3 stride 2": Window((3, 3), (2, 2)),
    "1x1 stride 2": Window((1, 1), (2, 2)),
    "7x7 stride 2": Window((7, 7), (2, 2)),
    "3x3 dilation 2": Window((3, 3), (1, 1), (2, 2)),
    "1x3": Window((1, 3)),
    "3x1 stride 1x2": Window((3, 1), (1, 2)),
    "2x2 stride 2": Window((2, 2), (2, 2)),
}


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(target, window) -> None:
    rng = np.random.default_rng(1)
    for t in INTEGER:
        case = make(
            rng,
            batch=2,
            height=11,
            width=13,
            c=16,
            n=32,
            window=window,
            pattern=t.pattern,
            add="int8",
            activation=Activation("Relu"),
        )
        check(case, t, target)
        check(replace(case, x_gap=16), t, target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("c", [1, 2, 3, 5, 7])
def test_few_input_channels(target, c) -> None:
    case = make(np.random.default_rng(c), height=9, width=9, c=c, n=16)
    check(case, tactic("dense"), target)


@pytest.mark.parametrize("add", ["", "int8", "float32"])
@pytest.mark.parametrize("out", ["int8", "float32"])
@pytest.mark.parametrize("activation", ["", "Relu", "Clip", "HardSwish"])
def test_epilogues(add, out, activation) -> None:
    bounds = (-11.5, 40.25) if activation == "Clip" else ()
    rng = np.random.default_rng(2)
    for zero in (0, 3, 128, 255):
        case = make(
            rng,
            c=16,
            n=48,
            add=add,
            out=out,
            activation=Activation(activation, *bounds),
            y_zero=zero,
            x_zero=zero,
            pattern="2:4",
        )
        for name in ("dense", "2:4 H"):
            check(case, tactic(name), TARGETS[0])


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("out", ["int8", "float32"])
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in CLAMPS])
def test_activations(name, out, target) -> None:
    """Bit for bit, also where the last block of channels is not full."""
    rng = np.random.default_rng(6)
    for n, add in ((16, ""), (20, "int8")):
        case = make(rng, c=16, n=n, add=add, out=out, activation=Activation(name), y_zero=40)
        assert len(np.unique(case.expected())) > 20
        check(case, tactic("dense"), target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
def test_activations_of_float_sums(target) -> None:
    """The slope of an activation is at most 1.13, so errors of the sums hardly grow."""
    rng = np.random.default_rng(7)
    t = tactic("dense", "float32")
    for name in (*PLAIN, "Clip"):
        bounds = (-0.5, 6.0) if name == "Clip" else ()
        activation = Activation(name, *bounds)
        case = make(rng, c=16, n=20, dtype="float32", add="float32", activation=activation)
        for got in run(case, options_for(t, case.problem(), target.isa)[:1], target):
            assert (np.abs(got - case.expected()) <= 1.13 * float_bound(case) + 1e-6).all()


def test_results_far_outside_the_range_saturate() -> None:
    case = make(np.random.default_rng(3), c=16, n=16)
    for factor in (1e6, 1e30):
        epilogue = replace(case.epilogue, scale=case.epilogue.scale * np.float32(factor))
        check(replace(case, epilogue=epilogue), tactic("dense"), TARGETS[0])


def test_ties_round_to_even() -> None:
    """Sums of one weight 1 with scale 0.5 lie halfway between two integers for every odd input."""
    x = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)
    for zero in (7, 8):
        epilogue = Epilogue(
            np.full(16, 0.5, np.float32), np.zeros(16, np.float32), zero_point=zero, unsigned=True
        ).in_stored_steps()
        check(
            Case(x, np.ones((16, 1, 1, 1), np.int8), epilogue, Window((1, 1)), x_zero=0),
            tactic("dense"),
            TARGETS[0],
        )


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize(
    ("groups", "c", "n"), [(2, 32, 32), (4, 16, 64), (8, 32, 32), (2, 8, 8), (32, 128, 128)]
)
def test_groups(target, groups, c, n) -> None:
    case = make(np.random.default_rng(groups), height=6, width=6, c=c, n=n, groups=groups)
    expected = case.expected()
    w, merged = merge_groups(case.w, groups)
    wide = replace(case, w=w, groups=merged)
    assert (wide.expected() == expected).all()
    check(wide, tactic("dense"), target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("name", ["dense", "2:4"])
def test_floats(target, name) -> None:
    t = tactic(name, "float32")
    rng = np.random.default_rng(4)
    for size in (
        {"c": 16, "n": 16},
        {"c": 20, "n": 33},
        {"c": 64, "n": 32, "add": "float32", "activation": Activation("Relu")},
    ):
        for window in (Window((3, 3)), Window((1, 1), (2, 2)), Window((3, 3), (1, 1), (2, 2))):
            case = make(
                rng, height=9, width=7, window=window, dtype="float32", pattern=t.pattern, **size
            )
            if reason := t.refuse(case.problem(), case.w, target.isa):
                assert "AVX-512" in reason
                assert target.isa != "avx512vnni"
                continue
            options = options_for(t, case.problem(), target.isa)
            for got in run(case, options, target):
                assert (np.abs(got - case.expected()) <= float_bound(case)).all()


@pytest.mark.parametrize("t", INTEGER, ids=lambda t: t.name)
def test_any_division_of_the_work_gives_the_same_bytes(t) -> None:
    case = make(
        np.random.default_rng(5), height=20, width=9, c=16, n=64, pattern=t.pattern, add="int8"
    )
    options = options_for(t, case.problem(), TARGETS[0].isa)
    whole = run(case, options, TARGETS[0])
    for parts in (2, 3, 7):
        for one, other in zip(whole, run(case, options, TARGETS[0], parts), strict=True):
            assert (one == other).all()


def test_all_instruction_sets_agree() -> None:
    for t in INTEGER:
        case = make(
            np.random.default_rng(6), height=10, width=10, c=24, n=32, pattern=t.pattern, add="int8"
        )
        results = [run(case, [(t, t.configs(case.problem(), g.isa)[0])], g)[0] for g in TARGETS]
        assert all((r == results[0]).all() for r in results)


def test_sparse_tactics_refuse_with_the_place() -> None:
    case = make(np.random.default_rng(7), c=16, n=32)
    for t in INTEGER:
        reason = t.refuse(case.problem(), case.w, TARGETS[0].isa)
        assert bool(reason) == bool(t.pattern)
        assert not t.pattern or "output channel 0" in reason


@pytest.mark.parametrize("n", [16, 17, 24, 31, 48, 56])
def test_pair_needs_whole_blocks_of_32(n) -> None:
    """A last incomplete block is free 2:4 by definition: its channels do not share their masks."""
    case = make(np.random.default_rng(8), c=16, n=n, pattern="2:4/pair")
    reason = tactic("2:4 pair").refuse(case.problem(), case.w, TARGETS[0].isa)
    assert f"blocks of 32 output channels: this layer has {n}" in reason
    check(case, tactic("2:4 H"), TARGETS[0])


def test_four_of_eight_runs_in_format_h_only() -> None:
    case = make(np.random.default_rng(9), c=16, n=32, pattern="4:8")
    check(case, tactic("2:4 H"), TARGETS[0])
    assert tactic("2:4 C").refuse(case.problem(), case.w, TARGETS[0].isa)


def test_four_of_eight_floats() -> None:
    """A step of the float kernel keeps 8 of 16 inputs, wherever they lie."""
    case = make(np.random.default_rng(9), c=32, n=32, pattern="4:8", dtype="float32")
    assert is_pattern(case.w, "4:8")
    assert not is_pattern(case.w, "2:4")
    t = tactic("2:4", "float32")
    if TARGETS[0].isa != "avx512vnni":
        assert t.refuse(case.problem(), case.w, TARGETS[0].isa)
        return
    assert not t.refuse(case.problem(), case.w, TARGETS[0].isa)
    (got,) = run(case, [(t, t.configs(case.problem(), TARGETS[0].isa)[0])], TARGETS[0])
    assert (np.abs(got - case.expected()) <= float_bound(case)).all()


def test_flattening_keeps_problems_with_gaps() -> None:
    dense, gap = Strides(64, 16, 4), Strides(80, 20, 4)
    problem = ConvProblem(2, 4, 4, 4, 4, "int8", dense, dense, "int8")
    assert problem.flattened().out_h == 32
    assert replace(problem, x=gap).flattened().out_h == 4
    assert replace(problem, stride=(2, 2)).flattened().out_h == 4


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("add", ["", "int8", "float32"])
def test_results_beyond_int32_saturate(target, add: str) -> None:
    """Scales so large that a sum leaves int32 before it is rounded, on either side."""
    base = make(np.random.default_rng(3), n=32, c=16, add=add)
    epilogue = replace(base.epilogue, scale=np.full(32, 3e7, np.float32))
    case = replace(base, epilogue=epilogue)
    assert set(np.unique(case.expected())) >= {0, 255}
    check(case, tactic("dense"), target)


@pytest.mark.parametrize("target", TARGETS, **IDS)
@pytest.mark.parametrize("y_zero", [0, 1, 127, 128, 255])
@pytest.mark.parametrize(
    "activation", [Activation(""), Activation("Relu"), Activation("Silu")], **IDS
)
def test_bounded_results_are_the_same(target, y_zero: int, activation: Activation) -> None:
    """What is known to fit int32 takes a shorter way to the same bytes."""
    case = make(
        np.random.default_rng(4), n=48, c=16, add="int8", activation=activation, y_zero=y_zero
    )
    check(replace(case, bounded=True), tactic("dense"), target)
