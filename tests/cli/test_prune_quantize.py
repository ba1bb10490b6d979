"""prune, then quantize, then build, all on the command line; and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.promises import check, promise
from twofour.onnx_tools.weights import layer_weights

X = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)


def twofour(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_file_is_pruned_quantized_and_built(tmp_path: Path) -> None:
    model, data = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz"
    np.savez(data, x=X)
    sparse, int8, engine = (tmp_path / name for name in ("s.onnx", "q.onnx", "m.engine"))
    pruned = twofour("prune", model, "-o", sparse, "--json")
    assert pruned.exit_code == 0, pruned.output
    report = json.loads(pruned.stdout)["layers"]
    assert any(layer["pruned"] and 0.5 < layer["energy_kept"] < 1 for layer in report)
    quantized = twofour("quantize", sparse, "-o", int8, "--data", data, "--json")
    assert quantized.exit_code == 0, quantized.output
    kept = json.loads(quantized.stdout)["patterns"]
    assert kept == {layer["node"]: "2:4" for layer in report if layer["pruned"]}
    weights = {layer.name: w.values for layer, w in layer_weights(load_model(int8))}
    assert all(weights[name].dtype == np.int8 and is_pattern(weights[name], "2:4") for name in kept)
    built = twofour("build", int8, "-o", engine, "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["fallback"] == 0


def test_nothing_to_prune_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    result = twofour("prune", model, "-o", tmp_path / "s.onnx", "--skip", "*")
    assert result.exit_code == 2
    assert "excluded by name" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_bad_calibration_data_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    model, data = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz"
    for bad in (np.full_like(X, np.nan), X[:0]):
        np.savez(data, x=bad)
        result = twofour("quantize", model, "-o", tmp_path / "q.onnx", "--data", data)
        assert result.exit_code == 2
        assert not (tmp_path / "q.onnx").exists()


def test_operators_of_onnx_runtime_are_pruned_and_quantized(tmp_path: Path) -> None:
    body = """<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>
    agraph (float[n,4,8,8] x) => (float[n,8,8,8] y) {
        y = com.microsoft.FusedConv <activation = "Relu", kernel_shape = [1, 1]> (x, w)
    }"""
    proto = onnx.parser.parse_model(body)
    w = np.random.default_rng(0).standard_normal((8, 4, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=X)
    pruned = twofour("prune", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--json")
    assert [layer["pruned"] for layer in json.loads(pruned.stdout)["layers"]] == [True]
    arguments = ("-o", tmp_path / "q.onnx", "--data", tmp_path / "data.npz", "--json")
    quantized = json.loads(twofour("quantize", tmp_path / "m.onnx", *arguments).stdout)
    assert quantized["int8_layers"] == 1
    assert quantized["float_layers"] == []


def test_what_stays_float_is_told_with_the_reason(tmp_path: Path) -> None:
    model, data = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz"
    np.savez(data, x=X)
    arguments = ("-o", tmp_path / "q.onnx", "--data", data, "--exclude", "linear")
    result = twofour("quantize", model, *arguments)
    assert result.exit_code == 0
    assert "layers with weights in int8" in result.stdout
    assert "float: excluded by name" in result.stdout
    assert "linear (Gemm)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_what_was_pruned_and_what_was_not(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    result = twofour("prune", model, "-o", tmp_path / "s.onnx", "--skip", "linear")
    assert "left as it was: excluded by name" in result.stdout
    assert "% of its energy or more" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_broken_promise_is_shown_by_inspect_and_stops_quantize_and_build(tmp_path: Path) -> None:
    model, data, out = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=X)
    dense = load_model(model)
    promise(dense, {"w": "2:4"})
    save_model(dense, model)
    for command in (("quantize", model, "--data", data), ("build", model)):
        result = twofour(*command, "-o", out)
        assert result.exit_code == 1
        assert "weight 'w' of Conv 'conv': output channel 0, tap (0,0), channels 0-3 hold 4" in (
            " ".join(result.stderr.split())
        )
        assert not out.exists()
    shown = twofour("inspect", model)
    assert "promised patterns: 0 kept, 1 broken" in shown.stdout
    assert "- w is promised 2:4, broken in Conv 'conv': output channel 0" in shown.stdout
    assert twofour("build", model, "-o", out, "--sparsity", "disable").exit_code == 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_data_prunes_with_less_error(method: str, tmp_path: Path) -> None:
    model, data, out = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz", tmp_path / "s.onnx"
    np.savez(data, x=X)
    arguments = ("prune", model, "-o", out, "--method", method, "--data", data)
    shown = twofour(*arguments, "--include", "con*", "--samples", "3", "--memory", "64k")
    assert shown.exit_code == 0, shown.output
    assert "left as it was: not included by name" in shown.stdout
    assert f"1 of 2 weights pruned to 2:4 by {method}" in " ".join(shown.stdout.split())
    assert ("output error" in shown.stdout) == (method == "sparsegpt")
    document = json.loads(twofour(*arguments, "--json").stdout)
    assert document["method"] == method
    assert [layer["method"] for layer in document["layers"]] == [method, method]
    errors = [layer["output_error"] for layer in document["layers"]]
    assert all((error is None) == (method == "wanda") for error in errors)
    assert all(is_pattern(w.values, "2:4") for _, w in layer_weights(load_model(out)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "wanda"), "--method wanda needs --data"),
        (("--method", "sparsegpt"), "--method sparsegpt needs --data"),
        (
            ("--data", "data.npz", "--no-correct"),
            "--data is not used by --method magnitude --no-correct",
        ),
        (("--method", "sparsegpt", "--data", "none.npz"), "no data at none.npz"),
        (("--method", "sparsegpt", "--data", "small.npz"), "does not fit the model's inputs"),
        (("--method", "sparsegpt", "--data", "data.npz", "--memory", "much"), "bad size 'much'"),
        (("--method", "wanda", "--data", "data.npz", "--memory", "0"), "memory_bytes"),
        (("--include", "none"), "'none' matches no layer"),
    ],
)
def test_what_prune_refuses_leaves_no_file(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    conv_model(tmp_path / "m.onnx")
    np.savez("data.npz", x=X)
    np.savez("small.npz", x=X[:, :, :4])
    result = twofour("prune", "m.onnx", "-o", "s.onnx", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "m.onnx", "small.npz"]


def test_data_corrects_what_pruning_shifts_and_promises_are_in_the_file(tmp_path: Path) -> None:
    model, data = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz"
    np.savez(data, x=X)
    plain, fixed = tmp_path / "plain.onnx", tmp_path / "fixed.onnx"
    for out, more in ((plain, ("--no-correct",)), (fixed, ("--correct",))):
        method = ("--method", "wanda", "--data", data, *more)
        result = twofour("prune", model, "-o", out, *method, "--json")
        assert result.exit_code == 0, result.output
        corrected = json.loads(result.stdout)["corrected"]
        wanted = ["scale and bias"] * 2 if out == fixed else []
        assert [entry["done"] for entry in corrected] == wanted
        assert {e.weight: e.pattern for e in check(load_model(out)).entries} == {
            "w": "2:4", "fc": "2:4"}  # fmt: skip
    arrays = [{n: w.values for n, w in layer_weights(load_model(p))} for p in (plain, fixed)]
    for before, after in zip(*(a.values() for a in arrays), strict=True):
        assert ((before == 0) == (after == 0)).all()
        assert (before != after).any()
    shown = twofour("prune", model, "-o", fixed, "--data", data)
    assert "corrected: 1 by scale and bias" in shown.stdout
    assert "of layers, only Conv was asked for" in shown.stdout


def test_what_sparsegpt_pruned_is_corrected_only_on_request(tmp_path: Path) -> None:
    model, data = conv_model(tmp_path / "m.onnx"), tmp_path / "data.npz"
    np.savez(data, x=X)
    for more, corrected in (((), 0), (("--correct",), 2)):
        method = ("--method", "sparsegpt", "--data", data, *more)
        result = twofour("prune", model, "-o", tmp_path / "s.onnx", *method, "--json")
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["corrected"]) == corrected


def test_pruning_mends_what_it_prunes_and_refuses_what_stays_broken(tmp_path: Path) -> None:
    model, out = conv_model(tmp_path / "m.onnx"), tmp_path / "s.onnx"
    dense = load_model(model)
    promise(dense, {"w": "2:4"})
    save_model(dense, model)
    assert twofour("prune", model, "-o", out).exit_code == 0
    assert not any(entry.broken for entry in check(load_model(out)).entries)
    out.unlink()
    result = twofour("prune", model, "-o", out, "--skip", "conv")
    assert result.exit_code == 1
    assert "pruning breaks the promised sparsity pattern of 1 of 2 weights" in result.stderr
    assert not out.exists()


def test_dynamic_needs_no_data_and_refuses_what_calibrates(tmp_path: Path) -> None:
    model, out = conv_model(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    result = twofour("quantize", model, "-o", out, "--dynamic", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["method"], document["int8_layers"]) == ("dynamic", 1)
    assert {layer["op"] for layer in document["float_layers"]} == {"Conv"}
    out.unlink()
    for options in (("--method", "mse"), ("--data", "x.npz"), ("--weights", "float")):
        refused = twofour("quantize", model, "-o", out, "--dynamic", *options)
        assert refused.exit_code == 2
        assert f"{options[0]} and --dynamic exclude each other" in refused.stderr
    assert not out.exists()
    missing = twofour("quantize", model, "-o", out)
    assert missing.exit_code == 2
    assert "expected --data" in missing.stderr
