"""twofour registry: what it prints and writes, its exit codes, the structure of its documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.cli.structure import compare, structure
from tests.sample_engines import sample_engine
from twofour.cli import app
from twofour.cli.output import PLAIN_WIDTH
from twofour.core import outcome
from twofour.core.records import to_plain

ALL = ("a.engine", "net.engine=b.engine", "labels.txt")
KNOWN = ("--metric", "top1=91.5", "--metric", "a.engine:latency_us=120", "--run", "run")
MLFLOW = ("--mlflow", "sqlite:///mlflow.db")
# Version 3 was put there by hand, so 4 is the first that is published.
CALLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("keygen", ("publish.pem",)),
    (
        "publish",
        ("models", "net", *ALL, *KNOWN, "--key", "publish.pem", "-m", "1st", "--promote", *MLFLOW),
    ),
    ("publish", ("models", "net", *ALL)),
    ("publish", ("models", "net", "b.engine", "model.onnx=a.engine", "--by", "me@here")),
    ("publish", ("models", "new", "a.engine")),
    ("versions", ("models", "net", "--history")),
    ("versions", ("models", "net", "--trusted-keys", "publish.pub")),
    ("promote", ("models", "net", "5", "--share", "12.5", "-m", "let us see")),
    ("promote", ("models", "net", "5")),
    ("rollback", ("models", "net")),
    ("promote", ("models", "net", "4", *MLFLOW)),
    ("diff", ("models", "net", "4", "5")),
    ("diff", ("models", "net", "5", "3")),
    ("verify", ("models", "net", "4", "--trusted-keys", "publish.pub")),
    ("verify", ("models", "net", "5")),
    ("verify", ("models", "net", "5", "--trusted-keys", "publish.pub")),
    ("verify", ("models", "net", "3")),
)
SCHEMAS = ("diff", "keygen", "promote", "publish", "verify", "versions")
SHARES = ("before", "serves", "aliases")
IN_MANIFEST = ("metrics", "engines[].metrics", "lineage")
MAPS = {
    "publish": (
        *(f"manifest.{name}" for name in IN_MANIFEST),
        *(f"promotion.{name}" for name in SHARES),
    ),
    "versions": (
        *(f"versions[].manifest.{name}" for name in IN_MANIFEST),
        "history[].before",
        "history[].serves",
    ),
    "promote": SHARES,
    "diff": ("metrics", "engines[].metrics", "lineage"),
    "verify": tuple(f"manifest.{name}" for name in IN_MANIFEST),
}


def twofour(*arguments: str, width: int | None = None) -> Result:
    """In this process, as it prints where there is no terminal."""
    columns = {"COLUMNS": str(width) if width else None}
    result = CliRunner().invoke(app, ("registry", *arguments), env=columns)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fill(folder: Path) -> None:
    """Files to publish, a run, and a version that was put there by hand."""
    engine = sample_engine()
    engine.save(folder / "a.engine")
    replace(engine, weights=np.zeros(2800, np.uint8)).save(folder / "b.engine")
    (folder / "labels.txt").write_text("cat\n")
    by_hand = folder / "models" / "net" / "3"
    by_hand.mkdir(parents=True)
    engine.save(by_hand / "a.engine")
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps(run_document()))


def run_document() -> dict[str, Any]:
    """As a pipeline writes it."""
    check = outcome.Check("speed", "passed", 1.6, 1.5, 1.7, 1.2, "x", "1.6x, at least 1.2x")
    figure = outcome.Figure(91.4, 90.9, 91.9)
    point = outcome.Point("2:4 int8", "candidate", figure, 120.5)
    artifact = outcome.Artifact("stages/build-1/a.engine", "engine", "ab" * 32, 9, "build", ("x",))
    stage = outcome.StageRecord("build", "done", "12ab", 1.5, "built")
    machine = outcome.Surroundings("a CPU", 2, 1, "a system", "cpu:vector", 1, 0, "cmd", {"a": "1"})
    task = outcome.Task("top1", "%", True, 100)
    found = outcome.Outcome(
        "net", "2026-01-01T00:00:00Z", "passed", (check,), task, (), (point,), (), (), (stage,),
        (artifact,), machine,
    )  # fmt: skip
    return {"schema": f"twofour.{outcome.SCHEMA}", **to_plain(found)}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each call printed, by schema."""
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    found: dict[str, list[Any]] = {name: [] for name in SCHEMAS}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("registry")
        patch.chdir(folder)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        fill(folder)
        for name, arguments in CALLS:
            result = twofour(name, *arguments, "--json")
            document = json.loads(result.stdout)
            if "error" in document:
                pytest.fail(f"{name} {arguments}: {result.output}")
            assert (result.exit_code == 1) == (document.get("whole") is False), result.output
            schema = "promote" if name == "rollback" else name
            assert document["schema"] == f"twofour.registry.{schema}/1"
            found[schema].append(document)
    return found


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_document_has_the_structure_of_its_golden_file(
    schema: str, documents: dict[str, list[Any]], request: pytest.FixtureRequest
) -> None:
    found = [structure(each, MAPS.get(schema, ())) for each in documents[schema]]
    update = request.config.getoption("--update-golden")
    compare(f"registry.{schema}/1", found, update=update)


