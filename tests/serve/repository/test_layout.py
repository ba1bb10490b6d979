"""What is made of a listing: which names are models, versions and files, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.core.errors import InputError
from twofour.serve.repository.layout import (
    File,
    Folder,
    Limits,
    fingerprint,
    shown,
    sort_files,
    sort_models,
    sort_versions,
    why_not_file,
    why_not_model,
)
from twofour.serve.repository.local import list_folder

NAMES = st.text(max_size=140) | st.sampled_from(["m", "1", "2", "01", "..", "a/b", "a\nb", "-o"])
FILES = st.builds(File, NAMES, st.integers(0, 9), st.text(max_size=3))


@st.composite
def folders(draw: st.DrawFn, depth: int = 3) -> Folder:
    files = {file.name: file for file in draw(st.lists(FILES, max_size=4))}
    inner = st.text(max_size=5) if depth == 0 else st.text(max_size=5) | folders(depth - 1)
    names = NAMES | st.integers(-1, 2**31).map(str)
    return Folder(dict(files), draw(st.dictionaries(names, inner, max_size=4)))


@given(folders(), st.integers(0, 3))
def test_everything_is_taken_or_refused_and_within_limits(root: Folder, most: int) -> None:
    limits = Limits(models=most, versions=most, files=most, bytes=10)
    models, refused = sort_models(root, limits)
    assert len(models) <= most
    assert {*map(shown, root.folders)} == {*models} | {*refused}
    for name, folder in models.items():
        assert not why_not_model(name)
        versions, problems = sort_versions(name, folder, limits)
        numbers = [n for n in folder.folders if n.isascii() and n.isdigit()]
        assert len(versions) + len(problems) == len(numbers)
        assert list(versions) == sorted(versions)
        assert all(str(n) in folder.folders and 0 < n < 2**31 for n in versions)
        for version in versions.values():
            assert len(version.files) <= most
            assert sum(f.size_bytes for f in version.files) <= 10
            assert not any(why_not_file(f.name) for f in version.files)


@given(NAMES)
def test_a_name_that_is_taken_stays_where_it_is(name: str) -> None:
    if not why_not_file(name):
        assert os.path.normpath(f"/cache/x/{name}") == f"/cache/x/{name}"
        assert os.path.dirname(f"/cache/x/{name}") == "/cache/x"
    if not why_not_model(name):
        assert name.isascii()
        assert not set(name) & set("/\\ \n\"'{}%?#:")


@given(st.text())
def test_what_a_message_shows_is_one_line(name: str) -> None:
    text = shown(name)
    assert text.isprintable()
    assert len(text) <= 80


@given(st.lists(FILES, max_size=4), st.lists(FILES, max_size=4))
def test_fingerprints_are_equal_for_equal_files_alone(a: list[File], b: list[File]) -> None:
    assert (fingerprint(tuple(a)) == fingerprint(tuple(b))) == (a == b)


@pytest.mark.parametrize("name", ["a", "resnet50", "a.b-c_d", "_x", "0", "x" * 128])
def test_good_models(name: str) -> None:
    assert why_not_model(name) == ""


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-o", "a b", "a/b", "a\n", "é", "a%2f", "x" * 129, "a:b", "$(x)"]
)
def test_bad_models(name: str) -> None:
    assert "rename" in why_not_model(name)


def test_files_beyond_the_limit_are_named() -> None:
    folder = Folder({"a": File("a", 5, ""), "b": File("b", 6, ""), "c": "no regular file"})
    files, problems = sort_files(folder, Limits(bytes=10))
    assert [file.name for file in files] == ["a"]
    assert [line.partition(":")[0] for line in problems] == ["b", "c"]


def listed(root: Path) -> tuple[list[str], tuple[str, ...]]:
    """Files of version 1 of model m, and what is wrong there."""
    models, _ = sort_models(list_folder(root), Limits())
    versions, problems = sort_versions("m", models["m"], Limits())
    wrong = versions[1].problems if 1 in versions else ()
    return [f.name for f in versions[1].files] if 1 in versions else [], (*problems, *wrong)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "1" / "a.engine").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"s")
    return folder


def test_a_link_within_the_repository_is_followed(root: Path) -> None:
    (root / "m" / "..data").mkdir()
    (root / "m" / "..data" / "b.engine").write_bytes(b"y")
    (root / "m" / "1" / "b.engine").symlink_to("../..data/b.engine")
    (root / "n").symlink_to("m")
    assert listed(root) == (["a.engine", "b.engine"], ())
    assert sorted(list_folder(root).folders) == ["m", "n"]


@pytest.mark.parametrize("target", ["../../../outside/secret", "/etc/passwd", "../../../outside"])
def test_a_file_link_that_leads_outside_is_refused(root: Path, target: str) -> None:
    (root / "m" / "1" / "b.engine").symlink_to(target)
    assert listed(root) == (["a.engine"], ("b.engine: a link that leads out of the repository",))


def test_folder_links_that_lead_outside_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "m" / "2").symlink_to(tmp_path / "outside")
    (root / "n").symlink_to(tmp_path)
    assert listed(root) == (["a.engine"], ("2: a link that leads out of the repository",))
    assert sort_models(list_folder(root), Limits())[1] == {
        "n": "a link that leads out of the repository"
    }


def test_links_in_circles_end(root: Path) -> None:
    (root / "m" / "1" / "self").symlink_to("self")
    (root / "m" / "1" / "up").symlink_to("../..")
    (root / "m" / "3").symlink_to("3")
    (root / "loop").symlink_to(".")
    files, problems = listed(root)
    assert files == ["a.engine"]
    assert [line.partition(":")[0] for line in problems] == ["3", "self"]


def test_what_is_no_regular_file_is_never_opened(root: Path) -> None:
    os.mkfifo(root / "m" / "1" / "pipe.engine")
    os.mkfifo(root / "m" / "config.yaml")
    assert listed(root) == (["a.engine"], ("pipe.engine: no regular file",))
    assert list_folder(root).folders["m"].files["config.yaml"] == "no regular file"  # type: ignore[union-attr]


def test_a_file_that_cannot_be_read_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listed(root)
    with monkeypatch.context() as patch:  # root may read whatever its mode says
        patch.setattr(os, "access", lambda path, mode: False)
        assert listed(root) == ([], ("a.engine: this user may not read it",))
    assert listed(root) == before


def test_a_folder_that_cannot_be_read_hides_nothing_else(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "locked").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    models, refused = sort_models(list_folder(root), Limits())
    assert list(models) == ["m"]
    assert refused == {"locked": "Permission denied"}


def test_names_that_are_no_text(root: Path) -> None:
    os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    (root / "m" / "1" / "a\nb").write_bytes(b"")
    models, refused = sort_models(list_folder(root), Limits())
    assert list(models) == ["m"]
    assert list(refused) == ["\\udcff\\udcfe"]
    assert listed(root)[1][0].startswith("a\\nb: ")


def test_a_huge_file_is_refused_without_being_read(root: Path) -> None:
    with (root / "m" / "1" / "huge.engine").open("wb") as file:
        file.truncate(1 << 40)
    files, problems = listed(root)
    assert files == ["a.engine"]
    assert problems[0].startswith("huge.engine: the folder's files are larger than")


def test_the_repository_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert listed(tmp_path / "link") == (["a.engine"], ())
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match="cannot be read"):
        list_folder(tmp_path / "circle")
