"""What is promoted is what config.yaml serves; going back, shares, and two who promote at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.registry.shelves import Shelf
from tests.serve.repository.sites import KINDS, engine_bytes, site
from twofour.core.errors import InputError
from twofour.registry import promote as promotion
from twofour.registry.catalog import catalog
from twofour.registry.diff import diff
from twofour.registry.history import read_history
from twofour.registry.places import open_place
from twofour.registry.promote import PromoteOptions, Promotion, promote, rollback
from twofour.serve.models.traffic import parts


@pytest.fixture(params=KINDS)
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    found = site(request.param, tmp_path, lambda: request.getfixturevalue("endpoint"))
    return filled(Shelf(found, tmp_path))


@pytest.fixture
def local(tmp_path: Path) -> Shelf:
    return filled(Shelf(site("local", tmp_path, str), tmp_path))


def filled(shelf: Shelf) -> Shelf:
    """Three versions."""
    for seed in range(3):
        shelf.publish(seed)
    return shelf


def to(shelf: Shelf, version: int, share: float = 100.0) -> Promotion:
    options = PromoteOptions(share, "a word", "me@here", shelf.site.options)
    return promote(shelf.site.location, "net", version, options)


def back(shelf: Shelf) -> Promotion:
    return rollback(shelf.site.location, "net", PromoteOptions(storage=shelf.site.options))


def served(shelf: Shelf) -> dict[int, float]:
    """Version -> share, as a server takes it from the repository."""
    model = shelf.snapshot().models["net"]
    assert model.config is not None, model.problem
    chosen = model.config.versions.choose(list(model.versions))
    shares = parts(chosen, model.config.traffic)
    return {n: round(share / sum(shares.values()), 4) for n, share in shares.items()}


def test_promotions_and_the_way_back(shelf: Shelf) -> None:
    assert served(shelf) == {3: 1}  # the newest, as long as nobody has promoted any
    assert to(shelf, 1).event.before == {"3": 100.0}
    assert served(shelf) == {1: 1}
    shelf.publish(7)
    assert served(shelf) == {1: 1}
    to(shelf, 2)
    to(shelf, 3, 10)
    assert served(shelf) == {2: 0.9, 3: 0.1}
    to(shelf, 3, 50)
    assert served(shelf) == {2: 0.5, 3: 0.5}
    to(shelf, 3)
    assert served(shelf) == {3: 1}
    assert back(shelf).event.version == 2
    assert served(shelf) == {2: 1}
    assert back(shelf).event.version == 1
    assert back(shelf).event.version == 3  # which was served before anything was promoted
    with pytest.raises(InputError, match="cannot be rolled back"):
        back(shelf)
    place = open_place(shelf.site.location, shelf.site.options)
    events = [each for each in read_history(place, "net").events if each.action != "publish"]
    assert [each.action for each in events] == ["promote"] * 5 + ["rollback"] * 3
    assert {each.by for each in events[:5]} == {"me@here"}
    assert not shelf.snapshot().refused


def test_a_share_that_did_not_pay_is_taken_back(local: Shelf) -> None:
    to(local, 1)
    to(local, 2, 25)
    assert back(local).event.serves == {"1": 100.0}
    assert served(local) == {1: 1}


def test_the_others_keep_their_shares_among_themselves(local: Shelf) -> None:
    to(local, 1)
    to(local, 2, 20)
    to(local, 3, 10)
    assert served(local) == {1: 0.72, 2: 0.18, 3: 0.1}
    to(local, 2, 50)
    assert served(local) == {1: 0.439, 2: 0.5, 3: 0.061}


def test_what_is_promoted_already_is_not_promoted_again(local: Shelf) -> None:
    assert to(local, 1).changed
    before = local.contents()
    assert not to(local, 1).changed
    assert local.contents() == before


def test_the_newest_is_pinned_though_it_is_served(local: Shelf) -> None:
    assert to(local, 3).changed
    local.publish(9)
    assert served(local) == {3: 1}


def test_what_the_user_wrote_stays(local: Shelf) -> None:
    text = "# ours\nversions: {latest: 2}  # two\nlabels: {y: [cat]}\ntraffic: {shadow: 2}\n"
    local.site.put("net/config.yaml", text.encode())
    to(local, 1)
    after = local.contents()["config.yaml"].decode()
    assert after == text.replace("{latest: 2}", "{specific: [1, 2]}")  # the shadow is computed on
    assert served(local) == {1: 1}
    to(local, 3, 50)
    back(local)
    assert served(local) == {1: 1}
    assert "# two" in local.contents()["config.yaml"].decode()


def test_a_change_by_hand_is_seen_and_can_be_taken_back(local: Shelf) -> None:
    to(local, 1)
    to(local, 2)
    local.site.put("net/config.yaml", b"versions: {specific: [3]}\n")
    found = back(local)
    assert (found.event.before, found.event.serves) == ({"3": 100.0}, {"2": 100.0})


def test_a_version_that_was_removed_is_passed_over(local: Shelf) -> None:
    for version in (1, 2, 3):
        to(local, version)
    local.site.remove("net/2")
    assert back(local).event.version == 1


@pytest.mark.parametrize("share", [0.0, -1.0, 100.5, float("nan")])
def test_shares_that_cannot_be(local: Shelf, share: float) -> None:
    with pytest.raises(InputError, match="share"):
        to(local, 1, share)


def test_what_cannot_be_promoted_changes_nothing(local: Shelf) -> None:
    local.site.put("net/8/labels.txt", b"")
    local.site.put("bare/1/a.engine", engine_bytes())
    (Path(local.site.location) / "net" / "2" / "labels.txt").unlink()
    before = local.contents()
    with pytest.raises(InputError, match="no version 5"):
        to(local, 5)
    with pytest.raises(InputError, match="not what was published"):
        to(local, 2)
    with pytest.raises(InputError, match="no version of model 'nothing'"):
        promote(local.site.location, "nothing", 1)
    with pytest.raises(InputError, match="can be no model"):
        promote(local.site.location, "../net", 1)
    local.site.put("net/config.yaml", b"batchin: 3\n")
    with pytest.raises(InputError, match="batchin"):
        to(local, 1)
    local.site.remove("net/config.yaml")
    assert local.contents() == before
    assert promote(local.site.location, "bare", 1).changed  # though it was not published


def test_two_who_promote_at_once_end_as_the_history_does(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes its event before anybody writes config.yaml, the first of them last."""
    both = threading.Barrier(2)
    write = promotion.add_event
    order: list[str] = []

    def add(*arguments: object) -> str:
        name = write(*arguments)  # type: ignore[arg-type]
        order.append(name)
        both.wait(60)
        return name

    monkeypatch.setattr(promotion, "add_event", add)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda n: to(shelf, n), (1, 2)))
    place = open_place(shelf.site.location, shelf.site.options)
    last = read_history(place, "net").events[-1]
    assert served(shelf) == {last.version: 1}
    assert {each.event.version for each in found} == {1, 2}
    assert len(set(order)) == 2


