"""Sizes: polynomials that are what arithmetic on their values says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twofour.core.sizes import (
    Size,
    Symbol,
    most,
    open_size,
    product,
    symbol_size,
    usual,
    value,
    written,
)

SYMBOLS = (Symbol("batch", 1, 2, 8), Symbol("length", 3, 16, 40))
BATCH, LENGTH = (symbol_size(SYMBOLS, i) for i in range(2))
POINTS = ((1, 3), (2, 16), (8, 40), (5, 7))

counts = st.recursive(
    st.integers(-5, 5) | st.sampled_from([BATCH, LENGTH]),
    lambda inner: st.tuples(st.sampled_from("+*"), inner, inner),
    max_leaves=6,
)


def computed(tree, leaf):
    """The tree with each leaf replaced by leaf(it)."""
    if not isinstance(tree, tuple):
        return leaf(tree)
    a, b = (computed(part, leaf) for part in tree[1:])
    return a + b if tree[0] == "+" else a * b


@given(counts)
def test_arithmetic_is_that_of_the_values(tree) -> None:
    count = computed(tree, lambda leaf: leaf)
    for point in POINTS:
        want = computed(tree, lambda leaf, at=point: value(leaf, at))
        assert value(count, point) == want
    assert usual(count) == value(count, (2, 16))
    assert most(count) == value(count, (8, 40))
    if isinstance(count, Size):  # else no symbol is left, and it is a number
        assert any(any(powers) for _, *powers in count.terms)
        assert all(factor for factor, *_ in count.terms)


def test_equal_sizes_are_equal_however_they_were_made() -> None:
    assert (BATCH + 1) * LENGTH == LENGTH + LENGTH * BATCH
    assert BATCH * 2 != BATCH
    assert BATCH + -1 * BATCH == 0
    assert {BATCH * LENGTH: 1}[LENGTH * BATCH] == 1
    assert symbol_size((Symbol("batch", 1, 1, 3), SYMBOLS[1]), 0) == BATCH  # ranges do not count


def test_products_and_text() -> None:
    assert product([]) == 1
    assert product([2, BATCH, 3]) == BATCH * 6
    assert open_size(4) is None
    assert open_size(BATCH) is BATCH
    assert written(BATCH * LENGTH * 2 + 7, SYMBOLS) == "2*batch*length + 7"
    assert written(BATCH * BATCH + LENGTH, SYMBOLS) == "batch*batch + length"