def test_what_the_documents_say(documents: dict[str, list[Any]]) -> None:
    first, again, second, other = documents["publish"]
    assert [first["version"], again["version"], second["version"], other["version"]] == [4, 4, 5, 1]
    assert [first["existed"], again["existed"]] == [False, True]
    assert first["manifest"]["metrics"] == {
        "top1": 91.5, "latency_us": 120.5, "gate.speed": 1.6,
    }  # fmt: skip
    assert first["manifest"]["lineage"]["artifacts"][0]["sha256"] == "ab" * 32
    assert "command" not in first["manifest"]["lineage"]["surroundings"]
    assert first["mlflow"]["version"] == "1"
    states = {row["version"]: row["state"] for row in documents["versions"][1]["versions"]}
    assert states == {3: "not published", 4: "signed", 5: "not trusted"}
    share, whole, back, unchanged = documents["promote"]
    assert share["serves"] == {"4": 87.5, "5": 12.5}
    assert whole["serves"] == {"5": 100.0}
    assert (back["action"], back["serves"]) == ("rollback", {"4": 100.0})
    assert (unchanged["changed"], unchanged["aliases"]) == (False, {"production": "1"})
    wholes = [each["whole"] for each in documents["verify"]]
    assert wholes == [True, True, False, False]


@pytest.mark.parametrize("width", [None, 80])
def test_what_is_printed_fits(
    width: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    for name, arguments in CALLS:
        if "--mlflow" in arguments:
            arguments = arguments[: arguments.index("--mlflow")]
        result = twofour(name, *arguments, width=width)
        assert result.exit_code in (0, 1), result.output
        longest = max((line for line in result.stdout.splitlines()), key=len, default="")
        assert len(longest) <= (width or PLAIN_WIDTH), f"{arguments}: {longest}"
        assert result.stdout or result.exit_code, (name, arguments)


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(app, ["registry", name, "--help"])
    assert result.exit_code == 0
    assert f"Example: twofour registry {name}" in result.stdout
    assert "--json" in result.stdout
    assert "--quiet" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("publish", "models", "net", "absent.engine"),
        ("publish", "models", "net", "a.engine", "a.engine=b.engine"),
        ("publish", "models", "net", "a.engine", "--metric", "top1"),
        ("publish", "models", "net", "a.engine", "--metric", "top1=nan"),
        ("publish", "models", "net", "a.engine", "--metric", "b.engine:x=1"),
        ("publish", "models", "net", "a.engine", "--key", "absent.pem"),
        ("publish", "models", "net", "a.engine", "--run", "absent"),
        ("publish", "models", "net/x", "a.engine"),
        ("publish", "nonsense://models", "net", "a.engine"),
        ("promote", "models", "net", "17"),
        ("promote", "models", "net", "3", "--share", "0"),
        ("rollback", "models", "net"),
        ("versions", "models", "absent"),
        ("diff", "models", "net", "3", "4"),
        ("verify", "models", "net", "3", "--trusted-keys", "a.engine"),
        ("keygen", "absent/key.pem"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_changes_nothing(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    result = twofour(*arguments, "--json")
    assert result.exit_code == 2, result.output
    assert json.loads(result.stdout)["schema"] == "twofour.error/1"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_file_with_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample_engine().save(tmp_path / "a=b.engine")
    assert twofour("publish", "models", "net", "a=b.engine", "--quiet").exit_code == 0
    assert (tmp_path / "models" / "net" / "1" / "a=b.engine").is_file()