def test_a_damaged_event_is_named(local: Shelf) -> None:
    local.site.put("net/.history/000009-00000000.json", b"{}")
    with pytest.raises(InputError, match=r"000009-00000000\.json is no event"):
        to(local, 1)


def test_the_catalog(shelf: Shelf) -> None:
    to(shelf, 2, 25)
    shelf.site.put("net/9/a.engine", engine_bytes())
    found = catalog(shelf.site.location, "net", storage=shelf.site.options)
    assert [(row.version, row.state, row.percent) for row in found.rows] == [
        (1, "published", 0.0),
        (2, "published", 25.0),
        (3, "published", 75.0),
        (9, "not published", 0.0),
    ]
    assert [event.action for event in found.events] == ["publish"] * 3 + ["promote"]


def test_differences(shelf: Shelf) -> None:
    lineage = {"artifacts": [{"path": "a.onnx", "sha256": "aa"}], "seed": 1}
    figures = {"here.engine": {"latency_us": 10.0}}
    old = shelf.publish(20, metrics={"top1": 90}, engine_metrics=figures, lineage=lineage)
    (shelf.files(21)["labels.txt"]).write_bytes(shelf.files(20)["labels.txt"].read_bytes())
    shelf.files(21)["there.engine"].unlink()
    lineage = {"artifacts": [{"path": "a.onnx", "sha256": "bb"}], "seed": 1}
    figures = {"here.engine": {"latency_us": 8.0}}
    new = shelf.publish(21, metrics={"top1": 91}, engine_metrics=figures, lineage=lineage)
    numbers = (old.version, new.version)
    found = diff(shelf.site.location, "net", *numbers, storage=shelf.site.options)
    assert {file.name: file.change for file in found.files} == {
        "here.engine": "changed",
        "labels.txt": "same",
        "there.engine": "removed",
    }
    assert found.metrics == {"top1": (90.0, 91.0)}
    assert [(each.old, each.new) for each in found.engines] == [
        ("here.engine", "here.engine"),
        ("there.engine", None),
    ]
    assert found.engines[0].metrics == {"latency_us": (10.0, 8.0)}
    assert found.lineage == {"artifacts.[a.onnx].sha256": ("aa", "bb")}
    assert not found.same
    assert diff(shelf.site.location, "net", 1, 1, storage=shelf.site.options).same


def test_a_version_without_a_manifest_is_compared_by_sizes(local: Shelf) -> None:
    for name, path in local.files(0).items():
        local.site.put(f"net/9/{name}", path.read_bytes())
    found = diff(local.site.location, "net", 1, 9)
    assert {file.change for file in found.files} == {"unknown"}
    assert not found.same
