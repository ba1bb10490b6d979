"""build, inspect, run, bench on a small model; for each bad input one error, code 2, no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.core.bfloat16 import ROUNDING
from twofour.core.target import host_target, why_no_bf16
from twofour.engine import Engine

X = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)


def twofour(*arguments: str | Path) -> Result:
    """In this process: bugs are raised, our errors are exit codes."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, model.engine and x.npy."""
    folder = tmp_path_factory.mktemp("built")
    conv_model(folder / "model.onnx", scale=0.2)
    np.save(folder / "x.npy", X)
    result = twofour("build", folder / "model.onnx", "-o", folder / "model.engine")
    assert result.exit_code == 0, result.output
    return folder


def test_build_says_what_it_made(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    result = twofour("build", model, "-o", tmp_path / "m.engine", "--json")
    document = json.loads(result.stdout)
    assert document["size_bytes"] == (tmp_path / "m.engine").stat().st_size
    assert document["dense"] + document["sparse"] == 2
    assert document["fallback"] == 0
    assert Engine.load(tmp_path / "m.engine").plan.source_name == "m.onnx"


def test_build_quantizes_prunes_and_keeps_times(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.repeat(X, 8, axis=0))
    result = twofour(
        *("build", model, "-o", tmp_path / "m.engine", "--int8", "--data", tmp_path / "data.npz"),
        *("--sparsity", "force", "--timing-cache", tmp_path / "m.timings", "--quiet"),
    )
    assert (result.exit_code, result.output) == (0, "")
    layers = Engine.load(tmp_path / "m.engine").plan.layers
    conv = next(layer for layer in layers if layer.name == "conv")
    assert conv.precision == "int8"
    assert conv.tactic.startswith("2:4")
    assert (tmp_path / "m.timings").exists()


@pytest.mark.parametrize("isa", ["vector"])
def test_build_for_a_forced_instruction_set(isa: str, built: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    twofour("build", built / "model.onnx", "-o", engine, "--isa", isa)
    assert Engine.load(engine).plan.target.isa == isa
    twofour("run", engine, "--input", f"x={built / 'x.npy'}", "--output-dir", tmp_path)
    twofour("run", built / "model.engine", "--input", f"x={built / 'x.npy'}", "--output-dir", built)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), np.load(built / "y.npy"), rtol=1e-4, atol=1e-4
    )


def test_build_in_bfloat16(built: Path, tmp_path: Path) -> None:
    """Where the CPU has it; else in float32, and explain says so.

    Nothing is timed, since a layer this small may be faster in float32.
    """
    engine = tmp_path / "e.engine"
    twofour("build", built / "model.onnx", "-o", engine, "--bf16", "--tuning-effort", "0")
    reason = why_no_bf16(host_target())
    shown = twofour("explain", engine, "--layer", "conv").stdout
    assert ("float32" if reason else "bfloat16") in shown
    assert ("not bfloat16" in shown) == bool(reason)
    twofour("run", engine, "--input", f"x={built / 'x.npy'}", "--output-dir", tmp_path)
    session = onnxruntime.InferenceSession(str(built / "model.onnx"))
    (expected,) = session.run(None, {"x": X})
    error = np.abs(np.load(tmp_path / "y.npy") - expected).max()
    assert error > 0 or reason
    assert error <= 4 * ROUNDING * np.abs(expected).max()


