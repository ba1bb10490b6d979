"""Each row has a process of its own; what happens in one does not end the others."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from twofour.bench.suite import run
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.bench.suite.run import _outcome, failures, run_suite
from twofour.core.errors import InputError


def options(tmp_path: Path, *peers: str) -> SuiteOptions:
    return SuiteOptions(peers, 1, 0.1, tmp_path / "cache", data=tmp_path)


def test_a_row_that_fails_is_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    rows = [SuiteRow("one", "no such network", 1), SuiteRow("two", "nor this", 1)]
    seen = []
    documents = run_suite(
        rows, options(tmp_path), lambda done, total, what: seen.append((done, what))
    )
    first, found = documents
    assert first["rows"] == found["rows"][:1]
    assert [(row["name"], row["error"]) for row in found["rows"]] == [
        ("one", "KeyError: 'no such network'"),
        ("two", "KeyError: 'nor this'"),
    ]
    assert "in write_files" in found["rows"][0]["trace"], "a bug keeps its trace"
    assert (0, "one") in seen
    assert (1, "two") in seen
    assert len(failures({**found, "peers": []})) == 2
    assert found["threads"] == 1
    assert {"python", "numpy", "onnxruntime"} <= set(found["tools"])


def test_an_error_of_ours_has_its_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise InputError("no", ["because"])

    monkeypatch.setattr(run, "measure_row", refused)
    found = run._measured(SuiteRow("a", "b", 1), options(tmp_path))
    assert found == {"name": "a", "error": "no\n  because"}


def test_a_process_that_dies_is_the_rows_error() -> None:
    future: Future[dict[str, object]] = Future()
    future.set_exception(BrokenProcessPool("it was killed"))
    found = _outcome(SuiteRow("a", "b", 1), future)
    assert found == {"name": "a", "error": "BrokenProcessPool: it was killed", "trace": ""}


def test_unknown_peers_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown peer 'somebody'"):
        next(run_suite([], options(tmp_path, "somebody"), lambda *_: None))
