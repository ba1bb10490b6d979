"""A model quantized, pruned and built, held against ONNX Runtime where each node runs by itself."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from tests.compiler.engines import reference
from tests.onnx_tools.networks import weights
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph, standardized
from twofour.core.data import as_data
from twofour.core.feeds import runs
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.reference import input_form
from twofour.runtime.session import Session

# Rounded to 8 bits twice or three times: each rounding is off by 1/255 of the range at most, about
# 1/100 of the deviation.
FLOOR = 0.02
RANDOM = np.random.default_rng(1)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def proto(body: str, imports: str = '"": 17', **arrays: np.ndarray) -> ir.Model:
    """A model from text that has more than one graph, or other domains."""
    text = f"<ir_version: 9, opset_import: [{imports}]> {body}"
    found = onnx.parser.parse_model(text)
    found.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    return ir.from_proto(found)


def feeds_of(model: ir.Model, data: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What the model is given, sample by sample."""
    forms = [input_form(value) for value in model.graph.inputs]
    return [run.feeds for run in runs(as_data(data, [form.name for form in forms]), forms, 1)]


def on_ort(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Each output over all samples, float64."""
    return joined([reference(model, each) for each in feeds])


def joined(results: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    return [
        np.concatenate([result[name].astype(np.float64).ravel() for result in results])
        for name in results[0]
    ]


def error(want: np.ndarray, got: np.ndarray) -> float:
    """The norm of the difference, as a share of that of what is right."""
    return float(np.linalg.norm(want - got) / max(np.linalg.norm(want), 1e-12))


def quick(model: ir.Model, samples: dict[str, np.ndarray], **options: object):
    """An engine for the shapes of the samples."""
    shapes = {name: array.shape for name, array in feeds_of(model, samples)[0].items()}
    return build(model, shapes=shapes, tuning_effort=0, **options)


def run(engine, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    with Session(engine) as session:
        return joined([session.run(each) for each in feeds])


def check_int8(model: ir.Model, data: dict[str, np.ndarray]) -> ir.Model:
    """Quantizes: near the float model on ONNX Runtime, and no further away as an engine."""
    feeds = feeds_of(model, data)
    want, quantized = on_ort(model, feeds), quantize(standardized(model), data)
    onnx.checker.check_model(ir.to_proto(quantized))
    rounded = on_ort(quantized, feeds)
    engine = quick(model, data, int8=True, data=data)
    assert engine.plan.notes == ()
    for exact, theirs, ours in zip(want, rounded, run(engine, feeds), strict=True):
        assert error(exact, theirs) < 0.1
        assert error(exact, ours) <= 1.1 * error(exact, theirs) + FLOOR
    return quantized


def check_pruned(model: ir.Model, data: dict[str, np.ndarray]) -> list[str]:
    """Prunes: the engine computes what ONNX Runtime makes of the pruned model.

    Returns:
        Why weights were left.
    """
    feeds = feeds_of(model, data)
    shapes = {name: array.shape for name, array in feeds[0].items()}
    pruned, report = prune(import_graph(model, shapes))
    want = on_ort(pruned, feeds)
    for exact, got in zip(want, run(quick(model, data, sparsity="force"), feeds), strict=True):
        assert error(exact, got) < 1e-4
    rounded, _ = prune(quantize(standardized(model), data))
    both = quick(model, data, sparsity="force", int8=True, data=data)
    for exact, got in zip(on_ort(rounded, feeds), run(both, feeds), strict=True):
        assert error(exact, got) < 2 * FLOOR
    return [entry.reason for entry in report if entry.reason]


SQUARE = weights(w=(8, 8), v=(8, 8))
