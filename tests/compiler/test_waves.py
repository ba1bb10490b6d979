"""Which operators wait for each other: waves keep every order that matters, and are few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twofour.compiler.waves import Span, Use, waves


def use(reads: str = "", writes: str = "", *, alone: bool = False) -> Use:
    return Use(tuple(map(Span, reads)), tuple(map(Span, writes)), alone)


def test_branches_go_along_with_each_other_as_late_as_can_be() -> None:
    """a -> b -> c -> d and a -> e, both joined."""
    ops = [use("", "a"), use("a", "b"), use("a", "e"), use("b", "c"), use("c", "d"), use("de", "y")]
    assert waves(ops) == [0, 1, 3, 2, 3, 4]


def test_one_chain_stays_as_it_is() -> None:
    assert waves([use("x", "a"), use("a", "b"), use("b", "c")]) == [0, 1, 2]
    assert waves([]) == []


def test_what_is_read_is_not_overwritten_before() -> None:
    assert waves([use("x", "a"), use("a", "y"), use("z", "a"), use("a", "w")]) == [0, 1, 2, 3]


def test_channels_that_do_not_meet_do_not_wait() -> None:
    left, right, both = Span("a", 0, 8), Span("a", 8, 16), Span("a")
    ops = [Use((), (left,)), Use((), (right,)), Use((both,), (Span("y"),)), Use((left,), ())]
    assert waves(ops) == [0, 0, 1, 1]


def test_what_touches_more_is_alone() -> None:
    ops = [use("x", "a"), use("x", "b"), use("x", "c", alone=True), use("x", "d"), use("x", "e")]
    assert waves(ops) == [0, 0, 1, 2, 2]


SPANS = st.builds(
    lambda holder, first, size: Span(holder, first, first + size),
    st.sampled_from("abcd"),
    st.integers(0, 6),
    st.integers(1, 4),
)
USES = st.builds(
    lambda reads, writes, alone: Use(tuple(reads), tuple(writes), alone == 0),
    st.lists(SPANS, max_size=3),
    st.lists(SPANS, max_size=2),
    st.integers(0, 9),
)


@given(st.lists(USES, max_size=12))
def test_operators_that_conflict_are_in_order(ops: list[Use]) -> None:
    numbers = waves(ops)
    for later, use_later in enumerate(ops):
        for earlier, use_earlier in enumerate(ops[:later]):
            touched = (*use_later.reads, *use_later.writes)
            clash = any(
                a.holder == b.holder and a.meets(b) for a in use_earlier.writes for b in touched
            )
            clash |= any(
                a.holder == b.holder and a.meets(b)
                for a in use_earlier.reads
                for b in use_later.writes
            )
            if clash or use_earlier.alone or use_later.alone:
                assert numbers[earlier] < numbers[later]
    assert not numbers or set(numbers) == set(range(max(numbers) + 1)), "a wave is empty"
