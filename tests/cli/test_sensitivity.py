"""twofour sensitivity: what it prints and writes, and what it refuses before any work."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from tests.cli.test_json_schemas import made_up_forecast, twofour
from tests.evaluate.networks import network, samples, save, weights

SCAN = ("sensitivity", "model.onnx", "--data", "data.npz", "--metric", "loss")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model.onnx with the layers c0, c1, c2 and fc; data.npz; unlabelled.npz; gains.json."""
    save(network(weights()), tmp_path / "model.onnx")
    x = samples(16)
    np.savez(tmp_path / "data.npz", x=x, labels=np.arange(16) % 5)
    np.savez(tmp_path / "unlabelled.npz", x=x)
    gains = {"c0": 4.0, "c1": 2.0, "c2": 1.0, "fc": 0.0}
    (tmp_path / "gains.json").write_text(json.dumps(made_up_forecast(gains)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments: str) -> Result:
    """Exit code 2, and nothing was scanned."""
    result = twofour(*arguments)
    assert result.exit_code == 2, result.output
    assert "the dense network" not in result.stderr
    return result


def test_the_page_the_plot_and_the_command_to_go_on(folder: Path) -> None:
    result = twofour(
        *(*SCAN, "--forecast", "gains.json", "-o", "layers.html", "--plot", "layers.png")
    )
    assert result.exit_code == 0, result.output
    assert "4 networks to judge" in result.stderr
    assert "gains in int8" in result.stdout
    assert "layers.html" in result.stdout
    assert (folder / "layers.html").read_text().startswith("<!doctype html>")
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    arguments = command_to_go_on(result.stdout)
    wanted = "prune model.onnx -o sparse.onnx --pattern 2:4 --skip"
    assert arguments[:7] == wanted.split()
    pruned = twofour(*arguments, "--json")
    assert pruned.exit_code == 0, pruned.output
    left = [each["node"] for each in json.loads(pruned.stdout)["layers"] if not each["pruned"]]
    assert "fc" in left  # it gains nothing
    assert sum({"c0": 4, "c1": 2, "c2": 1, "fc": 0}[each] for each in left) <= 0.7


def command_to_go_on(output: str) -> list[str]:
    """The arguments of the `twofour prune` that is printed."""
    (line,) = [each for each in output.splitlines() if each.startswith("90% of the gain:")]
    return shlex.split(line.partition("twofour ")[2])


def test_the_command_leaves_dense_what_was_not_measured(folder: Path) -> None:
    """A layer of no known gain; and one that was excluded, by its name in the file."""
    nameless = network(weights())
    nameless.graph.node[0].ClearField("name")
    save(nameless, folder / "model.onnx")
    (folder / "gains.json").write_text(json.dumps(made_up_forecast({"c1": 2.0, "c2": 1.0})))
    result = twofour(*SCAN, "--forecast", "gains.json", "--skip", "c0.w")
    assert result.exit_code == 0, result.output
    arguments = command_to_go_on(result.stdout)
    assert arguments[-4:] == ["--skip", "fc", "--skip", "c0.w"]
    pruned = json.loads(twofour(*arguments, "--json").stdout)
    assert [each["weight"] for each in pruned["layers"] if each["pruned"]] == ["c1.w", "c2.w"]


def test_a_pattern_that_the_forecast_lacks_is_told(folder: Path) -> None:
    result = twofour(*SCAN, "--forecast", "gains.json", "--pattern", "2:4", "--pattern", "4:8")
    assert result.exit_code == 0, result.output
    assert "no gains of 4:8: the forecast has no times of it in int8" in result.stderr


def test_gains_are_measured_where_the_model_is_small(folder: Path) -> None:
    result = twofour(*SCAN, "--samples", "4", "--json")
    document = json.loads(result.stdout)
    assert "INT8 2:4:" in result.stderr
    assert document["tradeoffs"][0]["precision"] == "int8"
    assert "1 thread on" in document["machine"]
    assert document["samples"] == 4


def test_without_gains(folder: Path) -> None:
    result = twofour(*SCAN, "--forecast", "none", "--pattern", "4:8", "--json")
    document = json.loads(result.stdout)
    assert document["tradeoffs"] == []
    assert [case["layer"] for case in document["cases"]] == ["c0", "c1", "c2", "fc"]
    assert document["cases"][0]["pattern"] == "4:8"


def test_a_pattern_without_kernels_is_scanned_and_the_reason_told(folder: Path) -> None:
    result = twofour(*SCAN, "--pattern", "4:8")
    assert result.exit_code == 0, result.output
    assert "no gains could be measured: nothing can be forecast for 4:8" in result.stderr
    assert "us gained" not in result.stdout


def test_labels_are_asked_for_before_any_work(folder: Path) -> None:
    result = refused("sensitivity", "model.onnx", "--data", "unlabelled.npz")
    assert "metric top1 needs labels" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pattern", "4:2"), "unknown sparsity pattern '4:2'"),
        (("--skip", "*"), "no layer of model.onnx can be pruned"),
        (("--metric", "top9"), "no metric 'top9'"),
        (("--metric-output", "z"), "no output 'z'"),
        (("--cache", "no/cache.jsonl"), "cannot write the cache no/cache.jsonl"),
        (("-o", "no/page.html"), "cannot write no/page.html"),
        (("--plot", "."), "cannot write ."),
        (("--forecast", "none.json"), "cannot read forecast none.json"),
        (("--forecast", "other.json"), "forecast other.json is of another model"),
        (("--forecast", "gains.json", "--precision", "bf16"), "has no times in bf16"),
        (("--forecast", "measure", "--pattern", "4:8"), "nothing can be forecast for 4:8"),
        (("--shapes", "x"), "bad --shapes"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    (folder / "other.json").write_text(json.dumps(made_up_forecast({"conv1": 1.0})))
    assert message in refused(*SCAN, *options).stderr


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.cli.options.find_spec", lambda name: None)
    result = refused(*SCAN, "--plot", "p.png")
    assert "missing: matplotlib" in result.stderr
    assert "pip install 'twofour[report]'" in result.stderr
    assert "missing: jinja2" in refused(*SCAN, "-o", "p.html").stderr
