"""Versions are published whole, once, and are what a server then reads; nothing else is."""

from __future__ import annotations

import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.registry.shelves import Shelf, engine
from tests.serve.repository.sites import KINDS, engine_bytes, site
from twofour.core.errors import EngineError, Error, InputError
from twofour.registry.keys import Signer, new_key
from twofour.registry.places import StorePlace, open_place
from twofour.registry.publish import PublishOptions, publish
from twofour.registry.reading import read_published, verify
from twofour.serve.repository.layout import CLAIM, MANIFEST, SIGNATURE
from twofour.serve.repository.manifest import (
    MOST_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    parse_manifest,
    write_manifest,
)
from twofour.serve.repository.signatures import read_trusted_keys


@pytest.fixture(params=KINDS)
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    found = site(request.param, tmp_path, lambda: request.getfixturevalue("endpoint"))
    return Shelf(found, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Shelf:
    return Shelf(site("local", tmp_path, str), tmp_path)


def test_a_version_is_what_was_published_and_a_server_loads_it(shelf: Shelf) -> None:
    made = shelf.publish(
        metrics={"top1": 91.5},
        engine_metrics={"here.engine": {"latency_us": 120.0}},
        lineage={"artifacts": [{"path": "a.onnx", "sha256": "ab"}], "seed": 3},
        message="the first",
    )
    assert (made.version, made.existed, made.signed_by) == (1, False, "")
    assert made.place.endswith("net/1")
    entry = shelf.version(1)
    assert shelf.store().manifest(entry) == made.manifest
    assert entry.sources == ("labels.txt",)
    here, there = made.manifest.engines
    assert (here.file, here.metrics, there.metrics) == (
        "here.engine",
        {"latency_us": 120.0},
        {},
    )
    assert there.title.endswith("riscv64")
    assert made.manifest.lineage["seed"] == 3
    found = shelf.opened(1)
    assert found.name == "here.engine"
    assert found.engine.plan == engine(0).plan
    for name, path in shelf.files().items():
        assert shelf.contents()[f"1/{name}"] == path.read_bytes()


def test_versions_ascend_and_know_the_one_before(shelf: Shelf) -> None:
    made = [shelf.publish(seed) for seed in range(3)]
    assert [each.version for each in made] == [1, 2, 3]
    assert [each.manifest.previous for each in made] == [None, 1, 2]
    assert list(shelf.snapshot().models["net"].versions) == [1, 2, 3]


def test_the_same_files_are_the_same_version(shelf: Shelf) -> None:
    first = shelf.publish(0)
    shelf.publish(1)
    before = shelf.contents()
    again = shelf.publish(0, message="once more")
    assert (again.version, again.existed, again.manifest) == (1, True, first.manifest)
    assert shelf.contents() == before


def test_files_that_were_published_unsigned_are_published_again_to_be_signed(shelf: Shelf) -> None:
    shelf.publish(0)
    signed = shelf.publish(0, key=shelf.key)
    assert (signed.version, signed.existed) == (2, False)
    again = shelf.publish(0, key=shelf.key)
    assert (again.version, again.existed) == (2, True)
    assert again.signed_by == signed.signed_by == Signer(shelf.key).name


def test_a_number_is_not_used_again_when_its_version_is_removed(shelf: Shelf) -> None:
    shelf.publish(0)
    shelf.publish(1)
    shelf.site.remove("net/2")
    assert shelf.publish(2).version == 3


def test_a_model_that_was_filled_by_hand_goes_on(shelf: Shelf) -> None:
    shelf.site.put("net/7/a.engine", engine_bytes())
    made = shelf.publish()
    assert (made.version, made.manifest.previous) == (8, 7)
    assert shelf.opened(7).name == "a.engine"


def test_two_at_once_get_numbers_of_their_own(shelf: Shelf) -> None:
    seeds = range(6)
    for seed in seeds:
        shelf.files(seed)
    together = threading.Barrier(len(seeds))

    def one(seed: int) -> tuple[int, int]:
        together.wait(60)
        return seed, shelf.publish(seed).version

    with ThreadPoolExecutor(len(seeds)) as threads:
        found = dict(threads.map(one, seeds))
    assert len(set(found.values())) == len(seeds)
    place = open_place(shelf.site.location, shelf.site.options)
    for seed, number in found.items():
        result = verify(place, shelf.version(number))
        assert result.problems == ()
        files = shelf.files(seed)
        assert shelf.contents()[f"{number}/labels.txt"] == files["labels.txt"].read_bytes()
    assert not [name for name in shelf.contents() if name.startswith((".publishing", ".claim"))]


@pytest.mark.parametrize("kind", ["memory", "s3"])
@pytest.mark.parametrize("refuses", [True, False])
def test_claims_hold_where_a_store_cannot_refuse_to_overwrite(
    kind: str, refuses: bool, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a store that does not know the condition nor one that ignores it mixes versions."""
    found = site(kind, tmp_path, lambda: request.getfixturevalue("endpoint"))
    places = [StorePlace(found.location, found.options) for _ in range(4)]

    def put(system: Any) -> Any:
        write = system.pipe_file

        def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
            if mode == "create" and refuses:
                raise ValueError("unsupported mode")
            write(path, value)

        return pipe_file

    for place in places:
        monkeypatch.setattr(place._system, "pipe_file", put(place._system))
    together = threading.Barrier(len(places))

    def claim(place: StorePlace) -> list[int]:
        together.wait(60)
        return [n for n in range(1, 6) if place._claim(f"net/{n}")]

    with ThreadPoolExecutor(len(places)) as threads:
        numbers = [n for found in threads.map(claim, places) for n in found]
    assert len(numbers) == len(set(numbers))


def test_a_server_never_sees_half_a_version(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks after every write; a version is either not there or whole, and loads."""
    shelf.publish(0)
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        versions = shelf.snapshot().models["net"].versions
        seen.append(list(versions))
        if 2 in versions:
            assert shelf.store().manifest(versions[2]) is not None

    write = StorePlace._put

    def put(self: StorePlace, place: str, content: bytes) -> None:
        write(self, place, content)
        look()

    monkeypatch.setattr(StorePlace, "_put", put)
    shelf.publish(1, report=look)
    assert seen
    assert seen[0] == [1]
    look()
    assert seen[-1] == [1, 2]
    if shelf.site.options:
        assert [1] in seen[1:-1]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_listing_that_misses_the_claim_is_no_danger(
    kind: str, request: Any, tmp_path: Path
) -> None:
    """A page of a listing may be older than the next: the claim is asked for by its name."""
    shelf = Shelf(site(kind, tmp_path, lambda: request.getfixturevalue("endpoint")), tmp_path)
    shelf.site.put("net/1/here.engine", engine_bytes())
    entry = shelf.version(1)
    shelf.site.put(f"net/1/{CLAIM}", b"")
    assert shelf.snapshot().models.get("net") is None or not shelf.snapshot().models["net"].versions
    with pytest.raises(Error, match="still being published"):
        shelf.store().manifest(entry)


def test_a_copy_that_is_not_whole_yet_is_no_version(local: Shelf) -> None:
    local.site.put("net/1/here.engine", engine_bytes())
    local.site.put(f"net/1/{CLAIM}", b"")
    assert not local.snapshot().models["net"].versions


def test_an_upload_that_fails_leaves_nothing_of_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.publish(0)
    before = shelf.contents()

    class Full(Exception):
        pass

    def fail(done: int, total: int | None, what: str) -> None:
        if what == "there.engine":
            raise Full("no space left")

    with pytest.raises(InputError, match="no space left"):
        shelf.publish(1, report=fail)
    left = {name for name in shelf.contents() if name not in before}
    assert all(name.startswith(f"2/{CLAIM}") for name in left)
    assert list(shelf.snapshot().models["net"].versions) == [1]
    assert shelf.publish(1).version in (2, 3)


def test_a_source_that_changes_meanwhile_is_an_error(shelf: Shelf) -> None:
    files = shelf.files(1)

    def change(done: int, total: int | None, what: str) -> None:
        files["labels.txt"].write_text("something else, which is longer\n")

    with pytest.raises(InputError, match="changed while it was published"):
        shelf.publish(1, report=change)
    assert "net" not in shelf.snapshot().models or not shelf.snapshot().models["net"].versions


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        ("../net", "a.engine", "a model's name has"),
        ("net/1", "a.engine", "a model's name has"),
        ("net", "a/../b.engine", "one name of printable"),
        ("net", "/a.engine", "one name of printable"),
        ("net", "a\n.engine", "one name of printable"),
        ("net", ".a.engine", "begins with a dot"),
        ("net", "manifest.json", "that of the manifest"),
        ("net", "manifest.sig", "that of the manifest"),
        ("net", "a.txt", "expected an .engine or an .onnx"),
        ("net", f"{'a' * 300}.engine", "at most 255 bytes"),
    ],
)
def test_names_that_a_server_would_refuse_are_refused(
    local: Shelf, name: str, file: str, says: str
) -> None:
    path = local.files()["here.engine"]
    with pytest.raises(InputError, match=says):
        publish(local.site.location, name, {file: path})
    assert not local.snapshot().models


