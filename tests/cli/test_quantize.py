"""twofour quantize: its choices, and what it says when the result is far from the float model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.onnx_tools.load import load_model

X = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
FAR = ("--tensor", "*=uint8:0:1e-6")  # what clips every value


@pytest.fixture
def quantize(tmp_path: Path) -> Any:
    """Calls the command on a small network; its files lie in the folder."""
    model = conv_model(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=X)

    def call(*arguments: str | Path) -> Result:
        given = ("quantize", model, "-o", tmp_path / "q.onnx", "--data", tmp_path / "data.npz")
        return CliRunner().invoke(app, list(map(str, (*given, *arguments))))

    return call


def inputs_of_quantizers(folder: Path) -> set[str]:
    model = load_model(folder / "q.onnx")
    return {str(n.inputs[0].name) for n in model.graph if n.op_type == "QuantizeLinear"}


def test_how_near_the_outputs_are(quantize: Any) -> None:
    result = quantize("--json")
    (output,) = json.loads(result.stdout)["agreement"]["outputs"]
    assert 0.99 < output["worst_cosine"] <= output["cosine"] < 1
    assert "WARNING" not in result.stderr
    assert f"{output['name']} cosine" in quantize().stdout


def test_a_result_that_is_far_is_warned_about(quantize: Any, tmp_path: Path) -> None:
    result = quantize(*FAR)
    assert result.exit_code == 0
    assert "WARNING: output" in result.stderr
    assert "expected at least 0.99, on 8 samples" in result.stderr
    assert "the tensors that rounding harms most: " in result.stderr
    assert "dB)" in result.stderr
    assert "--recipe best" in result.stderr
    assert "--max-drop" in result.stderr
    assert (tmp_path / "q.onnx").exists()
    assert "--recipe best" not in quantize(*FAR, "--recipe", "best").stderr


def test_a_result_that_is_further_than_asked_for_is_an_error(quantize: Any, tmp_path: Path) -> None:
    result = quantize(*FAR, "--require-cosine", "0.5", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "GateError"
    assert not (tmp_path / "q.onnx").exists()
    assert quantize("--require-cosine", "0.99").exit_code == 0
    assert quantize("--require-cosine", "1").exit_code == 1


def test_choices_for_tensors_from_a_file_and_from_the_command_line(
    quantize: Any, tmp_path: Path
) -> None:
    (tmp_path / "choices.json").write_text(json.dumps({"*": "float", "x": "-9:9"}))
    assert quantize("--tensors", tmp_path / "choices.json").exit_code == 0
    assert inputs_of_quantizers(tmp_path) == {"x"}
    more = ("--tensor", "x=float", "--tensor", "*=-1:1")
    assert quantize("--tensors", tmp_path / "choices.json", *more).exit_code == 0
    assert len(inputs_of_quantizers(tmp_path)) > 1
    result = quantize("--tensor", "nobody=0:1")
    assert result.exit_code == 2
    assert "no tensor 'nobody' is quantized" in result.stderr


def test_first_and_last_layers_and_operators(quantize: Any) -> None:
    result = quantize("--first-last", "float")
    assert result.exit_code == 2  # it has no others
    assert "1 Conv: it is a first layer" in result.stderr
    assert "1 Gemm: it is a last layer" in result.stderr
    result = json.loads(quantize("--include", "op:Conv", "--json").stdout)
    assert [each["op"] for each in result["float_layers"]] == ["Gemm"]
    assert quantize("--exclude", "op:GRU").exit_code == 2


def test_weights_as_floats(quantize: Any, tmp_path: Path) -> None:
    assert quantize().exit_code == 0
    small = (tmp_path / "q.onnx").stat().st_size
    result = json.loads(quantize("--weights", "float", "--json").stdout)
    assert result["size_bytes"] > small
    assert result["float_layers"] == []


def test_a_step_that_a_recipe_does_not_have(quantize: Any) -> None:
    result = quantize("--no-step", "polish")
    assert result.exit_code == 2
    assert "recipe fast has no such step" in result.stderr
    assert quantize("--step", "polish").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tensorrt-table", "q.onnx"), "--output and --tensorrt-table are one file"),
        (("--report", "q.onnx"), "--output and --report are one file"),
        (("--report", "./m.onnx"), "the model and --report are one file"),
        (("--calibration-cache", "q.onnx"), "--output and --calibration-cache are one file"),
        (
            ("--calibration-cache", "a", "--cache", "a", "--max-drop", "1"),
            "--calibration-cache and --cache are one file",
        ),
        (("--tensorrt-table", "t", "--activation", "uint8"), "no calibration table can hold"),
        (("--tensorrt-table", "none/t"), "there is no folder none"),
        (("--step", "bias", "--no-step", "bias"), "--step bias and --no-step bias exclude"),
        (("--softmax", "--no-attention"), "--softmax and --no-attention exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_work(
    quantize: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = quantize(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "fix: " in result.stderr
    assert "calibrating" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert quantize("--no-softmax", "--no-attention").exit_code == 0


def test_a_bound_on_outputs_needs_data(tmp_path: Path, quantize: Any) -> None:
    cache = ("--calibration-cache", str(tmp_path / "c"))
    assert quantize(*cache).exit_code == 0
    paths = (str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"))
    arguments = ["quantize", *paths, *cache, "--require-cosine", "0.9"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--require-cosine needs data" in result.stderr
    assert "calibrating" not in result.stderr


def test_a_table_of_other_floats_is_warned_about(quantize: Any, tmp_path: Path) -> None:
    table = ("--tensorrt-table", tmp_path / "t")
    assert "WARNING: the scales" not in quantize(*table).stderr
    result = quantize(*table, "--step", "equalize")
    assert result.exit_code == 0
    assert f"WARNING: the scales in {tmp_path / 't'}" in "".join(result.stderr.split("\n"))


def test_the_size_before_is_that_of_the_float_file(quantize: Any, tmp_path: Path) -> None:
    size = (tmp_path / "m.onnx").stat().st_size
    result = quantize("-o", tmp_path / "m.onnx")
    assert result.exit_code == 0
    assert f"instead of {size / 1e3:.0f}," in result.stdout


def test_every_option_is_explained() -> None:
    text = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "100"}).stdout
    for name in ("--recipe", "--first-last", "--tensor", "--weights", "--require-cosine"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 100
