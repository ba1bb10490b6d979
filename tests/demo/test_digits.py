"""The demo end to end, trained for one epoch: what it prints, what it leaves, how it judges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.structure import compare, structure
from twofour.bench.table import Row
from twofour.bench.timing import Timing
from twofour.cli import app
from twofour.demo import digits, side_by_side
from twofour.engine import Engine
from twofour.onnx_tools.inspect import inspect
from twofour.onnx_tools.load import load_model
from twofour.train import digits as training

ROWS = (
    "PyTorch f32",
    "ONNX Runtime f32",
    "ONNX Runtime INT8, same file",
    "ONNX Runtime INT8, its best",
    "twofour dense INT8",
    "twofour 2:4 INT8",
    "twofour 2:4/pair INT8",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a demo of one epoch leaves behind; the gate may be open or shut."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRAINING", "RECOVERY"):
            one = dataclasses.replace(getattr(training, name), epochs=1)
            patch.setattr(training, name, one)
            patch.setattr(digits, name, one)
        quick = side_by_side.Schedule(duration_s=0.05, slice_s=0.001)
        real = side_by_side.race
        patch.setattr(side_by_side, "race", lambda c, s, p: real(c, quick, p))
        result = CliRunner().invoke(app, ["demo", "--output-dir", str(folder)])
    torch.set_num_threads(threads)
    assert result.exit_code in (0, 1), result.output
    (folder / "stdout.txt").write_text(result.stdout)
    (folder / "exit_code.txt").write_text(str(result.exit_code))
    return folder


def test_the_json_document(folder: Path, request: pytest.FixtureRequest) -> None:
    """What --json prints is the summary, and its schema."""
    summary = {"schema": "twofour.demo/1", **json.loads((folder / "summary.json").read_text())}
    found = structure(summary, ("settings",))
    compare("demo/1", [found], update=request.config.getoption("--update-golden"))


def test_the_table_and_the_verdict_are_printed(folder: Path) -> None:
    text = (folder / "stdout.txt").read_text()
    for name in ROWS:
        assert name in text
    open_ = "the gate is open" in text
    assert open_ is ((folder / "exit_code.txt").read_text() == "0")
    assert open_ is not ("BROKEN" in text)
    assert "summary.json" in text


def test_the_summary_has_all_rows(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == list(ROWS)
    for row in summary["rows"]:
        assert 0 <= row["top1"] <= 1
        assert row["median_us"] > 0
        assert row["size_bytes"] > 1000
    assert summary["command"] == "twofour demo --seed 0"
    assert set(summary["settings"]) == set(ROWS)
    assert isinstance(summary["gate"]["passed"], bool)


def test_the_files_are_what_they_say(folder: Path) -> None:
    for stem, pattern in (("digits-24", "2:4"), ("digits-24pair", "2:4/pair")):
        for kind in ("f32", "int8"):
            weights = inspect(load_model(folder / f"{stem}.{kind}.onnx")).weights
            held = [pattern in weight.patterns for weight in weights]
            assert sum(held) == 8  # all but the first convolution and the last layer
        layers = Engine.load(folder / f"{stem}.engine").plan.layers
        assert sum(layer.pattern == pattern for layer in layers) == 8
        assert all(layer.tactic != "onnxruntime" for layer in layers)
    dense = inspect(load_model(folder / "digits-dense.int8.onnx")).weights
    assert not any(weight.patterns for weight in dense)


def test_int8_predicts_like_float(folder: Path) -> None:
    rows = {r["name"]: r for r in json.loads((folder / "summary.json").read_text())["rows"]}
    same, ours = rows["ONNX Runtime INT8, same file"]["top1"], rows["twofour 2:4 INT8"]["top1"]
    assert abs(same - ours) <= 0.02  # a last bit may tip a sample
    assert rows["PyTorch f32"]["top1"] == rows["ONNX Runtime f32"]["top1"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path / "file" / "demo")])
    assert result.exit_code == 2
    assert "cannot make the folder" in result.stderr


def row(name: str, top1: float, us: float) -> Row:
    return Row(name, "", top1, Timing(us, us, us, 0.0, 1, (us,), us, us, 1e6 / us), 1)


@pytest.mark.parametrize(
    ("top1", "us", "passed"), [(0.97, 40.0, True), (0.96, 40.0, False), (0.97, 70.0, False)]
)
def test_the_gate_compares_the_right_rows(top1: float, us: float, passed: bool) -> None:
    rows = [
        row("PyTorch f32", 0.98, 500.0),
        row("ONNX Runtime INT8, same file", 0.5, 300.0),
        row("ONNX Runtime INT8, its best", 0.5, 65.0),
        row("twofour 2:4 INT8", top1, us),
    ]
    assert digits.judge(rows).passed is passed