def test_a_damaged_engine_is_not_published(local: Shelf, tmp_path: Path) -> None:
    content = bytearray(engine_bytes())
    content[-1] ^= 1
    (tmp_path / "bad.engine").write_bytes(content)
    with pytest.raises(EngineError, match="hash"):
        publish(local.site.location, "net", {"a.engine": tmp_path / "bad.engine"})
    assert not local.snapshot().models


@pytest.mark.parametrize(
    "lineage", [{"a": float("nan")}, {"a": object()}, {"a": "x" * (MOST_MANIFEST_BYTES + 1)}]
)
def test_metadata_that_no_manifest_can_have_is_refused(local: Shelf, lineage: Any) -> None:
    with pytest.raises(InputError, match="metadata"):
        local.publish(lineage=lineage)
    assert not local.snapshot().models


def test_a_repository_in_no_folder_is_an_error(tmp_path: Path, local: Shelf) -> None:
    with pytest.raises(InputError, match="absent"):
        publish(str(tmp_path / "absent" / "models"), "net", local.files())
    made = publish(str(tmp_path / "new"), "net", local.files())
    assert made.version == 1


def test_published_files_cannot_be_written_to_by_accident(local: Shelf) -> None:
    place = Path(local.publish().place)
    assert all(not path.stat().st_mode & 0o222 for path in place.iterdir())


