"""Layers against the float model, and what integer kernels move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from tests.evaluate.networks import network, samples, weights
from tests.onnx_tools.test_quantize_attention import block, data
from twofour.evaluate import quality as module
from twofour.evaluate.quality import Quality, quality
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.onnx_tools.reference import Reference

X = samples(24)


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantize_with_report(ir.serde.deserialize_model(network(weights())), {"x": X})


@pytest.fixture(scope="module")
def found(quantized: Quantized) -> Quality:
    return quality(quantized, quantized.model, {"x": X})


def test_layers(quantized: Quantized, found: Quality) -> None:
    names = ["y", "c0.y", "c1.y", "c2.y"]
    pair = [Reference(m, names).run({"x": X}, names) for m in (quantized.floats, quantized.model)]
    rows = {each.layer: each for each in found.layers}
    assert list(rows) == ["y", "c0", "c1", "c2"]  # fc computes the output
    assert (rows["y"].op, rows["c0"].op) == ("output", "Conv")
    for name, layer in zip(names, rows, strict=True):
        a, b = (each[name].astype(np.float64) for each in pair)
        db = 10 * np.log10((a * a).sum() / ((a - b) ** 2).sum())
        assert rows[layer].sqnr_db == pytest.approx(db, abs=0.01)
    assert found.layer_samples == len(X)


def test_what_is_moved(found: Quality) -> None:
    """Integer kernels keep the definition: hardly a value is moved, and none by two steps."""
    assert [each.name for each in found.moved] == ["x", "c0.relu", "c1.relu", "c2.relu", "flat"]
    assert found.moved_samples == 16
    for each in found.moved:
        assert each.values == 16 * X[0].size
        assert each.own_by_more == 0
        assert each.own <= each.values / 1000


def test_a_moved_value_is_counted(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another weight: its own share is that layer's, later ones only inherit it."""
    spoiled = quantized.model.clone()
    value = spoiled.graph.initializers["c1.w_quantized"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[3] = -array[3]
    value.const_value = ir.tensor(array, name=value.name)
    compile_model = module.compile_model
    monkeypatch.setattr(
        module, "compile_model", lambda model, options: compile_model(spoiled, options)
    )
    moved = {each.name: each for each in quality(quantized, quantized.model, {"x": X}).moved}
    assert moved["c1.relu"].own_by_more > 0
    assert moved["c1.relu"].own <= moved["c1.relu"].values / 16  # one channel of 16
    assert moved["c2.relu"].own <= moved["c2.relu"].values / 1000
    assert moved["c2.relu"].by_one + moved["c2.relu"].by_more > moved["c2.relu"].values / 100
    assert moved["c0.relu"].by_one <= moved["c0.relu"].values / 1000


def test_without_data(quantized: Quantized) -> None:
    found = quality(quantized, quantized.model, None)
    assert (found.layers, found.moved) == ((), ())
    assert found.notes == ("no data was given: layers were not run",)
    assert len(found.tensors) == 8


def test_samples_of_other_lengths(quantized: Quantized) -> None:
    """Those of the most frequent shape are counted; the layers are judged on all."""
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        open (float[1, n, 16] x) => (float[1, n, 16] y) {
            [product] y = MatMul (x, w)
        }
        """
    )
    w = ir.tensor(np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32), name="w")
    value = ir.Value(name="w", const_value=w)
    model.graph[0].replace_input_with(1, value)
    model.graph.initializers["w"] = value
    batches = [{"x": np.random.default_rng(n).random((1, n, 16), np.float32)} for n in (6, 4, 4)]
    result = quantize_with_report(model, batches)
    found = quality(result, result.model, batches)
    assert (found.layer_samples, found.moved_samples) == (3, 2)


def test_all_float(quantized: Quantized) -> None:
    """Nothing is rounded: that is said, not an error."""
    found = quality(replace(quantized, model=quantized.floats), quantized.floats, {"x": X})
    assert found.tensors == ()
    assert found.layers[0].sqnr_db == float("inf")
    assert found.notes == ("the engine writes no bytes that the file has, too",)


def test_what_an_attention_moves_is_its_own() -> None:
    """Its kernel divides after the second product; the normalizations behind it move nothing.

    The bytes that it writes are those of a Reshape, whose scale comes from the product before it.
    """
    result = quantize_with_report(block(), data())
    moved = {each.name: each for each in quality(result, result.model, data()).moved}
    assert moved["a"].own > 0
    assert {name for name, each in moved.items() if each.own > each.values / 1000} == {"a"}
