"""Work as bytes: the files that it names go with it, whole, and land where it then looks."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[default]'")

from tests.serve.clusters import ROOT
from twofour.cluster import worker
from twofour.cluster.sending import File, pack, placed, unpack
from twofour.core.errors import GateError, InputError


def texts(*paths: Path) -> list[str]:
    return [path.read_text() for path in paths]


def test_paths_that_exist_are_files_and_others_are_paths(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("A")
    absent = Path("no/such/file")
    packed = pack(functools.partial(texts, tmp_path / "a"), [[tmp_path / "a", absent], "a"])
    assert [file.path for file in packed.files] == [tmp_path / "a"]
    places = [tmp_path / "elsewhere"]
    assert unpack(packed.arguments[0], places) == [tmp_path / "elsewhere", absent]
    assert unpack(packed.arguments[1], places) == "a"
    assert unpack(packed.start, [tmp_path / "a"])() == ["A"]


def test_relative_paths_are_those_of_who_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("A")
    monkeypatch.chdir(tmp_path)
    packed = pack(Path("a"), [tmp_path / "a"])
    assert [file.path for file in packed.files] == [tmp_path / "a"]


def test_a_model_takes_its_data_along_and_a_folder_all_that_is_in_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "data" / "inner").mkdir(parents=True)
    (source / "empty").mkdir()
    for name in ("m.onnx", "m.onnx.data", "m.onnx_data", "other", "data/x.npy", "data/inner/y"):
        (source / name).write_text(name)
    (source / "data" / "nothing").touch()
    packed = pack([source / name for name in ("m.onnx", "data", "empty")], [])
    sent = {number: file.contents() for number, file in enumerate(packed.files)}
    model, data, empty = placed(packed.files, sent, target)
    found = [str(each.relative_to(model.parent)) for each in sorted(model.parent.iterdir())]
    assert found == ["m.onnx", "m.onnx.data", "m.onnx_data"]
    assert texts(model, data / "x.npy", data / "inner" / "y", data / "nothing") == [
        "m.onnx",
        "data/x.npy",
        "data/inner/y",
        "",
    ]
    assert list(empty.iterdir()) == []


def test_a_file_is_here_only_if_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("one")
    beside = tmp_path / "m.onnx.data"
    beside.write_text("data")
    file = File.of(path)
    assert file.is_here
    assert file.size_bytes == 7
    path.write_text("two")
    assert not file.is_here
    path.write_text("one")
    assert file.is_here
    beside.unlink()
    assert not file.is_here


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "x").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"cannot send .*loop"):
        pack(tmp_path / "loop", [])


def test_a_worker_returns_errors_and_keeps_what_it_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the worker goes, too
    (tmp_path / "a").write_text("A")
    at_work = worker.Worker(str(tmp_path))
    packed = pack(functools.partial(start_adding, tmp_path / "a"), ["x", ""])
    assert at_work.look(packed.files).lacking == ()
    assert at_work.begin(packed.start, packed.files, ()) is None
    (tmp_path / "a").write_text("B")  # it was read once
    assert at_work.answer(packed.arguments[0]) == "Ax"
    error = at_work.answer(packed.arguments[1])
    assert isinstance(error, GateError)
    assert error.what == "nothing"
    assert at_work.look(packed.files).lacking == (0,)


def start_adding(path: Path) -> functools.partial[str]:
    return functools.partial(adding, path.read_text())


def adding(text: str, more: str) -> str:
    if not more:
        raise GateError("nothing")
    return text + more


HOLD = """
import sys
from twofour.cluster.worker import held_folder
print(held_folder(), flush=True)
sys.stdin.read()
"""


def test_folders_of_workers_that_ended_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even of one that was killed; not of one that lives, and not of others."""
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "twofour-work-foreign").mkdir()  # has no lock: somebody is making it
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    (other / "file").touch()
    first = worker.held_folder()
    assert other.is_dir()
    process.kill()
    process.wait()
    second = worker.held_folder()
    assert not other.exists()
    assert {first, second, tmp_path / "twofour-work-foreign"} == set(tmp_path.iterdir())