NAMES = st.text("abcxyz._-09", min_size=1, max_size=12).filter(lambda n: not n.startswith("."))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIGURES = st.dictionaries(st.text(max_size=8), st.floats(-1e200, 1e200), max_size=3)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(
    files=st.dictionaries(NAMES, st.tuples(st.integers(0, 2**40), HASHES), max_size=5),
    metrics=FIGURES,
    lineage=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4),
    message=st.text(max_size=20),
    previous=st.none() | st.integers(1, 9),
)
def test_a_manifest_is_read_as_it_was_written(
    files: dict[str, tuple[int, str]],
    metrics: Any,
    lineage: Any,
    message: str,
    previous: int | None,
) -> None:
    records = tuple(
        FileRecord(name, *of) for name, of in sorted(files.items()) if ".engine" not in name
    )
    made = Manifest(
        "net", 10, "2026-01-01T00:00:00Z", previous, records, (), metrics, message, lineage
    )
    content = write_manifest(made)
    assert parse_manifest(content) == made
    assert write_manifest(parse_manifest(content)) == content


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position % len(content)] ^= 1 << bit
    return bytes(changed)


MADE = Manifest(
    "net", 1, "2026-01-01T00:00:00Z", None, (FileRecord("a", 3, "0f" * 32),), (), {"top1": 91.25}
)


