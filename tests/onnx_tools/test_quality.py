"""What is said of each tensor, against computing it from the values themselves."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from tests.evaluate.networks import network, samples, weights
from twofour.core.numerics import dequantize, quantize
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quality import TensorQuality, rounded_values, tensor_quality
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.onnx_tools.reference import Reference
from twofour.onnx_tools.revert import float_switches, switched

X = samples(16)


@pytest.fixture(scope="module", params=["int8", "uint8"])
def quantized(request: pytest.FixtureRequest) -> Quantized:
    model = ir.serde.deserialize_model(network(weights()))
    return quantize_with_report(model, {"x": X}, QuantizeOptions("mse", request.param))


def found(quantized: Quantized) -> dict[str, TensorQuality]:
    every = tensor_quality(quantized.model, quantized.floats, quantized.histograms)
    assert len({each.name for each in every}) == len(every)
    return {each.name: each for each in every}


def test_every_tensor_once(quantized: Quantized) -> None:
    """`flat` holds the bytes of c2.relu, moved."""
    names = {"x", "c0.relu", "c1.relu", "c2.relu", "c0.w", "c1.w", "c2.w", "fc.w"}
    assert set(found(quantized)) == names
    assert "flat" in {each.value for each in rounded_values(quantized.model)}


def test_activations(quantized: Quantized) -> None:
    model = quantized.floats
    values = Reference(model, ["c0.relu", "c1.relu", "c2.relu"])
    got = {**values.run({"x": X}, values.tensors), "x": X}
    for name, x in got.items():
        each, scheme = found(quantized)[name], quantized.schemes[name]
        q = quantize(x, scheme.scale, scheme.zero_point, scheme.dtype)
        error = x.astype(np.float64) - dequantize(q, scheme.scale, scheme.zero_point)
        signal = float(np.square(x.astype(np.float64)).sum())
        assert each.sqnr_db == pytest.approx(
            10 * math.log10(signal / np.square(error).sum()), abs=0.05
        )
        assert each.clipped == pytest.approx(
            (np.abs(error) > scheme.scale * 0.5001).mean(), abs=1e-3
        )
        assert each.seen == pytest.approx((x.min(), x.max()), rel=1e-5)
        assert (each.scale, each.zero_point) == (scheme.scale, scheme.zero_point)
        assert each.values == x.size
        assert each.bins is not None
        assert sum(each.bins.counts) == x.size
        assert each.node == {"x": ""}.get(name, name.replace(".relu", ".act"))


def test_weights(quantized: Quantized) -> None:
    for name, w in weights_of(quantized).items():
        each = found(quantized)[f"{name}.w"]
        scale = np.abs(w).reshape(len(w), -1).max(1) / 127
        scale = scale.astype(np.float32).reshape(-1, *[1] * (w.ndim - 1))
        error = w.astype(np.float64) - np.clip(np.rint(w / scale), -127, 127) * scale
        db = 10 * np.log10(np.square(w, dtype=np.float64).sum() / np.square(error).sum())
        channels = [
            10 * np.log10(np.square(a, dtype=np.float64).sum() / np.square(b).sum())
            for a, b in zip(w, error, strict=True)
        ]
        assert each.sqnr_db == pytest.approx(db, abs=1e-3)
        assert each.worst_channel_db == pytest.approx(min(channels), abs=1e-3)
        assert (each.kind, each.node, each.scales, each.clipped) == ("weight", name, len(w), 0)


def weights_of(quantized: Quantized) -> dict[str, np.ndarray]:
    values = quantized.floats.graph.initializers
    every = {name: values[f"{name}.w"].const_value for name in ("c0", "c1", "c2", "fc")}
    return {name: array.numpy() for name, array in every.items() if array is not None}


def test_a_weight_that_is_cut_off(quantized: Quantized) -> None:
    """A scale of half the size: what lies beyond is counted exactly."""
    model = quantized.model.clone()
    value = model.graph.initializers["c1.w_scale"]
    assert value.const_value is not None
    half = value.const_value.numpy() / 2
    value.const_value = ir.tensor(half, name=value.name)
    each = {t.name: t for t in tensor_quality(model, quantized.floats, {})}["c1.w"]
    w = weights_of(quantized)["c1"]
    assert each.clipped == (np.abs(w) > 127.5 * half.reshape(-1, 1, 1, 1)).mean() > 0


def test_without_histograms_it_is_said(quantized: Quantized) -> None:
    every = tensor_quality(quantized.model, quantized.floats, {})
    x = next(each for each in every if each.name == "x")
    assert (x.seen, x.clipped, x.sqnr_db, x.bins) == (None, None, None, None)
    assert every[0].kind == "weight"  # the known ones first


def test_layers_left_float_are_not_in_it(quantized: Quantized) -> None:
    switches = [s for s in float_switches(quantized.model, quantized.floats) if s.layer == "c1"]
    mixed = switched(quantized.model, switches)
    names = {each.name for each in tensor_quality(mixed, quantized.floats, quantized.histograms)}
    assert names == {"x", "c1.relu", "c2.relu", "c0.w", "c2.w", "fc.w"}
