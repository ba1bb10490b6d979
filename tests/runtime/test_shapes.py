"""Which profile takes which shapes, and what is said of those that none takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sample_engines import open_engine, sample_engine
from twofour.core.errors import InputError
from twofour.core.sizes import Symbol, symbol_size
from twofour.engine import TensorInfo
from twofour.runtime.shapes import bind, shape_text

PLAN = open_engine().plan


def two_inputs():
    """A plan of two inputs with the same batch and length, and one of fixed shapes."""
    symbols = (Symbol("batch", 1, 2, 8), Symbol("length", 2, 16, 40))
    batch, length = (symbol_size(symbols, i) for i in range(2))
    inputs = (
        TensorInfo.of("ids", "int64", (batch, length)),
        TensorInfo.of("mask", "float32", (batch, 1, length)),
    )
    outputs = (TensorInfo.of("y", "float32", (batch * (length + 1), 3)),)
    first = replace(PLAN.profiles[0], inputs=inputs, outputs=outputs, boundary=(), symbols=symbols)
    fixed = replace(
        first,
        inputs=(TensorInfo("ids", "int64", (9, 64)), TensorInfo("mask", "float32", (9, 1, 64))),
        outputs=(TensorInfo("y", "float32", (9 * 65, 3)),),
        symbols=(),
    )
    return replace(PLAN, profiles=(first, fixed))


def test_symbols_take_the_values_of_the_inputs() -> None:
    bound = bind(two_inputs(), {"ids": (3, 7), "mask": (3, 1, 7)})
    assert (bound.profile, bound.values) == (0, (3, 7))
    assert bound.shapes["y"] == (24, 3)


def test_the_first_profile_that_fits_is_taken() -> None:
    plan = two_inputs()
    shapes = {"ids": (9, 64), "mask": (9, 1, 64)}
    assert bind(plan, shapes).profile == 1
    assert bind(plan, shapes).shapes["y"] == (585, 3)
    turned = replace(plan, profiles=plan.profiles[::-1])
    assert bind(turned, {"ids": (8, 40), "mask": (8, 1, 40)}).profile == 1


@pytest.mark.parametrize(
    ("ids", "mask", "reason"),
    [
        ((9, 7), (9, 1, 7), r"ids\[0\]: expected batch from 1 to 8, got 9"),
        ((3, 1), (3, 1, 1), r"ids\[1\]: expected length from 2 to 40, got 1"),
        ((3, 41), (3, 1, 41), r"ids\[1\]: expected length from 2 to 40, got 41"),
        ((3, 7), (4, 1, 7), r"mask\[0\]: batch is 3 in ids\[0\], got 4"),
        ((3, 7), (3, 1, 8), r"mask\[2\]: length is 7 in ids\[1\], got 8"),
        ((3, 7), (3, 2, 7), r"mask\[1\]: expected 1, got 2"),
        ((3, 7, 1), (3, 1, 7), "ids: expected 2 dimensions, got 3"),
    ],
)
def test_what_fits_nowhere_is_told_the_ranges_and_the_dimension(ids, mask, reason) -> None:
    plan = two_inputs()
    with pytest.raises(InputError, match=reason) as caught:
        bind(plan, {"ids": ids, "mask": mask})
    text = str(caught.value)
    assert "profile 1 takes ids int64 [batch 1-8, length 2-40], mask float32 [batch 1-8, 1" in text
    assert "profile 2 takes ids int64 [9, 64], mask float32 [9, 1, 64]" in text
    assert f"got ids {list(ids)}, mask {list(mask)}" in text


def test_one_profile_needs_no_number() -> None:
    with pytest.raises(InputError, match="do not fit the engine") as caught:
        bind(sample_engine().plan, {"x": (2, 3, 32, 32)})
    assert "expected x float32 [1, 3, 32, 32]" in str(caught.value)
    assert "profile" not in str(caught.value)
    assert "--shapes x:2x3x32x32" in caught.value.fix


def test_sizes_in_words() -> None:
    plan = two_inputs()
    assert shape_text(plan.outputs[0], plan.profiles[0]) == "[batch*length + batch, 3]"
