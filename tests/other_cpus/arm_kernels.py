"""Kernels of AArch64 against their definition: run there by test_kernels.py, not collected here.

Tactics x instruction sets x configurations x sizes around tiles, registers and tables x data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import Case, make, run, tactic, targets
from twofour.core.numerics import Epilogue, Window
from twofour.core.target import Target
from twofour.kernels.cpu.tactic import Tactic

TARGETS = targets()
NAMES = ("dense sdot", "2:4 tbl", "2:4 pair tbl", "2:4 quad tbl")
PATTERNS = dict(zip(NAMES, ("", "2:4", "2:4/pair", "2:4"), strict=True))


def with_quads(case: Case) -> Case:
    """The same with one mask for each 4 neighbouring output channels: that of the first."""
    mask = (case.w != 0).reshape(-1, 4, *case.w.shape[1:])[:, :1]
    w = np.random.default_rng(9).integers(-128, 128, case.w.shape).astype(np.int8)
    kept = np.broadcast_to(mask, (mask.shape[0], 4, *mask.shape[2:])).reshape(w.shape)
    return replace(case, w=np.where(kept, w, np.int8(0)))


def case_of(t: Tactic, rng: np.random.Generator, **sizes: object) -> Case:
    case = make(rng, pattern=PATTERNS[t.name], **sizes)
    return with_quads(case) if "quad" in t.name else case


def check(case: Case, t: Tactic, target: Target) -> None:
    problem = case.problem()
    assert t.refuse(problem, case.w, target.isa) == ""
    configs = t.configs(problem, target.isa)[:2]
    expected = case.expected()
    for config, got in zip(configs, run(case, [(t, c) for c in configs], target), strict=True):
        wrong = np.argwhere(got != expected)
        assert wrong.size == 0, f"{t.name} {config}: {len(wrong)} wrong, first {wrong[0]}"


def test_this_is_a_machine_with_dot_products() -> None:
    assert [target.isa for target in TARGETS] == ["dotprod", "vector"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 4, 7])
def test_sizes_around_tiles_and_tables(name, m) -> None:
    rng = np.random.default_rng(m)
    for n, k in ((32, 8), (96, 40)):
        shape = {"height": m, "width": 1, "c": k, "n": n, "window": Window((1, 1))}
        check(case_of(tactic(name), rng, **shape), tactic(name), TARGETS[0])


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("n", [1, 17])
def test_outputs_that_do_not_fill_the_last_block(name, n) -> None:
    rng = np.random.default_rng(n)
    case = case_of(tactic(name), rng, height=3, width=3, c=12, n=n, add="int8")
    check(replace(case, y_gap=3), tactic(name), TARGETS[0])


@pytest.mark.parametrize("name", NAMES)
def test_windows(name) -> None:
    rng = np.random.default_rng(1)
    for window, gap in ((Window((3, 3), (2, 2)), 0), (Window((3, 3), (1, 1), (2, 2)), 16)):
        shape = {"batch": 2, "height": 6, "width": 6, "c": 16, "n": 32, "add": "int8"}
        case = case_of(tactic(name), rng, window=window, **shape)
        check(replace(case, x_gap=gap), tactic(name), TARGETS[0])


def test_few_input_channels() -> None:
    for c in (1, 3, 7):
        case = make(np.random.default_rng(c), height=9, width=9, c=c, n=16)
        check(case, tactic("dense sdot"), TARGETS[0])


@pytest.mark.parametrize("name", NAMES)
def test_long_sums_of_extreme_values(name) -> None:
    """K = 4096, all weights -128 or 127, all inputs 0 or 255, zero points at both ends."""
    shape = {"height": 2, "width": 1, "c": 4096, "n": 32, "window": Window((1, 1))}
    base = case_of(tactic(name), np.random.default_rng(0), **shape)
    kept = base.w != 0
    ends = ((0, -128, 0), (255, 127, 0), (255, -128, 255), (0, 127, 255), (255, 127, 128))
    for x, w, zero in ends:
        scale = np.full(32, 1 / (255 * 128), np.float32)
        epilogue = Epilogue(scale, base.epilogue.bias, zero_point=zero, unsigned=True)
        case = replace(
            base,
            x=np.full_like(base.x, x),
            w=np.where(kept, w, 0).astype(np.int8),
            epilogue=epilogue.in_stored_steps(),
            x_zero=zero,
        )
        check(case, tactic(name), TARGETS[0])


def test_quads_are_refused_with_the_place() -> None:
    t = tactic("2:4 quad tbl")
    free = make(np.random.default_rng(0), height=2, width=1, c=32, n=32, pattern="2:4",
                window=Window((1, 1)))  # fmt: skip
    reason = t.refuse(free.problem(), free.w, "dotprod")
    assert "4 neighbouring output channels must share a mask" in reason
    assert "nonzeros" in reason
    uneven = make(np.random.default_rng(0), c=16, n=30, pattern="2:4")
    assert "this layer has 30" in t.refuse(uneven.problem(), uneven.w, "dotprod")


def test_portable_operations() -> None:
    """Of the path for AArch64 without dot products."""
    rng = np.random.default_rng(3)
    for name in ("dense", "2:4 H", "2:4 C"):
        shape = {"height": 2, "width": 1, "c": 24, "n": 20, "window": Window((1, 1))}
        case = make(rng, pattern=tactic(name).pattern, **shape)
        check(case, tactic(name), TARGETS[1])
