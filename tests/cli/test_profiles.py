"""Ranges of shapes and several profiles on the command line, from build to bench."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.cli.options import parse_profiles, parse_shapes
from twofour.core.errors import InputError
from twofour.engine import Engine


def twofour(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of 1 to 6 timed at 2, and exactly 9."""
    folder = tmp_path_factory.mktemp("profiles")
    model, path = conv_model(folder / "model.onnx", scale=0.2), folder / "model.engine"
    ranges = ("--shapes", "x:1x4x8x8:2x4x8x8:6x4x8x8", "--shapes", "x:9x4x8x8")
    result = twofour("build", model, "-o", path, *ranges)
    assert result.exit_code == 0, result.output
    assert "runs x [batch 1-6, 4, 8, 8]" in result.stdout
    assert "runs x [9, 4, 8, 8]" in result.stdout
    return path


@pytest.mark.parametrize("batch", [1, 5, 9])
def test_run_takes_what_fits(engine: Path, batch: int, tmp_path: Path) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    ran = twofour("run", engine, "--input", f"x={tmp_path / 'x.npy'}", "--output-dir", tmp_path)
    assert ran.exit_code == 0, ran.output
    assert np.load(tmp_path / "y.npy").shape == (batch, 10)


def test_run_refuses_what_fits_nowhere(engine: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((7, 4, 8, 8), np.float32))
    ran = twofour("run", engine, "--input", f"x={tmp_path / 'x.npy'}", "--output-dir", tmp_path)
    assert ran.exit_code == 2
    assert "profile 1 takes x float32 [batch 1-6, 4, 8, 8]" in ran.stderr
    assert "profile 2: x[0]: expected 9, got 7" in ran.stderr


def test_inspect_shows_the_profiles(engine: Path) -> None:
    text = twofour("inspect", engine).stdout
    assert "profile 1 of 2" in text
    assert "input  x: float32 [batch 1-6, 4, 8, 8]" in text
    assert "output y: float32 [9, 10]" in text
    plan = json.loads(twofour("inspect", engine, "--json").stdout)["plan"]
    assert [len(profile["symbols"]) for profile in plan["profiles"]] == [1, 0]


def test_explain_shows_one_profile(engine: Path) -> None:
    count = len(Engine.load(engine).plan.layers) // 2
    for number, batch in ((1, "2"), (2, "9")):
        told = twofour("explain", engine, "--profile", number, "--json")
        layers = json.loads(told.stdout)["layers"]
        assert len(layers) == count
        assert all(layer["shape"].startswith(f"{batch}x") for layer in layers)
        assert f"profile {number} of 2" in twofour("explain", engine, "--profile", number).stdout
    refused = twofour("explain", engine, "--profile", 3)
    assert refused.exit_code == 2
    assert "expected 1 to 2" in refused.stderr


def test_bench_takes_a_shape_of_the_engine(engine: Path) -> None:
    for arguments, batch in (([], 2), (["--batch", 9], 9), (["--shapes", "x:5x4x8x8"], 5)):
        result = twofour("bench", engine, "--duration", "0.05", "--json", *arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["inputs"] == {"x": [batch, 4, 8, 8]}
    refused = twofour("bench", engine, "--shapes", "x:7x4x8x8")
    assert refused.exit_code == 2
    assert "expected batch from 1 to 6, got 7" in refused.stderr
    assert "no input 'z'" in twofour("bench", engine, "--shapes", "z:1x2").stderr


def test_texts_become_profiles() -> None:
    texts = ["a:1x2:3x4:5x6", "b:0:7", "a:8x9", "b:0:1:2:3"]
    assert parse_profiles(texts) == [
        {"a": ((1, 2), (3, 4), (5, 6)), "b:0": (7,)},
        {"a": (8, 9), "b:0": ((1,), (2,), (3,))},
    ]
    assert parse_profiles(None) == []
    assert parse_shapes(["a:1x2", "b:3"]) == {"a": (1, 2), "b": (3,)}


@pytest.mark.parametrize(
    "text", ["a", "a:", "a:1x", "a:0x1", "a:1x2:3x4:0x1", ":1x2", "a:1x2:", "a:-1"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="bad --shapes"):
        parse_profiles([text])


def test_a_range_is_no_shape() -> None:
    with pytest.raises(InputError, match="each name once"):
        parse_shapes(["a:1x2:3x4:5x6"])
    with pytest.raises(InputError, match="each name once"):
        parse_shapes(["a:1", "a:2"])
