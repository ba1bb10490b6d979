"""A layer that was spoiled on purpose is left float, and no other one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.evaluate.networks import network, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.core.errors import InputError
from twofour.evaluate import Budget, BudgetOptions, Mixed
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.onnx_tools.revert import is_quantized

COUNT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("budget")
    dense = save(network(weights()), here / "dense.onnx")
    x = samples(COUNT)
    np.savez(here / "data.npz", x=x, labels=outputs(dense, x).argmax(1))
    return here


@pytest.fixture(scope="module")
def coarse(folder: Path) -> Quantized:
    """The scale of c0.relu, which c1 reads, is 60 times too large."""
    found = quantize_with_report(load_model(folder / "dense.onnx"), {"x": samples(32)})
    value = found.model.graph.initializers["c0.relu_scale"]
    assert value.const_value is not None
    value.const_value = ir.tensor(60 * value.const_value.numpy(), name=value.name)
    return found


def choose(folder: Path, quantized: Quantized, options: BudgetOptions) -> Mixed:
    found = Budget(folder / "dense.onnx", folder / "data.npz", options).choose(quantized)
    assert found.evaluations <= options.evaluations
    return found


def test_the_spoiled_layer_is_left_float(folder: Path, coarse: Quantized) -> None:
    found = choose(folder, coarse, BudgetOptions(5.0))
    assert [(each.layer, each.op) for each in found.left] == [("c1", "Conv")]
    assert found.holds
    assert found.figures.dense == 100
    assert found.figures.int8 < 90
    assert found.figures.mixed >= 95
    assert found.figures.drop == pytest.approx(100 - found.figures.mixed)
    assert found.figures.drop_error is not None
    gains = {each.layer: each.gain for each in found.layers}
    assert gains["c1"] == pytest.approx(found.figures.mixed - found.figures.int8)
    c1 = next(node for node in found.model.graph if node.name == "c1")
    assert [None if v is None else v.name for v in c1.inputs] == ["c0.relu", "c1_float"]
    assert is_quantized(found.model)


def test_the_file_is_worth_what_was_said(folder: Path, coarse: Quantized, tmp_path: Path) -> None:
    found = choose(folder, coarse, BudgetOptions(5.0))
    path = tmp_path / "mixed.onnx"
    onnx.save(ir.to_proto(found.model), path)
    with np.load(folder / "data.npz") as data:
        right = outputs(path, data["x"]).argmax(1) == data["labels"]
    assert 100 * right.mean() == pytest.approx(found.figures.mixed)


def test_a_wide_budget_leaves_nothing_float(folder: Path, coarse: Quantized) -> None:
    found = choose(folder, coarse, BudgetOptions(100.0))
    assert (found.left, found.evaluations, found.holds) == ((), 1, True)
    assert found.model is not coarse.model
    assert found.figures.mixed == found.figures.int8


def test_a_search_goes_on_where_it_ended(folder: Path, coarse: Quantized, tmp_path: Path) -> None:
    """Killed after three networks, and within the line of the fourth."""
    cache = tmp_path / "cache.jsonl"
    options = BudgetOptions(0.0, metric="loss", cache=cache)
    whole = choose(folder, coarse, options)
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == whole.evaluations
    cache.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    again = choose(folder, coarse, options)
    assert again.layers == whole.layers
    assert again.evaluations == whole.evaluations
    assert again.notes == (f"{cache}: 1 damaged line(s) passed over",)
    entries = [json.loads(line)["key"] for line in cache.read_bytes().splitlines()[4:]]
    assert len(entries) == whole.evaluations - 3  # what was known was not judged again
    longer = cache.read_bytes()
    assert choose(folder, coarse, options).layers == whole.layers
    assert cache.read_bytes() == longer


def test_another_model_does_not_take_its_results(
    folder: Path, coarse: Quantized, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    options = BudgetOptions(100.0, cache=cache)
    choose(folder, coarse, options)
    fine = quantize_with_report(load_model(folder / "dense.onnx"), {"x": samples(32)})
    assert choose(folder, fine, options).figures.int8 > 90
    assert len(cache.read_bytes().splitlines()) == 2


def test_processes_do_not_change_the_answer(folder: Path, coarse: Quantized) -> None:
    one, two = (choose(folder, coarse, BudgetOptions(5.0, jobs=jobs)) for jobs in (1, 2))
    assert one.layers == two.layers
    assert one.evaluations == two.evaluations


def test_not_even_with_all_layers_float(folder: Path, coarse: Quantized) -> None:
    floats = coarse.floats.clone()
    value = floats.graph.initializers["fc.w"]
    assert value.const_value is not None
    value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
    found = choose(folder, replace(coarse, floats=floats), BudgetOptions(1.0))
    assert (found.holds, found.evaluations) == (False, 2)
    assert {each.layer for each in found.left} == {"c0", "c1", "c2", "fc"}


def test_a_correction_of_biases_is_taken_back(folder: Path, coarse: Quantized) -> None:
    """It was made for all layers in int8: with floats around it would shift them."""
    biased = coarse.model.clone()
    layer = next(node for node in biased.graph if node.name == "c2")
    floats = coarse.floats.clone()
    for model, node, size in ((biased, layer, 40.0), (floats, named(floats, "c2"), 0.0)):
        value = ir.Value(
            name="c2.b", const_value=ir.tensor(np.full(16, size, np.float32), name="c2.b")
        )
        model.graph.initializers["c2.b"] = value
        node.resize_inputs(3)
        node.replace_input_with(2, value)
    found = choose(folder, replace(coarse, model=biased, floats=floats), BudgetOptions(5.0))
    assert found.holds
    assert [each.layer for each in found.left] == ["c1"]
    bias = named(found.model, "c2").inputs[2]
    assert bias is not None
    assert bias.const_value is not None
    np.testing.assert_array_equal(bias.const_value.numpy(), 0)
    assert any("1 biases are those of the float model again" in note for note in found.notes)


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_drop": -1.0},
        {"max_drop": float("nan")},
        {"max_drop": 1.0, "evaluations": 3},
        {"max_drop": 1.0, "jobs": 0},
    ],
)
def test_bad_options(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="bad"):
        BudgetOptions(**bad)  # type: ignore[arg-type]


def test_data_that_does_not_fit_is_found_before_the_search(folder: Path) -> None:
    with pytest.raises(InputError, match="needs labels"):
        Budget(folder / "dense.onnx", {"x": samples(2)}, BudgetOptions(1.0))


def no_number(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    return float("nan")


def test_a_metric_without_a_number(folder: Path, coarse: Quantized) -> None:
    with pytest.raises(InputError, match="no number of the float model"):
        choose(folder, coarse, BudgetOptions(1.0, metric=f"{__name__}:no_number"))
