"""Buffers in one arena: those in use together never share a byte, and none is placed twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twofour.compiler.cuda.arena import Life, place, rounded
from twofour.core.cuda_program import ALIGNMENT

LIVES = st.lists(
    st.builds(
        lambda size, first, length: Life(size, first, first + length),
        st.integers(0, 5000),
        st.integers(-1, 20),
        st.integers(0, 8),
    ),
    min_size=1,
    max_size=30,
)


@given(LIVES)
def test_buffers_that_are_in_use_together_lie_apart(found: list[Life]) -> None:
    lives = {str(i): life for i, life in enumerate(found)}
    offsets, size = place(lives)
    assert set(offsets) == set(lives)
    for name, life in lives.items():
        assert offsets[name] % ALIGNMENT == 0
        assert 0 <= offsets[name]
        assert offsets[name] + life.size_bytes <= size
        for other, second in lives.items():
            together = life.first <= second.last and second.first <= life.last
            if other != name and together:
                ends = [offsets[n] + rounded(lives[n].size_bytes) for n in (name, other)]
                assert ends[0] <= offsets[other] or ends[1] <= offsets[name]


def test_buffers_that_are_never_in_use_together_share_bytes() -> None:
    lives = {"a": Life(1000, 0, 1), "b": Life(900, 2, 3), "c": Life(800, 4, 5)}
    offsets, size = place(lives)
    assert set(offsets.values()) == {0}
    assert size == rounded(1000)