@given(position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_no_bit_of_a_manifest_can_be_another(position: int, bit: int) -> None:
    content = write_manifest(MADE)
    with pytest.raises(ValueError, match=r"it is|it was|its "):
        parse_manifest(flipped(content, position, bit))


FILES = ("here.engine", "there.engine", "labels.txt", MANIFEST, SIGNATURE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_a_version_can_be_another(
    kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The server refuses to load it, signed or not; a file that no engine needs counts too."""
    shelf = Shelf(site(kind, tmp_path, lambda: request.getfixturevalue("endpoint")), tmp_path)
    shelf.publish(key=shelf.key)
    content = shelf.contents()[f"1/{name}"]
    signed = read_trusted_keys(shelf.public)

    @settings(deadline=None, max_examples=2 if kind == "s3" else 25)
    @given(position=st.integers(0, len(content) - 1), bit=st.integers(0, 7), keys=st.booleans())
    def flip(position: int, bit: int, keys: bool) -> None:
        trust = signed if keys or name == SIGNATURE else None
        shelf.overwrite(f"1/{name}", flipped(content, position, bit))
        refuses(shelf, trust, sources=name == "labels.txt")

    flip()
    shelf.overwrite(f"1/{name}", content)
    assert shelf.opened(1, signed).name == "here.engine"


def refuses(shelf: Shelf, trust: Any, *, sources: bool) -> None:
    """What a build would read is read where an engine does not need it."""
    entry = shelf.version(1)
    if sources:
        with (
            pytest.raises(InputError, match="altered"),
            shelf.store(trust).files(entry, entry.sources),
        ):
            pass
        return
    with pytest.raises(EngineError, match=r"cannot be used here|not usable yet"):
        shelf.opened(1, trust)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("change", ["extra", "missing", "moved", "renamed", "older"])
def test_a_version_of_other_files_is_refused(shelf: Shelf, keys: bool, change: str) -> None:
    shelf.publish(0, key=shelf.key)
    shelf.publish(1, key=shelf.key)
    old, new = (
        {n.split("/")[1]: c for n, c in shelf.contents().items() if n.startswith(f"{number}/")}
        for number in (1, 2)
    )
    if change == "extra":
        shelf.site.put("net/2/evil.engine", engine_bytes())
    elif change == "missing":
        shelf.site.remove("net/2/labels.txt")
    elif change == "renamed":
        shelf.site.remove("net/2/labels.txt")
        shelf.site.put("net/2/names.txt", new["labels.txt"])
    else:
        for name, content in old.items():
            if change == "moved" or name in (MANIFEST, SIGNATURE):
                shelf.overwrite(f"2/{name}", content)
    trust = read_trusted_keys(shelf.public) if keys else None
    with pytest.raises(EngineError, match=r"not what was published|not signed"):
        shelf.opened(2, trust)
    assert shelf.opened(1, trust).name == "here.engine"


@pytest.mark.parametrize("change", ["unpublished", "unsigned", "other key", "short", "long"])
def test_where_keys_are_required_others_are_refused(
    shelf: Shelf, change: str, tmp_path: Path
) -> None:
    """And with one reason, whatever the signature lacks."""
    if change == "unpublished":
        shelf.site.put("net/1/a.engine", engine_bytes())
    elif change == "unsigned":
        shelf.publish()
    elif change == "other key":
        new_key(tmp_path / "other.pem")
        shelf.publish(key=tmp_path / "other.pem")
    else:
        shelf.publish(key=shelf.key)
        content = shelf.contents()[f"1/{SIGNATURE}"]
        content = content[:-1] if change == "short" else content + b"\n"
        shelf.overwrite(f"1/{SIGNATURE}", content)
    trust = read_trusted_keys(shelf.public)
    reason = "no manifest" if change == "unpublished" else "not signed by one of the trusted keys"
    with pytest.raises(EngineError, match=reason):
        shelf.opened(1, trust)
    assert shelf.opened(1).engine is not None


def test_a_manifest_that_is_not_signed_is_not_even_read(local: Shelf) -> None:
    local.publish(key=local.key)
    path = Path(local.publish(key=local.key).place) / MANIFEST
    path.chmod(0o644)
    path.write_bytes(b'{"name": "look, this shall be in a message"}')
    with pytest.raises(EngineError) as caught:
        local.opened(1, read_trusted_keys(local.public))
    assert "look" not in str(caught.value)


def test_what_is_loaded_is_what_was_verified_though_the_folder_changes(local: Shelf) -> None:
    """Between the comparison and the reading there is no folder that others may write to."""
    place = Path(local.publish(key=local.key).place)
    entry = local.version(1)
    trust = read_trusted_keys(local.public)
    with local.store().files(entry, entry.engines) as folder:
        assert folder == place
    with local.store(trust).files(entry, entry.engines) as folder:
        assert folder != place
        (place / "here.engine").unlink()
        (place / "here.engine").write_bytes(b"evil")
        assert (folder / "here.engine").read_bytes() == local.files()["here.engine"].read_bytes()


def test_several_keys_may_be_trusted(local: Shelf, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other.pem")
    local.publish(key=local.key)
    both = tmp_path / "both.pub"
    both.write_bytes(other.public.read_bytes() + b"# ours\n" + local.public.read_bytes())
    trust = read_trusted_keys(both)
    assert len(trust.keys) == 2
    assert local.opened(1, trust).name == "here.engine"


def test_openssl_reads_the_same_signature(local: Shelf) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    place = Path(local.publish(key=local.key).place)
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(local.public), "-rawin"]
    words += ["-in", str(place / MANIFEST), "-sigfile", str(place / SIGNATURE)]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0


def test_bad_key_files_are_refused_by_name(tmp_path: Path, local: Shelf) -> None:
    key = generate_private_key(SECP256R1())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ec.pem").write_bytes(text)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pub").write_bytes(public)
    (tmp_path / "none").write_bytes(b"\xff\x00nothing")
    broken = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    (tmp_path / "broken.pub").write_bytes(broken)
    for name in ("ec.pem", "none", "absent", "key.pub"):
        local.key.exists()
        with pytest.raises(InputError):
            Signer(tmp_path / name)
    for name in ("ec.pub", "none", "absent", "broken.pub", "key.pem"):
        with pytest.raises(InputError):
            read_trusted_keys(tmp_path / name)
    with pytest.raises(InputError, match="there already"):
        new_key(local.key)
    assert (local.key.stat().st_mode & 0o777) == 0o600


def test_a_manifest_names_no_path(local: Shelf) -> None:
    """A signed one could: its names are still names of the folder's own files."""
    content = (Path(local.publish().place) / MANIFEST).read_bytes()
    made = parse_manifest(content)
    for name in ("../../x", "/etc/passwd", "a/b", ".hidden", "manifest.sig", "a\x00b", ""):
        bad = Manifest("net", 1, made.created, None, (FileRecord(name, 1, "0" * 64),))
        with pytest.raises(ValueError, match="cannot be"):
            parse_manifest(write_manifest(bad))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema":"twofour.manifest/1"}\n',
        b'{"a":1,"a":2}\n',
        b" " * (MOST_MANIFEST_BYTES + 1),
        b'{"version":1' + b"0" * 5000 + b"}\n",
    ],
)
def test_what_is_no_manifest_is_refused(local: Shelf, content: bytes) -> None:
    path = Path(local.publish().place) / MANIFEST
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(EngineError, match="manifest"):
        local.opened(1)


def test_published_metadata_is_that_of_the_version(local: Shelf) -> None:
    options = PublishOptions(by="me@here", message="why")
    publish(local.site.location, "net", local.files(), options)
    place = open_place(local.site.location)
    found = read_published(place, local.version(1))
    assert found is not None
    assert (found.message, found.version, found.name) == ("why", 1, "net")
