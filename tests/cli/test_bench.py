"""twofour bench: input from files, callers at once, results stored and compared."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.cli.structure import GOLDEN, merged, structure
from tests.sample_models import conv_model
from twofour.bench.energy import RaplDomain, processor_counters
from twofour.bench.regression import RUNS
from twofour.cli import app
from twofour.core.target import detect_host

SHORT = ("--duration", "0.05")


def twofour(*arguments: str | Path) -> Result:
    """In this process: bugs are raised, our errors are exit codes."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def document(*arguments: str | Path) -> dict[str, Any]:
    result = twofour("bench", *arguments, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, and model.engine of it for batch 3."""
    folder = tmp_path_factory.mktemp("built")
    conv_model(folder / "model.onnx", scale=0.2)
    engine = folder / "model.engine"
    shapes = ("--shapes", "x:3x4x8x8", "--tuning-effort", "1")
    assert twofour("build", folder / "model.onnx", "-o", engine, *shapes).exit_code == 0
    return folder


def test_what_is_told_of_each(built: Path) -> None:
    """The ONNX file beside the engine is found by itself."""
    found = document(built / "model.engine", "--vs", "onnxruntime")
    assert found["samples"] == 3
    assert found["machine"]["cpu"] == detect_host().model
    assert found["differences_from_onnxruntime"][0]["cosine"] > 0.9999
    for row in found["results"]:
        timing = row["timing"]
        assert timing["min_us"] <= timing["median_us"] <= timing["p90_us"] <= timing["p99_us"]
        assert 0 < timing["cpu_us"]
        assert 0 < timing["per_second"] < 1e6 / timing["min_us"]


def test_memory_and_energy(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine whose one package consumes 1 mJ between two looks at its counter."""
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "7"), ("max_energy_range_uj", "99")):
        (folder / name).write_text(text)
    count = itertools.count(0, 1000)
    monkeypatch.setattr(RaplDomain, "read_uj", lambda domain: next(count))
    monkeypatch.setattr(
        "twofour.bench.versus.processor_counters", lambda: processor_counters(tmp_path)
    )
    arguments = ("bench", built / "model.engine", "--vs", "onnxruntime", *SHORT)
    found = json.loads(twofour(*arguments, "--json").stdout)
    assert 10e6 < found["memory"]["before_bytes"] < found["memory"]["peak_bytes"] < 500e6
    golden = json.loads((GOLDEN / "bench.json").read_text())
    for key in ("memory", "energy"):
        assert merged(golden[key], structure(found[key])) == golden[key]
    rows = found["energy"]["contestants"]
    assert [row["name"] for row in rows] == ["twofour", "ONNX Runtime"]
    for row in rows:
        assert row["joules"] * row["runs"] == pytest.approx(1e-3, rel=0.01)
    text = twofour(*arguments).stdout
    assert re.search(r"memory of a process that only runs the engine: [\d.]+ MB", text)
    assert re.search(r"one call \(package-0, all that it consumes\): twofour [\d.]+ [mu]?J", text)


def test_a_machine_without_counters_says_so(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "twofour.bench.versus.processor_counters", lambda: processor_counters(tmp_path)
    )
    found = twofour("bench", built / "model.engine", *SHORT)
    assert "energy unavailable: this machine shows no energy counter" in found.stdout


def test_another_file_beside_the_engine_is_not_its_model(built: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    engine.write_bytes((built / "model.engine").read_bytes())
    conv_model(tmp_path / "model.onnx", scale=0.3)
    refused = twofour("bench", engine, "--vs", "onnxruntime", *SHORT)
    assert refused.exit_code == 2
    assert "--model M.onnx" in refused.stderr


@pytest.mark.parametrize("source", ["model.onnx", "model.engine"])
def test_input_from_a_file(source: str, built: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((3, 4, 8, 8), 0.5, np.float32))
    given = ("--input", f"x={tmp_path / 'x.npy'}", "--model", built / "model.onnx")
    found = document(built / source, *given)
    assert found["inputs"] == {"x": [3, 4, 8, 8]}
    assert found["differences_from_onnxruntime"][0]["cosine"] > 0.9999
    flat = document(built / "model.engine", *given)["differences_from_onnxruntime"]
    random = document(built / "model.engine")["differences_from_onnxruntime"]
    assert flat[0]["reference_max_abs"] != random[0]["reference_max_abs"], "the array was read"


def test_inputs_that_do_not_fit(built: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 8, 8), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((3, 4, 8, 8)))
    engine, x = built / "model.engine", f"x={tmp_path / 'x.npy'}"
    for arguments, message in (
        (("--input", x, "--shapes", "x:1x4x8x8"), "two shapes for input 'x'"),
        (("--input", f"z={tmp_path / 'x.npy'}"), "no input 'z'"),
        (("--input", f"x={tmp_path / 'double.npy'}"), "got float64"),
        (("--input", "x"), "expected NAME=FILE.npy"),
    ):
        result = twofour("bench", engine, *arguments, *SHORT)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_callers_at_once(built: Path) -> None:
    found = document(built / "model.engine", "--concurrency", "3", "--vs", "onnxruntime,openvino")
    assert found["concurrency"] == 3
    ours, onnxruntime, openvino = (row["setting"] for row in found["results"])
    assert "3 sessions that share the weights" in ours
    assert "one session for 3 callers" in onnxruntime
    assert "3 streams" in openvino


