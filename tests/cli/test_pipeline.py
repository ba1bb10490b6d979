"""twofour pipeline as a process: what it prints, exit codes, Ctrl-C, and two at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.pipeline.runs import METRIC, RECIPE, short_races, write_recipe
from twofour.cli import app
from twofour.cli.output import PLAIN_WIDTH

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short_races(monkeypatch)


def twofour(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_run_in_words_and_in_json(tmp_path: Path) -> None:
    path, run = write_recipe(tmp_path), tmp_path / "run"
    shown = twofour("pipeline", path, "--run", run)
    assert shown.exit_code == 0, shown.output
    for words in ("small: stages", "quantize 2:4", "networks", "accuracy passed", "speed passed"):
        assert words in shown.stdout
    assert max(map(len, shown.stdout.split("\n"))) <= PLAIN_WIDTH
    assert "sparsify: 0." in shown.stderr
    again = twofour("pipeline", path, "--run", run, "--json")
    document = json.loads(again.stdout)
    assert document["schema"] == "twofour.pipeline/1"
    assert document["verdict"] == "passed"
    reused = [each["status"] for each in document["stages"] if each["name"] != "report"]
    assert set(reused) == {"reused"}
    assert twofour("pipeline", path, "--run", run, "-q").output == ""


def test_a_gate_that_shuts_ends_with_1_after_all_is_written(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE.replace("min_speedup: 0.0001", "min_speedup: 100000"))
    shown = twofour("pipeline", path, "--run", tmp_path / "run")
    assert shown.exit_code == 1
    assert "the gate does not let small go on: failed" in shown.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["verdict"] == "failed"


def test_a_dry_run_writes_nothing_and_predicts(tmp_path: Path) -> None:
    path, run = write_recipe(tmp_path), tmp_path / "run"
    shown = twofour("pipeline", path, "--run", run, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert document["schema"] == "twofour.pipeline.plan/1"
    assert not any(each["reused"] for each in document["stages"])
    assert document["unknown"] == [each["name"] for each in document["stages"]]
    networks = {each["network"]: each for each in document["networks"]}
    weights = 8 * 4 * 9 + 10 * 8
    assert networks["dense float32"]["weight_bytes"] == 4 * weights
    assert networks["2:4 PTQ"]["weight_bytes"] == round(0.625 * weights)
    assert {each["latency_from"] for each in networks.values()} == {"a forecast"}
    assert not run.exists()
    twofour("pipeline", path, "--run", run)
    shown = twofour("pipeline", path, "--run", run, "--dry-run", "--from", "build")
    assert shown.exit_code == 0, shown.output
    assert "--from build" in shown.stdout
    assert "the last run" in shown.stdout
    assert "of unknown time" not in shown.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE.replace("fast", "quick"), "recipe.yaml:5: quantize.recipe: expected one of"),
        (RECIPE.replace("model.onnx", "none.onnx"), "recipe.yaml:2: model.onnx: expected a file"),
        ("[", "is no YAML"),
    ],
)
def test_a_bad_recipe_ends_with_2_and_one_message(tmp_path: Path, text: str, words: str) -> None:
    shown = twofour("pipeline", write_recipe(tmp_path, text), "--run", tmp_path / "run", "--json")
    assert shown.exit_code == 2
    assert words in shown.stderr
    assert json.loads(shown.stdout)["schema"] == "twofour.error/1"
    assert not (tmp_path / "run").exists()


def test_a_stage_that_the_recipe_does_not_have(tmp_path: Path) -> None:
    shown = twofour("pipeline", write_recipe(tmp_path), "--run", tmp_path / "r", "--from", "qat")
    assert shown.exit_code == 2
    assert "the recipe has no stage 'qat'" in shown.stderr
    shown = twofour("pipeline", write_recipe(tmp_path), "--ray-address", "auto")
    assert shown.exit_code == 2


def process(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "twofour", "pipeline", "recipe.yaml", "--run", "run"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(path: Path, there: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and there.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), there.communicate()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_ended_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    """It is ended while the user's metric sleeps, which `load` imports."""
    text = RECIPE.replace("gate: {max_drop: 100, ", "metric: slow_judge:share\ngate: {")
    write_recipe(tmp_path, text)
    (tmp_path / "slow_judge.py").write_text(
        METRIC.replace(
            "def", "import pathlib, time\npathlib.Path('slow').touch()\ntime.sleep(100)\n\ndef"
        )
    )
    there = process(tmp_path)
    wait_for(tmp_path / "slow", there)
    blocked = process(tmp_path)
    out, err = blocked.communicate(timeout=120)
    assert blocked.returncode == 2
    assert b"is in use" in err
    assert f"process {there.pid}:".encode() in err
    os.killpg(there.pid, how)
    out, err = there.communicate(timeout=120)
    if how is signal.SIGINT:
        assert there.returncode == 130
        assert err.decode().splitlines()[-1] == "interrupted"
        first, *rest = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
        assert (first["name"], first["status"], first["text"]) == ("load", "failed", "interrupted")
        assert {each["status"] for each in rest} == {"not reached"}
    else:
        assert there.returncode == -signal.SIGKILL
    (tmp_path / "slow_judge.py").write_text(METRIC)
    shown = process(tmp_path)
    out, err = shown.communicate(timeout=240)
    assert shown.returncode == 0, err.decode()
    assert b"small: stages" in out
    assert not list((tmp_path / "run" / "stages").glob(".*"))


def test_the_page_is_written_and_written_again(tmp_path: Path) -> None:
    path, run = write_recipe(tmp_path), tmp_path / "run"
    assert twofour("pipeline", path, "--run", run).exit_code == 0
    page = (run / "report.html").read_text()
    assert "small" in page
    assert "passed" in page
    again = twofour("report", run, "-o", tmp_path / "page.html", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == {
        "schema": "twofour.report/1",
        "page": str(tmp_path / "page.html"),
        "name": "small",
    }
    assert (tmp_path / "page.html").read_text() == page
    (tmp_path / "none.json").write_text("{}")
    for name in ("none.json", "missing"):
        assert twofour("report", tmp_path / name).exit_code == 2
