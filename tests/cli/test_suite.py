"""twofour bench --suite: what it prints and writes, its exit codes, and each refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from twofour.bench.suite import run
from twofour.bench.suite.entries import RATIOS
from twofour.cli import app


def twofour(*arguments: str | Path) -> Result:
    """In this process: bugs are raised, our errors are exit codes."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure"),
        (("--suite", "gpu"), "no suite 'gpu'"),
        (("--suite", "cpu", "--only", "resnet19_b1"), "no row 'resnet19_b1'"),
        (("m.onnx", "--suite", "cpu"), "SOURCE was given beside --suite"),
        (("--suite", "cpu", "--batch", "2"), "batch was given beside --suite"),
        (("m.engine", "--only", "resnet18_b1"), "an option needs --suite"),
        (("m.engine", "--fresh"), "an option needs --suite"),
        (("--suite", "cpu", "--write", "nowhere"), "no folder nowhere"),
        (("--suite", "cpu", "--vs", "somebody"), "unknown peer 'somebody'"),
        (("--suite", "cpu", "--duration", "0"), "cannot measure for 0.0 seconds"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ("--cache", str(tmp_path)) if "--suite" in arguments else ()
    result = twofour("bench", *arguments, *cache)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def row(name: str, **figures: Any) -> dict[str, Any]:
    """As a row's process hands it over, without contestants."""
    ratios = dict.fromkeys(RATIOS, 1.5)
    plain = {"name": name, "real_weights": False, "calibrated_on": "nothing", "best_peer": {}}
    return {**plain, **ratios, "contestants": {}, "engines": {}, "refused": {}, **figures}


@pytest.mark.parametrize("fails", [False, True])
def test_output_files_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen = []

    def measured(asked: Any, options: Any, progress: Any) -> dict[str, Any]:
        seen.append((asked.name, options))
        if fails and asked.name == "resnet18_b1":
            return {"name": asked.name, "error": "the row broke"}
        return row(asked.name)

    monkeypatch.setattr(run, "_in_process", measured)
    monkeypatch.setenv("TWOFOUR_DATA", str(tmp_path / "data"))
    arguments = ("--only", "resnet34_b1, resnet18_b1", "--threads", "2", "--duration", "0.5")
    cache = ("--cache", tmp_path / "cache", "--write", tmp_path, "--json")
    result = twofour("bench", "--suite", "cpu", *arguments, *cache)
    assert result.exit_code == (1 if fails else 0), result.output
    assert ("failed: resnet18_b1: the row broke" in result.stderr) == fails
    document = json.loads(result.stdout)
    assert [each["name"] for each in document["rows"]] == ["resnet18_b1", "resnet34_b1"]
    assert document.pop("schema") == "twofour.suite/1"
    assert document == json.loads((tmp_path / "cpu_threads2.json").read_text())
    assert document["command"].startswith("twofour bench --suite cpu --threads 2")
    assert str(tmp_path) not in (tmp_path / "cpu_threads2.md").read_text(), (
        "no paths of this machine"
    )
    assert [name for name, _ in seen] == ["resnet18_b1", "resnet34_b1"]
    options = seen[0][1]
    assert (options.threads, options.duration_s, options.data) == (2, 0.5, tmp_path / "data")


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Measures rows in no time, each told apart by the number of the run."""
    runs = []

    def measured(asked: Any, *_: Any) -> dict[str, Any]:
        return row(asked.name, run=len(runs))

    def run_suite(*arguments: str) -> Result:
        runs.append(1)
        where = ("--cache", tmp_path / "cache", "--write", tmp_path)
        return twofour("bench", "--suite", "cpu", *where, *arguments)

    monkeypatch.setattr(run, "_in_process", measured)
    return run_suite


def rows_of(folder: Path) -> dict[str, int]:
    rows = json.loads((folder / "cpu.json").read_text())["rows"]
    return {each["name"]: each["run"] for each in rows}


def test_a_page_is_measured_in_pieces(tmp_path: Path, measure: Callable[..., Result]) -> None:
    assert measure("--only", "resnet34_b1,minilm_b1").exit_code == 0
    assert measure("--only", "resnet18_b1").exit_code == 0
    assert measure("--only", "minilm_b1").exit_code == 0
    assert rows_of(tmp_path) == {"resnet18_b1": 2, "resnet34_b1": 1, "minilm_b1": 3}
    assert list(rows_of(tmp_path)) == ["resnet18_b1", "resnet34_b1", "minilm_b1"]
    text = (tmp_path / "cpu.md").read_text()
    assert "--only resnet18_b1,resnet34_b1,minilm_b1\n" in text
    assert measure().exit_code == 0
    assert set(rows_of(tmp_path).values()) == {4}
    assert "--only" not in (tmp_path / "cpu.md").read_text()


def test_rows_that_were_measured_otherwise_are_not_mixed(
    tmp_path: Path, measure: Callable[..., Result]
) -> None:
    measure("--only", "resnet18_b1,minilm_b1")
    page = tmp_path / "cpu.json"
    earlier = json.loads(page.read_text())
    page.write_text(json.dumps({**earlier, "code_sha256": "other", "cpu": "a 486"}))
    refused = measure("--only", "minilm_b1")
    assert refused.exit_code == 2
    assert "the rows of cpu.json do not belong beside new ones" in refused.stderr
    assert "CPU: the page has a 486" in refused.stderr
    assert "the code that builds and measures has changed" in refused.stderr
    assert rows_of(tmp_path) == {"resnet18_b1": 1, "minilm_b1": 1}, "nothing was lost"
    assert measure("--only", "minilm_b1", "--fresh").exit_code == 0
    assert rows_of(tmp_path) == {"minilm_b1": 3}
    page.write_text(json.dumps({**earlier, "duration_s": 99.0}))
    assert measure().exit_code == 0, "all rows are measured: none is mixed with others"
    assert set(rows_of(tmp_path).values()) == {4}
    page.write_text("[]")
    assert "cpu.json is no page of a suite" in measure("--only", "minilm_b1").stderr


@pytest.mark.slow
def test_a_real_row(tmp_path: Path) -> None:
    arguments = ("--only", "cifar_resnet20_b1", "--duration", "0.1", "--cache", tmp_path / "cache")
    result = twofour("bench", "--suite", "cpu", "--vs", "onnxruntime", *arguments, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["rows"]
    assert found["ratio_2_4_int8_over_best_peer"] > 0.1
    assert found["engines"]["2_4_int8"]["fallback_operators"] == 0
    assert found["engines"]["2_4_int8"]["cosine"] > 0.99
