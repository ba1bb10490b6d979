"""What changed between two looks, and a watcher that goes on when the repository does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.layout import EMPTY, ModelEntry, Snapshot, VersionEntry
from twofour.serve.repository.watch import Change, Kind, compare

Plain = dict[str, tuple[str, dict[int, str]]]
PLAIN = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(
        st.sampled_from("xy"),
        st.dictionaries(st.integers(1, 3), st.sampled_from("xy"), max_size=3),
    ),
    max_size=3,
)


def snapshot(plain: Plain) -> Snapshot:
    models = {}
    for name, (tag, versions) in plain.items():
        entries = {n: VersionEntry(name, n, (), (), t) for n, t in versions.items()}
        models[name] = ModelEntry(name, ModelConfig(), "", entries, (), (), tag)
    return Snapshot(models, {})


def flat(plain: Plain) -> dict[tuple[str, int], str]:
    tags = {(name, 0): tag for name, (tag, _) in plain.items()}
    return tags | {(name, n): t for name, (_, vs) in plain.items() for n, t in vs.items()}


@given(PLAIN, PLAIN)
def test_changes_lead_from_one_to_the_other(before: Plain, after: Plain) -> None:
    state, goal = flat(before), flat(after)
    changes = compare(snapshot(before), snapshot(after))
    assert list(changes) == sorted(changes)
    assert len({(c.model, c.version) for c in changes}) == len(changes)
    for change in changes:
        place = (change.model, change.version)
        assert (place in state) == (change.kind is not Kind.added)
        assert (place in goal) == (change.kind is not Kind.removed)
        assert state.pop(place, None) != goal.get(place)
        if place in goal:
            state[place] = goal[place]
    assert state == goal


@given(PLAIN)
def test_nothing_changes_where_nothing_did(plain: Plain) -> None:
    assert compare(snapshot(plain), snapshot(plain)) == ()


def test_a_new_model_and_its_versions_are_changes_of_their_own() -> None:
    after = snapshot({"a": ("x", {2: "x"})})
    assert compare(EMPTY, after) == (Change("a", 0, Kind.added), Change("a", 2, Kind.added))
    assert compare(after, EMPTY) == (Change("a", 0, Kind.removed), Change("a", 2, Kind.removed))
