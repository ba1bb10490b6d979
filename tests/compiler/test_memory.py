"""The arena: tensors alive together never share bytes, but for a residual that is written over."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.compiler.layout import ALIGNMENT, Tensor
from twofour.compiler.memory import Life, plan
from twofour.core.abi import SLACK_BYTES

HALOS = [(0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)]


def tensor(index: int, side: int, channels: int, kind: str, halo, fill: int) -> Tensor:
    return Tensor(f"t{index}", 1, side, side, channels, kind, fill, list(halo))


@st.composite
def scenes(draw) -> tuple[list[Tensor], dict[str, Life]]:
    """Tensors of few layouts, so that slots are shared, with lives in a short program."""
    count = draw(st.integers(1, 14))
    layouts = st.tuples(
        st.sampled_from([1, 3, 8]),
        st.sampled_from([1, 16]),
        st.sampled_from(["u8", "float32"]),
        st.sampled_from(HALOS),
        st.sampled_from([0, 128]),
    )
    tensors = [tensor(i, *draw(layouts)) for i in range(count)]
    lives: dict[str, Life] = {}
    for one in tensors:
        first = draw(st.integers(0, 10))
        # What it may write over: a tensor whose last reader is the one that writes this.
        ending = [name for name, life in lives.items() if life.last == first]
        replaces = draw(st.sampled_from(["", *ending]))
        lives[one.name] = Life(first, first + draw(st.integers(0, 5)), replaces)
    return tensors, lives


def together(a: Life, b: Life) -> bool:
    return a.first <= b.last and b.first <= a.last


def in_place(new: Tensor, old: Tensor, lives: dict[str, Life]) -> bool:
    """Allowed sharing: the residual's last reader writes the new tensor, form and place equal."""
    allowed = lives[new.name].replaces == old.name and lives[old.name].last == lives[new.name].first
    return allowed and new.layout == old.layout and new.offset == old.offset


@settings(max_examples=300, deadline=None)
@given(scenes())
def test_tensors_alive_together_do_not_overlap(scene) -> None:
    tensors, lives = scene
    end, _ = plan(tensors, lives)
    for one in tensors:
        assert one.offset >= 0
        assert one.offset % ALIGNMENT == 0
        assert one.offset + one.size_bytes + SLACK_BYTES <= end
    for a, b in combinations(tensors, 2):
        apart = a.offset + a.size_bytes <= b.offset or b.offset + b.size_bytes <= a.offset
        if together(lives[a.name], lives[b.name]) and not apart:
            assert in_place(a, b, lives) or in_place(b, a, lives), (a, b)


@settings(max_examples=300, deadline=None)
@given(scenes())
def test_halo_bytes_belong_to_equal_layouts_alone(scene) -> None:
    """Set once when a session starts, so nobody else may ever write there, alive or not."""
    tensors, lives = scene
    _, fills = plan(tensors, lives)
    spans = {(f.offset, f.offset + f.size_bytes): f.value for f in fills}
    assert len(spans) == len(fills)
    for one in tensors:
        span = one.offset, one.offset + one.size_bytes
        if any(one.halo):
            assert spans[span] == one.fill
        for begin, end in spans:
            assert span == (begin, end) or span[1] <= begin or span[0] >= end
    for a, b in combinations(tensors, 2):
        if a.offset == b.offset and any(a.halo):
            assert a.layout == b.layout


def chain(sizes: list[int]) -> tuple[list[Tensor], dict[str, Life]]:
    """Each operator reads one tensor and writes the next."""
    tensors = [Tensor(f"t{i}", 1, 1, 1, size, "u8") for i, size in enumerate(sizes)]
    return tensors, {t.name: Life(i, i + 1) for i, t in enumerate(tensors)}


def test_a_chain_needs_two_buffers() -> None:
    tensors, lives = chain([1000] * 10)
    end, fills = plan(tensors, lives)
    assert fills == ()
    assert len({t.offset for t in tensors}) == 2
    assert end < 2 * 1100 + SLACK_BYTES


def test_slots_with_halos_are_used_again() -> None:
    tensors = [tensor(i, 8, 16, "u8", (1, 1, 1, 1), 128) for i in range(10)]
    lives = {t.name: Life(i, i + 1) for i, t in enumerate(tensors)}
    _, fills = plan(tensors, lives)
    assert len(fills) == 2


def test_a_residual_is_written_over_in_place() -> None:
    for halo in HALOS[1:3]:
        tensors = [tensor(i, 8, 16, "u8", halo, 128) for i in range(3)]
        lives = {"t0": Life(0, 2), "t1": Life(1, 2), "t2": Life(2, 3, "t0")}
        plan(tensors, lives)
        assert tensors[2].offset == tensors[0].offset != tensors[1].offset
        lives["t0"] = Life(0, 3)  # still read afterwards
        plan(tensors, lives)
        assert tensors[2].offset != tensors[0].offset


def test_nothing_needs_nothing_but_the_slack() -> None:
    assert plan([], {}) == (SLACK_BYTES, ())
