"""Files that others exported, with real inputs where simple: quantized, pruned, built, and right.

What rounding explains: an engine may be no further from the float model than ONNX Runtime is on the
same quantized file, run node by node or optimized (which rounds in other places), by more than a
tenth and `FLOOR`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.onnx_tools.any_file import error, feeds_of, joined, on_ort, quick, run
from tests.onnx_tools.foreign_inputs import FILES, cifar10, samples
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph, standardized
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

pytestmark = pytest.mark.slow
FLOOR = 0.005
# The least cosine with the float model on ONNX Runtime, calibrated from 8 samples.
CLOSE = {"basic_pitch_nmp": 0.93, "fastestdet": 0.92, "ppocrv2_det": 0.96}
USUALLY = 0.98

Feeds = list[dict[str, np.ndarray]]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def optimized(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    """On ONNX Runtime as users run it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return joined([dict(zip(names, session.run(names, each), strict=True)) for each in feeds])


def no_further(exact: list[np.ndarray], model: ir.Model, feeds: Feeds, ours: list[np.ndarray]):
    """Whether the engine is as near as ONNX Runtime is on the quantized model."""
    for want, plain, quick_, got in zip(
        exact, on_ort(model, feeds), optimized(model, feeds), ours, strict=True
    ):
        theirs = max(error(want, plain), error(want, quick_))
        print(
            f"error: ONNX Runtime {error(want, plain):.4f} and {error(want, quick_):.4f}, ", end=""
        )
        print(f"engine {error(want, got):.4f}; cosine of the two {cosine(plain, got):.6f}")
        assert error(want, got) <= 1.1 * theirs + FLOOR


@pytest.mark.parametrize("name", FILES)
def test_int8(name: str, data_folder: Path):
    model, data = load_model(data_folder / "onnx" / f"{name}.onnx"), samples(data_folder, name)
    feeds = feeds_of(model, data)
    exact, quantized = on_ort(model, feeds), quantize(standardized(model), data)
    for want, got in zip(exact, on_ort(quantized, feeds), strict=True):
        assert cosine(want, got) >= CLOSE.get(name, USUALLY)
    engine = quick(model, data, int8=True, data=data)
    assert engine.plan.notes == ()
    no_further(exact, quantized, feeds, run(engine, feeds))


@pytest.mark.parametrize("name", FILES)
def test_pruned(name: str, data_folder: Path):
    model, data = load_model(data_folder / "onnx" / f"{name}.onnx"), samples(data_folder, name)
    feeds = feeds_of(model, data)[:2]
    shapes = {key: array.shape for key, array in feeds[0].items()}
    pruned, report = prune(import_graph(model, shapes))
    assert any(not entry.reason for entry in report)
    exact = on_ort(pruned, feeds)
    for want, got in zip(exact, run(quick(model, data, sparsity="force"), feeds), strict=True):
        print(f"cosine {cosine(want, got):.7f}")
        assert cosine(want, got) >= 0.9999


@pytest.mark.parametrize("name", FILES)
def test_pruned_int8(name: str, data_folder: Path):
    model, data = load_model(data_folder / "onnx" / f"{name}.onnx"), samples(data_folder, name)
    feeds = feeds_of(model, data)
    plain = standardized(model)
    exact, (quantized, _) = on_ort(prune(plain)[0], feeds), prune(quantize(plain, data))
    engine = quick(model, data, sparsity="force", int8=True, data=data)
    no_further(exact, quantized, feeds, run(engine, feeds))


def test_a_file_of_another_framework_keeps_its_accuracy(data_folder: Path, tmp_path: Path):
    """MLPerf Tiny's image classifier: 87.19 % of CIFAR-10's test images in float32."""
    path = data_folder / "onnx" / "mlperftiny_resnet8.onnx"
    x, labels = cifar10(data_folder, 1000)
    int8 = save_model(quantize(load_model(path), {"input_1": x[:256]}), tmp_path / "int8.onnx")
    with Session(build(int8, tuning_effort=0)) as session:
        found = [np.argmax(session.run({"input_1": x[i : i + 1]})["Identity"]) for i in range(1000)]
    top1 = 100 * np.mean(np.array(found) == labels)
    print(f"top-1 {top1:.2f} %")
    assert abs(top1 - 87.19) <= 1.0
