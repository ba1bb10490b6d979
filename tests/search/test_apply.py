"""Choices become networks: what is pruned, what is rounded, what stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.evaluate.networks import LAYERS, network, samples, weights
from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import Forms
from twofour.compiler.prunable import named
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.progress import unseen
from twofour.core.target import host_target
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.promises import check
from twofour.onnx_tools.weights import layer_weights
from twofour.search.apply import ApplyOptions, apply, with_choices
from twofour.search.choices import Choice
from twofour.search.network import layers_of, owners, passages
from twofour.search.units import measured_network
from twofour.train import export_onnx
from twofour.train.networks.transformer import INPUT_NAMES, Bert, BertConfig, example_inputs

DATA = {"x": samples(24)}
MAGNITUDE = ApplyOptions("magnitude", 24)


def model() -> ir.Model:
    """As of `networks`, but that c2 is no more 2:4 than any other weight."""
    arrays = weights()
    arrays["c2"] = np.random.default_rng(0).standard_normal(arrays["c2"].shape, np.float32) / 12
    return ir.from_proto(network(arrays))


def weights_of(found: ir.Model) -> dict[str, np.ndarray]:
    return {str(node.name): weight.values for node, weight in layer_weights(found)}


def quantized_layers(found: ir.Model) -> set[str]:
    return {str(node.name) for node, weight in layer_weights(found) if weight.scale is not None}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda"])
def test_each_layer_has_its_choice(method: str) -> None:
    choices = {"c0": "dense f32", "c1": "2:4 int8", "c2": "4:8 f32", "fc": "dense int8"}
    before = model()
    found = apply(before, choices, DATA, ApplyOptions(method, 24))  # type: ignore[arg-type]
    values, old = weights_of(found), weights_of(before)
    assert quantized_layers(found) == {"c1", "fc"}
    np.testing.assert_array_equal(values["c0"], old["c0"])
    assert is_pattern(values["c1"], "2:4")
    assert is_pattern(values["c2"], "4:8")
    assert not is_pattern(values["c2"], "2:4")
    assert not is_pattern(values["fc"], "4:8")
    promises = {each.layers[0]: each.pattern for each in check(found).entries}
    assert promises == {"c1": "2:4", "c2": "4:8"}
    assert not any(each.broken for each in check(found).entries)
    assert weights_of(before)["c1"].all()  # the given model stays as it is


def test_layers_that_are_not_named_stay_as_they_are() -> None:
    before = model()
    found = apply(before, {"c1": "2:4 f32"}, DATA, MAGNITUDE)
    assert quantized_layers(found) == set()
    values, old = weights_of(found), weights_of(before)
    assert [name for name in LAYERS if not np.array_equal(values[name], old[name])] == ["c1"]


def test_what_belongs_to_a_float_layer_stays_float() -> None:
    """c1's activation is read by c2, which is rounded: only that pair remains, and c2's."""
    choices = {"c0": "dense f32", "c1": "dense f32", "c2": "dense int8", "fc": "dense f32"}
    found = apply(model(), choices, DATA, MAGNITUDE)
    rounded = {
        str(n.inputs[0].name) for n in found.graph if n.op_type == "QuantizeLinear" and n.inputs[0]
    }
    assert rounded == {"c1.relu"}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"none": "dense f32"}, "no layer 'none'"),
        ({"c0": "dense f16"}, "bad choice 'dense f16' for layer 'c0'"),
        ({"c0": "3:2 f32"}, "bad choice"),
        ({"c0": "2:4"}, "bad choice"),
        ({"c0": None}, "bad choice None"),
        ({"fc": "2:4/pair int8", "c0": "5:7 f32"}, "cannot prune 'c0' to 5:7"),
    ],
)
def test_bad_choices(choices: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply(model(), choices, DATA, MAGNITUDE)


def test_one_weight_has_one_pattern() -> None:
    proto = network(weights())
    proto.graph.node[2].input[1] = "c0.w"  # c1 reads the weight of c0
    shared = ir.from_proto(proto)
    with pytest.raises(InputError, match="'c0' and 'c1' have one weight and two patterns"):
        apply(shared, {"c0": "2:4 f32", "c1": "dense f32"}, DATA, MAGNITUDE)
    found = apply(shared, {"c0": "2:4 f32", "c1": "2:4 int8"}, DATA, MAGNITUDE)
    assert all(is_pattern(weights_of(found)[name], "2:4") for name in ("c0", "c1"))


def test_words() -> None:
    for text in ("dense f32", "2:4 int8", "2:4/pair bf16", "4:8 f32"):
        assert str(Choice.parse(text)) == text
    assert Choice.parse("dense int8").form.pattern == ""
    assert Choice.of(Choice.parse("2:4 bf16").form) == Choice("2:4", "bf16")


def test_a_build_is_told_what_may_be_bfloat16() -> None:
    choices = {"c0": "dense f32", "c1": "2:4 bf16", "c2": "dense int8"}
    options = with_choices(choices, BuildOptions(tuning_effort=1))
    assert options == BuildOptions(tuning_effort=1, bf16=True, stay_float32=frozenset({"c0"}))


def test_without_bfloat16_nothing_is_asked_for() -> None:
    options = with_choices({"c0": "dense f32", "c1": "2:4 int8"}, BuildOptions())
    assert options == BuildOptions()


# Units.


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """Two layers of a transformer, exported as users do."""
    config = BertConfig(2, 32, 2, 64, vocabulary=50, positions=12)
    path: Path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    export_onnx(Bert(config).eval(), example_inputs(config, 1, 8), path, INPUT_NAMES, ("y",))
    return named(load_model(path))


def test_attention_belongs_to_its_projections(bert: ir.Model) -> None:
    layers = [layer.name for layer in layers_of(bert)]
    assert len(layers) == 2 * 6
    owner = owners(bert)
    softmaxes = [str(node.name) for node in bert.graph if node.op_type == "Softmax"]
    assert len(softmaxes) == 2
    for block, name in enumerate(softmaxes):
        assert owner[name] in layers[6 * block : 6 * block + 3]
    passing = {(each.source, each.target) for each in passages(bert, owner)}
    assert any(source in layers[:6] and target in layers[6:9] for source, target in passing)


def test_layers_that_become_one_are_a_unit(bert: ir.Model) -> None:
    shapes = {name: (1, 8) for name in INPUT_NAMES}
    forms = Forms.of(bert, shapes, ("f32", "int8"), host_target())
    options = BuildOptions(tuning_effort=1, race=False)
    found = measured_network(forms, layers_of(bert), ("2:4",), options, unseen)
    assert [len(unit.layers) for unit in found.units] == [3, 1, 1, 1] * 2
    joint = found.units[0]
    assert len({name.rpartition(".")[2] for name in joint.layers}) == 3
    assert all(Choice() in unit.times for unit in found.units)
    assert all(us > 0 for unit in found.units for us in unit.times.values())
    assert found.passages
    assert set(found.per_element) == {("f32", "int8")}
    assert found.per_element["f32", "int8"] >= 0


def test_a_model_without_layers_is_refused() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(n, 1, [1, 4]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    with pytest.raises(InputError, match="no layer to choose for"):
        layers_of(named(ir.from_proto(onnx.helper.make_model(graph))))