def test_build_for_a_shape(built: Path, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    twofour("build", built / "model.onnx", "-o", engine, "--shapes", "x:3x4x8x8")
    assert Engine.load(engine).plan.inputs[0].shape == (3, 4, 8, 8)


def test_run_computes_the_network(built: Path, tmp_path: Path) -> None:
    result = twofour(
        *("run", built / "model.engine", "--input", f"x={built / 'x.npy'}"),
        *("--output-dir", tmp_path / "new" / "folder", "--json"),
    )
    document = json.loads(result.stdout)
    found = np.load(document["outputs"]["y"]["file"])
    session = onnxruntime.InferenceSession(str(built / "model.onnx"))
    (expected,) = session.run(None, {"x": X})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert document["outputs"]["y"]["shape"] == [1, 10]


def test_inspect_shows_an_engine(built: Path) -> None:
    text = twofour("inspect", built / "model.engine").stdout
    assert "engine of model.onnx" in text
    assert "runs here" in text
    assert "input  x: float32 [1, 4, 8, 8]" in text
    document = json.loads(twofour("inspect", built / "model.engine", "--json").stdout)
    assert document["plan"]["source_name"] == "model.onnx"


def test_inspect_shows_a_model(built: Path) -> None:
    text = twofour("inspect", built / "model.onnx").stdout
    for part in ("opset 18", "input  x: float batchx4x8x8", "1 Conv", "8x4x3x3", "dense"):
        assert part in text
    document = json.loads(twofour("inspect", built / "model.onnx", "--json").stdout)
    assert [weight["node"] for weight in document["weights"]] == ["conv", "linear"]


def test_bench_of_an_engine_with_peers(built: Path) -> None:
    result = twofour(
        *("bench", built / "model.engine", "--model", built / "model.onnx"),
        *("--vs", "onnxruntime,openvino", "--duration", "0.05", "--json"),
    )
    document = json.loads(result.stdout)
    names = [row["name"] for row in document["results"]]
    assert names == ["twofour", "ONNX Runtime", "OpenVINO"]
    assert all(row["timing"]["median_us"] > 0 for row in document["results"])
    assert document["results"][1]["ours_is"]["median"] > 0
    (difference,) = document["differences_from_onnxruntime"]
    assert difference["cosine"] > 0.9999


def test_bench_with_pytorch(built: Path, tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Conv2d(4, 8, 3), (torch.from_numpy(X),))
    torch.export.save(program, tmp_path / "m.pt2")
    threads = torch.get_num_threads()
    try:
        result = twofour(
            *("bench", built / "model.engine", "--vs", "torch", "--torch", tmp_path / "m.pt2"),
            *("--duration", "0.05"),
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "PyTorch 2" in result.stdout


def test_bench_of_a_model_builds_it(built: Path) -> None:
    result = twofour(
        *("bench", built / "model.onnx", "--vs", "onnxruntime", "--batch", "2"),
        *("--duration", "0.05"),
    )
    assert result.exit_code == 0
    assert "ONNX Runtime" in result.stdout
    assert "cosine 1.000" in result.stdout


def test_bench_says_when_the_peers_run_another_file(built: Path, tmp_path: Path) -> None:
    other = conv_model(tmp_path / "other.onnx", scale=0.3)
    result = twofour(
        *("bench", built / "model.engine", "--model", other, "--vs", "onnxruntime"),
        *("--duration", "0.05"),
    )
    assert "was built from model.onnx, the peers run" in result.stderr.replace("\n", " ")


def text_file(folder: Path) -> Path:
    (folder / "text.onnx").write_text("this is no model\n" * 9)
    return folder / "text.onnx"


def test_bad_models(tmp_path: Path, built: Path) -> None:
    engine = tmp_path / "e.engine"
    refused(twofour("build", tmp_path / "none.onnx", "-o", engine), "no model at")
    refused(twofour("build", text_file(tmp_path), "-o", engine), "text file")
    refused(twofour("build", built / "model.engine", "-o", engine), "not an ONNX model")
    refused(twofour("bench", tmp_path / "none.onnx"), "no model at")
    refused(twofour("inspect", tmp_path / "none.onnx"), "no model at")
    refused(twofour("inspect", text_file(tmp_path)), "text file")
    refused(twofour("inspect", tmp_path / "none.engine"), "no engine at")
    refused(twofour("explain", text_file(tmp_path)), "not a readable engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.onnx"]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (np.full((4, 4, 8, 8), np.nan, np.float32), ["NaN"]),
        (np.zeros((0, 4, 8, 8), np.float32), ["no samples"]),
        (np.zeros((4, 3, 8, 8), np.float32), ["x"]),
        (np.array(["a", "b"]), ["numbers"]),
    ],
    ids=["nan", "empty", "shape", "text"],
)
def test_bad_calibration_data(
    data: np.ndarray, parts: list[str], tmp_path: Path, built: Path
) -> None:
    np.savez(tmp_path / "data.npz", x=data)
    result = twofour(
        *("build", built / "model.onnx", "-o", tmp_path / "e.engine"),
        *("--int8", "--data", tmp_path / "data.npz"),
    )
    refused(result, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz"]


def test_bad_build_options(tmp_path: Path, built: Path) -> None:
    model, engine = built / "model.onnx", tmp_path / "e.engine"
    refused(twofour("build", model, "-o", tmp_path / "no" / "e.engine"), "there is no folder")
    refused(twofour("build", model, "-o", tmp_path), "it is a folder")
    refused(twofour("build", model, "-o", engine, "--int8"), "there is no data to calibrate with")
    refused(twofour("build", model, "-o", engine, "--data", "d.npz"), "no use without --int8")
    refused(twofour("build", model, "-o", engine, "--int8", "--data", "d.npz"), "no data at d.npz")
    refused(twofour("build", model, "-o", engine, "--shapes", "x:1xa"), "bad --shapes")
    refused(twofour("build", model, "-o", engine, "--shapes", "x:0x4x8x8"), "bad --shapes")
    refused(twofour("build", model, "-o", engine, "--shapes", "z:1x4x8x8"), "z")
    refused(twofour("build", model, "-o", engine, "--shapes", "x:1x5x8x8"), "x")
    refused(twofour("build", model, "-o", engine, "--threads", "4096"), "threads")
    refused(twofour("build", model, "-o", engine, "--sparsity", "maybe"), "sparsity")
    refused(twofour("build", model, "-o", engine, "--isa", "sve"), "isa")
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs_of_run(built: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", X[..., :7])
    np.save(tmp_path / "double.npy", X.astype(np.float64))
    np.savez(tmp_path / "many.npz", x=X)
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1 2 3")
    files = sorted(path.name for path in tmp_path.iterdir())
    cases = {
        "x=wide.npy": ["expected x float32 [1, 4, 8, 8]", "got x [1, 4, 8, 7]"],
        "x=double.npy": ["got float64"],
        "x=none.npy": ["cannot read input 'x'"],
        "x=text.npy": ["no .npy file"],
        "x=object.npy": ["no .npy file"],
        "x=many.npz": ["got an .npz archive"],
        "z=wide.npy": ["expected x", "got z"],
        "x": ["expected NAME=FILE.npy"],
    }
    for text, parts in cases.items():
        name, equals, file = text.partition("=")
        argument = f"{name}={tmp_path / file}" if equals else text
        out = tmp_path / "out"
        refused(
            twofour("run", built / "model.engine", "--input", argument, "--output-dir", out), *parts
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_bad_options_of_bench(built: Path, tmp_path: Path) -> None:
    engine, model = built / "model.engine", built / "model.onnx"
    alone = tmp_path / "alone.engine"
    alone.write_bytes(engine.read_bytes())
    refused(twofour("bench", alone, "--vs", "onnxruntime"), "--model")
    refused(twofour("bench", engine, "--model", model, "--vs", "tvm"), "unknown peer 'tvm'")
    refused(twofour("bench", engine, "--model", model, "--vs", "torch"), "--torch M.pt2")
    refused(twofour("bench", engine, "--batch", "4"), "expected x float32 [1, 4, 8, 8]")
    refused(twofour("bench", engine, "--duration", "0"), "cannot measure")
    refused(twofour("bench", engine, "--threads", "100000"), "threads")
    other = conv_model(tmp_path / "fixed.onnx", batch=2)
    refused(twofour("bench", engine, "--model", other, "--vs", "onnxruntime"), "cannot have shape")


def test_a_foreign_engine_is_refused_in_one_message(built: Path, tmp_path: Path) -> None:
    import dataclasses

    engine = Engine.load(built / "model.engine")
    target = dataclasses.replace(engine.plan.target, arch="riscv64")
    plan = dataclasses.replace(engine.plan, target=target)
    foreign = Engine(plan, engine.weights, engine.code, engine.subgraphs)
    path = foreign.save(tmp_path / "foreign.engine")
    result = twofour("run", path, "--input", f"x={built / 'x.npy'}", "--output-dir", tmp_path)
    refused(result, "cannot run on this machine", "architecture riscv64", "fix: rebuild")
    assert "cannot run here" in twofour("inspect", path).stdout
