"""`--calibration-cache` of quantize and build: one file for both, and no run where it has all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.runner import Runner
from twofour.onnx_tools.tensorrt_table import read_table, scales_of

X = np.random.default_rng(0).standard_normal((24, 4, 8, 8)).astype(np.float32)
QUICK = ("--tuning-effort", "0", "--no-race")


def twofour(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    conv_model(tmp_path / "m.onnx", scale=0.2)
    np.savez(tmp_path / "data.npz", x=X)
    return tmp_path


def quantize(here: Path, name: str, *more: str | Path) -> Result:
    return twofour("quantize", here / "m.onnx", "-o", here / name, *more)


def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Runner, inputs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(Runner, "run", run)


def test_one_cache_serves_quantize_and_build(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = ("--calibration-cache", here / "c.json"), ("--data", here / "data.npz")
    first = quantize(here, "a.onnx", *data, *cache, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["calibration"] == ""
    no_run(monkeypatch)
    again = quantize(here, "b.onnx", *cache)
    assert again.exit_code == 0, again.output
    assert "24 samples seen before: nothing was run" in " ".join(again.output.split())
    assert (here / "a.onnx").read_bytes() == (here / "b.onnx").read_bytes()
    other = quantize(here, "c.onnx", *cache, "--method", "entropy")
    assert other.exit_code == 0, other.output
    built = twofour(
        "build", here / "m.onnx", "-o", here / "m.engine", "--int8", *cache, *QUICK, "--json"
    )
    assert built.exit_code == 0, built.output
    notes = json.loads(built.stdout)["notes"]
    assert any("nothing was run" in note for note in notes)


def test_build_makes_the_cache_that_quantize_takes(here: Path) -> None:
    cache, data = ("--calibration-cache", here / "c.json"), ("--data", here / "data.npz")
    built = twofour(
        "build", here / "m.onnx", "-o", here / "m.engine", "--int8", *data, *cache, *QUICK
    )
    assert built.exit_code == 0, built.output
    quantized = quantize(here, "a.onnx", *cache)
    assert quantized.exit_code == 0, quantized.output


def test_tensorrts_table_is_written_and_taken(here: Path) -> None:
    table = here / "t.cache"
    first = quantize(here, "a.onnx", "--data", here / "data.npz", "--tensorrt-table", table)
    assert first.exit_code == 0, first.output
    assert table.read_text().startswith("TRT-8601-EntropyCalibration2\n")
    assert read_table(table) == scales_of(load_model(here / "a.onnx"))
    again = quantize(here, "b.onnx", "--calibration-cache", table)
    assert again.exit_code == 0, again.output
    assert (here / "a.onnx").read_bytes() == (here / "b.onnx").read_bytes()


@pytest.mark.parametrize("command", ["quantize", "build"])
def test_neither_data_nor_a_cache(here: Path, command: str) -> None:
    int8 = ["--int8"] if command == "build" else []
    arguments = (command, here / "m.onnx", "-o", here / "out", *int8)
    for more in ((), ("--calibration-cache", here / "none.json")):
        result = twofour(*arguments, *more)
        assert result.exit_code == 2
        assert "there is no data to calibrate with" in result.stderr
        assert ("no calibration cache" in result.stderr) == bool(more)
    assert not (here / "out").exists()


def test_a_cache_without_int8_is_of_no_use(here: Path) -> None:
    cache = ("--calibration-cache", here / "c.json")
    result = twofour("build", here / "m.onnx", "-o", here / "m.engine", *cache)
    assert result.exit_code == 2
    assert "--calibration-cache is of no use without --int8" in result.stderr


def test_a_cache_of_another_model(here: Path) -> None:
    cache, data = ("--calibration-cache", here / "c.json"), ("--data", here / "data.npz")
    assert quantize(here, "a.onnx", *data, *cache).exit_code == 0
    conv_model(here / "m.onnx", scale=0.3)
    result = quantize(here, "b.onnx", *data, *cache)
    assert result.exit_code == 2
    assert "is of another model" in result.stderr
    assert not (here / "b.onnx").exists()
