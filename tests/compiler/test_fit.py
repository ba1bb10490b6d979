"""Numbers at a few shapes become the size that they are, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.compiler.fit import Fit, Irregular
from twofour.core.sizes import Symbol, symbol_size, value

SYMBOLS = (Symbol("batch", 1, 2, 8), Symbol("length", 1, 16, 512), Symbol("heads", 1, 1, 2))
FIT = Fit.of(SYMBOLS)


def test_points_are_the_largest_one_for_each_symbol_and_one_where_all_differ() -> None:
    assert FIT.points == ((8, 512, 2), (7, 512, 2), (8, 511, 2), (8, 512, 3), (6, 510, 4))
    assert all(min(point) > 1 for point in Fit.of([Symbol("s", 1, 1, n) for n in (2, 3, 4)]).points)


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 5)), min_size=3, max_size=3),
    st.lists(st.integers(1, 600), min_size=3, max_size=3),
)
def test_products_are_found(scale, factors, point) -> None:
    def number(at):
        total = scale
        for symbol, (there, plus) in zip(at, factors, strict=True):
            total *= symbol + plus if there else 1
        return total

    found = FIT.count([number(at) for at in FIT.points])
    assert value(found, point) == number(point)
    if not any(there for there, _ in factors):
        assert found == scale


@pytest.mark.parametrize(
    "values",
    [
        [at[0] + at[1] for at in FIT.points],
        [at[1] // 2 for at in FIT.points],
        [at[1] ** 2 for at in FIT.points],
        [0, 0, 1, 0, 2],
        [5, 5, 5, 5, 6],
    ],
    ids=["sum", "half", "square", "zero at the largest", "late change"],
)
def test_others_are_refused(values) -> None:
    with pytest.raises(Irregular):
        FIT.count(values)


def test_what_does_not_change_is_a_number() -> None:
    assert FIT.count([7] * 5) == 7
    assert FIT.count([at[0] for at in FIT.points]) == symbol_size(SYMBOLS, 0)
