"""Stores over a folder, a memory:// and an s3:// URL: the same answers, whatever lies behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.serve.repository.sites import KINDS, Site, site
from twofour.core.errors import Error, InputError
from twofour.serve.repository.layout import Limits, VersionEntry
from twofour.serve.repository.store import Store


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    found = site(request.param, tmp_path, lambda: request.getfixturevalue("endpoint"))
    found.put("net/1/a.engine", b"one")
    found.put("net/2/a.engine", b"two")
    found.put("net/2/b.onnx", b"")
    found.put("net/config.yaml", b"batching: {max_size: 4}\n")
    found.put("other/7/x.onnx", b"x")
    return found


@pytest.fixture
def store(place: Site, tmp_path: Path) -> Store:
    return Store(place.location, tmp_path / "cache", place.options)


def version(store: Store, model: str, number: int) -> VersionEntry:
    return store.snapshot().models[model].versions[number]


def contents(store: Store, entry: VersionEntry) -> dict[str, bytes]:
    names = tuple(file.name for file in entry.files)
    with store.files(entry, names) as folder:
        return {name: (folder / name).read_bytes() for name in names}


def test_models_versions_files_and_configurations_are_found(store: Store) -> None:
    snapshot = store.snapshot()
    assert list(snapshot.models) == ["net", "other"]
    assert snapshot.refused == {}
    net = snapshot.models["net"]
    assert list(net.versions) == [1, 2]
    assert net.versions[2].engines == ("a.engine",)
    assert net.versions[2].sources == ("b.onnx",)
    assert [(f.name, f.size_bytes) for f in net.versions[2].files] == [
        ("a.engine", 3),
        ("b.onnx", 0),
    ]
    assert net.config is not None
    assert net.config.batching.max_size == 4
    assert snapshot.models["other"].config is not None


def test_equal_contents_have_equal_fingerprints(store: Store) -> None:
    assert store.snapshot() == store.snapshot()


def test_a_fingerprint_changes_with_any_file_and_with_no_other(place: Site, store: Store) -> None:
    before = store.snapshot()
    place.put("net/2/b.onnx", b"now it has some")
    place.put("net/2/b.onnx", b"")
    place.put("net/1/new.txt", b"new")
    after = store.snapshot()
    changed = [
        (name, number)
        for name, model in after.models.items()
        for number, found in model.versions.items()
        if found.fingerprint != before.models[name].versions[number].fingerprint
    ]
    assert (("net", 1) in changed, ("other", 7) in changed) == (True, False)
    assert after.models["net"].fingerprint == before.models["net"].fingerprint


def test_a_file_of_equal_size_but_other_content_is_seen(place: Site, store: Store) -> None:
    before = version(store, "net", 1)
    place.put("net/1/a.engine", b"eno")
    after = version(store, "net", 1)
    assert after.fingerprint != before.fingerprint
    assert contents(store, after) == {"a.engine": b"eno"}


def test_files_are_what_was_put_there(store: Store) -> None:
    assert contents(store, version(store, "net", 2)) == {"a.engine": b"two", "b.onnx": b""}


def test_a_changed_configuration_is_read_again(place: Site, store: Store) -> None:
    before = store.snapshot().models["net"]
    place.put("net/config.yaml", b"batching: {max_size: 8}\n")
    after = store.snapshot().models["net"]
    assert after.config is not None
    assert after.config.batching.max_size == 8
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"batchin: {}\n", "batchin"),
        (b"a: [", "no YAML"),
        (b"\xff\xfe\x00", "no YAML"),
        (b" " * ((1 << 20) + 1), "too large"),
    ],
)
def test_a_bad_configuration_hides_nothing_else(
    place: Site, store: Store, text: bytes, says: str
) -> None:
    place.put("net/config.yaml", text)
    for _ in range(2):  # as read, and as remembered
        snapshot = store.snapshot()
        assert snapshot.models["net"].config is None
        assert says in snapshot.models["net"].problem
        assert snapshot.models["other"].config is not None


def test_bad_names_are_told_and_hide_nothing_else(place: Site, store: Store) -> None:
    place.put("bad name/1/a.engine", b"x")
    place.put("net/01/a.engine", b"x")
    place.put("net/99999999999/a.engine", b"x")
    place.put("net/docs/readme.txt", b"x")
    place.put("net/2/zero\u200bwidth", b"x")
    place.put(".git/1/a.engine", b"x")
    place.put("net/2/.a.engine.part", b"x")
    place.put("readme.md", b"x")
    snapshot = store.snapshot()
    assert list(snapshot.models) == ["net", "other"]
    assert list(snapshot.refused) == ["bad name"]
    net = snapshot.models["net"]
    assert list(net.versions) == [1, 2]
    assert [line.partition(":")[0] for line in net.problems] == ["99999999999", "01"]
    assert [f.name for f in net.versions[2].files] == ["a.engine", "b.onnx"]
    assert net.versions[2].problems[0].startswith("zero\\u200bwidth: ")


def test_more_than_the_limits_is_refused_by_name(place: Site, tmp_path: Path) -> None:
    limits = Limits(models=1, versions=1, files=1, bytes=2)
    found = Store(place.location, tmp_path / "cache", place.options, limits).snapshot()
    assert list(found.models) == ["net"]
    assert "more than 1 models" in found.refused["other"]
    assert list(found.models["net"].versions) == [2]
    assert "more than 1 versions" in found.models["net"].problems[0]
    assert "larger than 2 bytes" in found.models["net"].versions[2].problems[0]


def test_a_version_that_went_is_an_error_with_its_name(place: Site, store: Store) -> None:
    entry = version(store, "net", 2)
    assert not store.has_changed(entry)
    place.remove("net/2")
    assert store.has_changed(entry)
    with pytest.raises(InputError, match=r"a\.engine"), store.files(entry, entry.engines):
        pass


def test_a_file_that_grew_is_not_read(place: Site, store: Store) -> None:
    entry = version(store, "net", 1)
    place.put("net/1/a.engine", b"one and more")
    with pytest.raises(InputError, match="changed"), store.files(entry, entry.engines):
        pass
    assert store.has_changed(entry)


def test_a_file_beside_the_configuration(place: Site, store: Store) -> None:
    place.put("net/warm.npz", b"warm")
    model = store.snapshot().models["net"]
    with store.beside(model, "warm.npz") as path:
        assert path.read_bytes() == b"warm"
    for name in ("../other/7/x.onnx", "absent", "2/a.engine", "/etc/passwd"):
        with pytest.raises(InputError, match="has no file"), store.beside(model, name):
            pass


def test_an_empty_repository_is_no_error(place: Site, store: Store) -> None:
    for name in ("net", "other"):
        place.remove(name)
    assert store.snapshot().models == {}


REMOTE = pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)


@REMOTE
def test_what_was_fetched_is_not_fetched_again(place: Site, store: Store, tmp_path: Path) -> None:
    entry = version(store, "net", 1)
    assert contents(store, entry) == {"a.engine": b"one"}
    place.remove("net")
    again = Store(place.location, tmp_path / "cache", place.options)
    assert contents(again, entry) == {"a.engine": b"one"}


@REMOTE
@pytest.mark.parametrize("damage", [b"eno", b"on", None])
def test_a_damaged_entry_is_fetched_again(store: Store, damage: bytes | None) -> None:
    entry = version(store, "net", 1)
    with store.files(entry, entry.engines) as folder:
        path = folder / "a.engine"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert contents(store, entry) == {"a.engine": b"one"}


@REMOTE
def test_a_fetch_that_nobody_wants_leaves_nothing(store: Store, tmp_path: Path) -> None:
    entry = version(store, "net", 1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Error, match="given up"), store.files(entry, entry.engines, stop):
        pass
    assert not [path for path in (tmp_path / "cache" / "files").iterdir() if path.is_dir()]


def test_no_such_repository(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Store(str(tmp_path / "absent"), tmp_path / "cache").snapshot()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        Store(str(tmp_path / "file"), tmp_path / "cache").snapshot()
    with pytest.raises(InputError, match="cannot be read"):
        Store("nonsense://x", tmp_path / "cache")


def test_a_server_that_does_not_answer_is_an_error_without_the_password(tmp_path: Path) -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "key": "k", "secret": "s"}
    config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    store = Store(
        "s3://bucket/models", tmp_path / "c", {**options, "config_kwargs": config, "retries": 1}
    )
    with pytest.raises(InputError, match="s3://bucket/models cannot be read"):
        store.snapshot()
    with pytest.raises(InputError) as caught:
        Store("ftp://me:secret@127.0.0.1:1/models", tmp_path / "c").snapshot()
    assert "secret" not in str(caught.value)


def test_file_urls_are_local(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    store = Store(f"file://{tmp_path}", tmp_path / ".cache")
    assert list(store.snapshot().models) == ["m"]
    assert not (tmp_path / ".cache").exists()
