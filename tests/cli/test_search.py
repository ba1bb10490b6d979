"""twofour search as it is called: its files, its exit codes, what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.cli.test_json_schemas import twofour
from tests.evaluate.networks import LAYERS, network, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.cli.search import parse_time_us
from twofour.core.errors import InputError

QUICK = (
    *("--precision", "int8", "--pattern", "2:4", "--prune-method", "magnitude"),
    *("--tuning-effort", "1", "--evaluations", "6", "--cache", "cache.jsonl"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("search")
    dense = save(network(weights()), here / "model.onnx")
    x = samples(48)
    np.savez(here / "data.npz", x=x, labels=outputs(dense, x).argmax(1))
    return here


def test_it_writes_the_recipe_and_the_page_and_misses_a_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    call = ("search", "model.onnx", "--data", "data.npz", *QUICK)
    files = ("-o", "recipe.yaml", "--report", "page.html")
    result = twofour(*call, "--max-drop", "5", *files)
    assert result.exit_code == 0, result.output
    assert "the answer: " in result.stdout
    assert "make it:  twofour pipeline recipe.yaml" in result.stdout
    assert "calibrated, pruned and judged on the same samples" in " ".join(result.stdout.split())
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert set(recipe["layers"]) == set(LAYERS)
    assert recipe["model"] == {"onnx": "model.onnx"}
    page = (folder / "page.html").read_text()
    assert "What each layer should be" in page

    (folder / "recipe.yaml").unlink()
    result = twofour(*call, "--max-latency", "0.01us", *files)
    assert result.exit_code == 1
    assert "no engine takes at most 0.01 us; the fastest " in result.stderr
    assert not (folder / "recipe.yaml").exists()
    result = twofour(*call, "--max-latency", "0.01us", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["answer"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a search needs one bound"),
        (("--max-drop", "1", "--max-latency", "1ms"), "a search needs one bound"),
        (("--max-latency", "5"), "bad time '5'"),
        (("--max-latency", "0ms"), "bad time '0ms'"),
        (("--max-drop", "-1"), "bad bound -1.0"),
        (("--max-drop", "1", "--pattern", "1:9"), "no kernels for pattern '1:9'"),
        (("--max-drop", "1", "-o", "none/recipe.yaml"), "cannot write none/recipe.yaml"),
        (("--max-drop", "1", "--metric", "topp"), "no metric 'topp'"),
        (("--max-drop", "1", "--calibration-data", "none.npz"), "no data at none.npz"),
    ],
)
def test_bad_input_is_found_before_any_work(
    arguments: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = twofour("search", "model.onnx", "--data", "data.npz", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "times:" not in result.stderr


@pytest.mark.parametrize(("text", "us"), [("250us", 250), ("1.5ms", 1500), ("0.2 s", 200_000)])
def test_times(text: str, us: float) -> None:
    assert parse_time_us(text) == pytest.approx(us)


@pytest.mark.parametrize("text", ["", "5", "ms", "-1ms", "1e3us", "0us", "1min", "nanus"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="bad time"):
        parse_time_us(text)