def slowed(path: Path, name: str, factor: float) -> Path:
    """The same baseline, as if the network had taken `factor` of the time."""
    stored = json.loads(path.read_text())
    medians = stored["results"][0]["timing"]["round_medians_us"]
    stored["results"][0]["timing"]["round_medians_us"] = [factor * each for each in medians]
    changed = path.with_name(name)
    changed.write_text(json.dumps(stored))
    return changed


def test_a_baseline(built: Path, tmp_path: Path) -> None:
    """A real run against itself, and against one that was four times as fast."""
    engine, stored = built / "model.engine", tmp_path / "b.json"
    saved = twofour("bench", engine, "--duration", "0.5", "--save", stored)
    assert saved.exit_code == 0, saved.output
    assert not list(tmp_path.glob("*.part"))
    generous = ("--max-slowdown", "100%", "--duration", "0.5")
    same = twofour("bench", engine, *generous, "--baseline", stored, "--json")
    assert same.exit_code == 0, same.output
    comparison = json.loads(same.stdout)["baseline"]
    assert comparison["verdict"] == "no regression"
    assert comparison["low"] <= comparison["slowdown"] <= comparison["high"]
    faster = slowed(stored, "faster.json", 0.25)
    worse = twofour("bench", engine, *generous, "--baseline", faster, "--json")
    assert worse.exit_code == 1
    comparison = json.loads(worse.stdout)["baseline"]
    assert (comparison["verdict"], comparison["runs"]) == ("regression", RUNS)
    assert "slower than" in worse.stderr
    told = twofour("bench", engine, *generous, "--baseline", faster)
    assert f"a regression: more than 100.0% slower in each of {RUNS} runs" in told.stdout


def test_baselines_that_are_none(built: Path, tmp_path: Path) -> None:
    engine, stored = built / "model.engine", tmp_path / "b.json"
    twofour("bench", engine, *SHORT, "--save", stored)
    good = json.loads(stored.read_text())

    def refused(message: str, *arguments: str, **changes: Any) -> None:
        stored.write_text(json.dumps({**good, **changes}))
        result = twofour("bench", engine, *SHORT, "--baseline", stored, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr

    refused("this run cannot be compared", machine={**good["machine"], "cpu": "a 486"})
    refused("CPU: the baseline has a 486", machine={**good["machine"], "cpu": "a 486"})
    refused("callers at once: the baseline has 1, this run 2", "--concurrency", "2")
    refused("inputs: the baseline has", inputs={"x": [1, 4, 8, 8]})
    refused("a damaged baseline", results=[])
    refused("a damaged baseline", gauge={"sha256": "", "round_medians_us": [1.0]})
    refused(
        "expected a document of schema twofour.bench/1, got twofour.run/1", schema="twofour.run/1"
    )
    refused("bad share 'much'", "--max-slowdown", "much")
    stored.write_text("{")
    assert "it is no JSON" in twofour("bench", engine, "--baseline", stored).stderr
    stored.unlink()
    assert "no baseline at" in twofour("bench", engine, "--baseline", stored).stderr
    assert "there is no folder" in twofour("bench", engine, "--save", "no/b.json").stderr


def test_doubts(built: Path, tmp_path: Path) -> None:
    engine, stored = built / "model.engine", tmp_path / "b.json"
    twofour("bench", engine, *SHORT, "--save", stored)
    good = json.loads(stored.read_text())
    gauge = {**good["gauge"], "sha256": "another"}
    stored.write_text(
        json.dumps({**good, "gauge": gauge, "engine": {**good["engine"], "source_sha256": "other"}})
    )
    found = document(engine, "--baseline", stored, "--max-slowdown", "999%")["baseline"]
    assert len(found["doubts"]) == 2
    assert "another ONNX file" in found["doubts"][0]
    assert "another loop" in found["doubts"][1]
    assert found["gauge"] == 1.0
