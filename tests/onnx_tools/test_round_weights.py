"""The step `round`: integers chosen by what layers read, through the model as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, samples, sparse, weights
from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import output_axis, place
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.quantize import quantize, quantize_with_report
from twofour.onnx_tools.round_weights import RoundedWeights, round_weights
from twofour.onnx_tools.weights import find_weight

Array = NDArray[Any]
ROUND = QuantizeOptions(steps=("round",))


def smooth_samples(count: int = 32, seed: int = 0) -> Array:
    """Images whose neighbouring pixels and channels have much in common."""
    x = samples(count, (4, 8, 8), seed)
    for axis in (1, 2, 3):
        x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis)
    return (x / x.std()).astype(np.float32)


def rounded(model: ir.Model, x: Array, **more: Any) -> tuple[ir.Model, RoundedWeights]:
    model = prepare(model)
    layers = place(model, QuantizeOptions()).layers
    data = as_data({str(model.graph.inputs[0].name): x}, [str(model.graph.inputs[0].name)])
    return model, round_weights(model, layers, Samples(data, None, 1), **more)


def with_weights(model: ir.Model, found: RoundedWeights | None) -> ir.Model:
    """The float model with the weights that integers stand for; None for the nearest ones."""
    changed = model.clone()
    for layer in place(changed, QuantizeOptions()).layers:
        axis, weight = output_axis(layer), layer.inputs[1]
        array = weight.const_value.numpy()
        w8, scale = (
            quantize_weight(array, axis) if found is None else found.weights[str(layer.name)]
        )
        assert w8.shape == array.shape
        values = np.moveaxis(np.moveaxis(w8, axis, -1) * scale, -1, axis).astype(np.float32)
        weight.const_value = ir.tensor(values, name=weight.name)
    return changed


def test_outputs_change_less_on_samples_that_were_not_seen() -> None:
    model, found = rounded(option_a(), smooth_samples(64))
    assert not found.left
    assert set(found.weights) == {"c1", "c2", "c3", "c4", "y"} == set(found.cost_left)
    assert all(share < 0.8 for share in found.cost_left.values())
    x = {"x": smooth_samples(64, seed=5)}
    (want,) = run(model, x)
    errors = [
        np.square(run(with_weights(model, each), x)[0] - want).sum() for each in (found, None)
    ]
    assert errors[0] < 0.6 * errors[1]


GROUPS = """(float[n,8,6,6] x) => (float[n,3] y)
{
    c = Conv <group = 2, auto_pad = "SAME_UPPER"> (x, w)
    r = Relu (c)
    d = Conv <group = 8, strides = [2, 2]> (r, depthwise)
    m = GlobalAveragePool (d)
    f = Flatten (m)
    y = MatMul (f, fc)
}"""


def test_groups_depthwise_convolutions_and_products_are_laid_out_as_they_were() -> None:
    arrays = weights(w=(8, 4, 3, 3), depthwise=(8, 1, 3, 3), fc=(8, 3))
    x = samples(64, (8, 6, 6)) + np.float32(1)
    model, found = rounded(graph(GROUPS, **arrays), x)
    assert not found.left
    assert found.weights["y"][0].shape == (8, 3)
    assert found.weights["y"][1].shape == (3,)
    (want,), (got,) = run(model, {"x": x}), run(with_weights(model, found), {"x": x})
    (plain,) = run(with_weights(model, None), {"x": x})
    assert np.square(got - want).sum() < 0.8 * np.square(plain - want).sum()


SHARED = """(float[n,6,8] x) => (float[n,6,8] y)
{
    a = MatMul (x, w)
    b = Relu (a)
    y = MatMul (b, w)
}"""


def test_layers_that_share_a_weight_share_its_integers() -> None:
    model, found = rounded(graph(SHARED, **weights(w=(8, 8))), samples(32, (6, 8)))
    (first, second) = found.weights.values()
    assert np.array_equal(first[0], second[0])
    quantized = quantize(model, {"x": samples(32, (6, 8))}, ROUND)
    stored = [v for v in quantized.graph.initializers.values() if v.name.startswith("w")]
    assert sum(v.const_value.shape == (8, 8) for v in stored) == 1


def test_groups_of_layers_give_what_all_at_once_give() -> None:
    x = smooth_samples()
    _, together = rounded(option_a(), x)
    told: list[tuple[int, int | None, str]] = []
    most = 8 * 150**2  # of the 144 features of c4, and no other beside it
    _, apart = rounded(option_a(), x, memory_bytes=most, progress=lambda *each: told.append(each))
    for name, (w8, scale) in together.weights.items():
        assert np.array_equal(w8, apart.weights[name][0])
        assert np.array_equal(scale, apart.weights[name][1])
    assert told[-1] == (5, 5, "y")
    assert {total for _, total, _ in told} == {5}


def test_what_does_not_fit_the_memory_goes_to_the_nearest_integers() -> None:
    _, found = rounded(option_a(), smooth_samples(), memory_bytes=8 * 80**2)
    assert "c4" in found.left
    assert "allowed" in found.left["c4"]
    assert "c1" in found.weights


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "4:8"])
def test_a_pruned_model_stays_pruned(pattern: str) -> None:
    arrays = weights(w2=(8, 8, 3, 3), w3=(16, 8, 3, 3), w4=(16, 16, 3, 3))
    pruned = {name: sparse(w, pattern) for name, w in arrays.items()}
    model = quantize(option_a(**pruned), {"x": smooth_samples()}, ROUND)
    for name, before in pruned.items():
        stored = model.graph.initializers[f"{name}_quantized"].const_value.numpy()
        assert stored.dtype == np.int8
        assert is_pattern(stored, pattern)
        assert not stored[before == 0].any()
        assert not np.array_equal(stored, quantize_weight(before)[0])


@pytest.mark.parametrize("form", ["int8", "float"])
def test_the_step_is_part_of_the_recipe(form: str) -> None:
    x = {"x": smooth_samples()}
    best = QuantizeOptions(recipe="best", weights=form, activation="int8")
    found = quantize_with_report(option_a(), x, best)
    assert ("round", 5) in [(step.name, step.changed) for step in found.steps]
    assert not quantize_with_report(option_a(), x, QuantizeOptions()).steps
    only = QuantizeOptions(steps=("round",), weights=form)
    model = quantize(option_a(), x, only)
    _, expected = rounded(option_a(), x["x"])
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm"):
            weight = find_weight(node)
            assert np.array_equal(weight.values, expected.weights[str(node.name)][0])


def test_the_same_data_give_the_same_integers() -> None:
    _, a = rounded(option_a(), smooth_samples())
    _, b = rounded(option_a(), smooth_samples())
    assert all(np.array_equal(w8, b.weights[name][0]) for name, (w8, _) in a.weights.items())


def test_bad_input_is_refused() -> None:
    w2 = weights(w2=(8, 8, 3, 3))["w2"]
    w2[3, 1] = np.nan
    with pytest.raises(InputError, match=r"(?s)weight 'w2' of Conv 'c2'.*9 of its values"):
        rounded(option_a(w2=w2), smooth_samples())
    x = smooth_samples()
    x[5, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        rounded(option_a(), x)
    with pytest.raises(InputError, match=r"(?s)step 'round'.*got a generator"):
        quantize(option_a(), ({"x": each[None]} for each in smooth_samples(4)), ROUND)
