"""What the user chooses: nodes, first and last layers, single tensors, how weights are stored."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph, run
from tests.onnx_tools.networks import option_a, samples, sparse, weights
from tests.onnx_tools.test_quantize import quantized, readers, scale_names
from tests.onnx_tools.test_quantize_attention import LAYERS, PRODUCTS, block
from tests.onnx_tools.test_quantize_attention import quantized as quantized_block
from twofour.core.errors import InputError
from twofour.core.ranges import Range
from twofour.onnx_tools.eligible import NothingToQuantizeError, count_integer
from twofour.onnx_tools.inspect import verify_pattern
from twofour.onnx_tools.options import RECIPES, QuantizeOptions, TensorChoice
from twofour.onnx_tools.overrides import parse_choice, parse_choices, read_choices
from twofour.onnx_tools.quantize import quantize_with_report


def report(**options):
    return quantize_with_report(option_a(), {"x": samples()}, QuantizeOptions(threads=1, **options))


def scheme(model, tensor: str) -> tuple[float, int, str]:
    """Scale, zero point and type of a tensor."""
    (q,) = [n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == tensor]
    scale, point = (value.const_value.numpy() for value in q.inputs[1:])
    return float(scale), int(point), str(point.dtype)


def why(found) -> dict[str, str]:
    return {layer.node: layer.reason for layer in found.float_layers}


# Nodes.


def test_only_what_is_included():
    found = report(include=("c1", "c3"))
    assert readers(found.model) == {"x": ["c1:0"], "r2": ["c3:0", "s4:0"]}
    assert why(found) == dict.fromkeys(("c2", "c4", "y"), "not included")


def test_only_operators_that_are_included():
    found = report(include=("op:Gemm",))
    assert readers(found.model) == {"m": ["y:0"]}
    assert why(found) == dict.fromkeys(("c1", "c2", "c3", "c4"), "not included")


def test_what_moves_data_is_not_included_by_itself():
    model = graph(
        """(float[n,4,8,8] x) => (float[n,4,4,4] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
        y = Conv <pads = [1, 1, 1, 1]> (p, w)
        }""",
        **weights(w=(4, 4, 3, 3)),
    )
    assert readers(quantized(model, include=("op:Conv",))) == {
        "x": ["c:0"],
        "c": ["p:0"],
        "p": ["y:0"],
    }


def test_excluded_operators():
    found = report(exclude=("op:Gemm", "op:Add"))
    assert "m" not in readers(found.model)
    assert "a2:1" not in readers(found.model)["r1"]
    assert why(found) == {"y": "excluded by operator"}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["layer9.*", "op:ConvTranspose"])
def test_patterns_that_match_nothing(option, pattern):
    with pytest.raises(InputError, match=rf"(?s){option} '.*' matches no node.*such as"):
        report(**{option: (pattern,)})


def test_first_and_last_layers_stay_float():
    found = report(first_last="float")
    assert why(found) == {"c1": "it is a first layer", "y": "it is a last layer"}
    assert "x" not in readers(found.model)
    assert "m" not in readers(found.model)
    assert count_integer(found.model) == 3


def test_first_and_last_layers_of_a_transformer():
    model = quantized_block(block(), first_last="float")
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    floats = {node.name for node in layers if node.inputs[1].is_initializer()}
    assert floats == {"ql", "kl", "vl", "e"}


def test_every_head_is_a_last_layer():
    model = graph(
        """(float[n,4,8,8] x) => (float[n,4,8,8] a, float[n,8,8,8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        a = Conv <pads = [1, 1, 1, 1]> (r, w)
        d = Conv <pads = [1, 1, 1, 1]> (r, w)
        s = Sigmoid (d)
        y = Concat <axis = 1> (a, s)
        }""",
        **weights(w=(4, 4, 3, 3)),
    )
    with pytest.raises(NothingToQuantizeError, match=r"(?s)1 Conv: it is a first.*2 Conv: it is a"):
        quantized(model, first_last="float")


# Products of attention.


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, PRODUCTS),
        ({"softmax": False}, {"qb": PRODUCTS["qb"], "kb": PRODUCTS["kb"]}),
        ({"attention": False}, {}),
        ({"attention": False, "softmax": False}, {}),
    ],
)
def test_products_of_attention_by_choice(options, products):
    assert readers(quantized_block(block(), **options)) == LAYERS | products


# Sums.


def test_both_inputs_of_an_add_on_one_scale():
    model = quantized(option_a(), add_inputs="one_scale")
    scales = scale_names(model)
    assert readers(model) == readers(quantized(option_a(), add_inputs="both"))
    assert scales["c2"] == scales["r1"]
    assert scales["c4"] == scales["p4"] == scales["s4"] == scales["r2"]
    assert scales["r3"] != scales["r2"] != scales["r1"]
    separate = scale_names(quantized(option_a(), add_inputs="both"))
    assert separate["c2"] != separate["r1"]


# Single tensors.


def test_ranges_and_types_of_single_tensors():
    choices = parse_choices(["r1=int8:-6:3", "r[23]=0:5.1", "m=int8", "x=scale:0.05"])
    model = quantized(option_a(), tensors=choices)
    assert scheme(model, "r1") == (np.float32(6 / 127), 0, "int8")
    assert scheme(model, "r2") == scheme(model, "p4") == (np.float32(5.1 / 255), 0, "uint8")
    assert scheme(model, "m")[1:] == (0, "int8")
    assert scheme(model, "x") == (np.float32(0.05), 0, "int8")


def test_of_two_choices_the_last_holds():
    model = quantized(option_a(), tensors=parse_choices(["r*=0:9", "r1=0:25.5"]))
    assert scheme(model, "r1")[0] == np.float32(0.1)
    assert scheme(model, "r2")[0] == np.float32(9 / 255)


def test_tensors_that_stay_float():
    found = report(tensors=(("r3", TensorChoice(stays_float=True)),))
    assert "r3" not in readers(found.model)
    assert why(found) == {"c4": "what it reads was chosen to stay float"}


def test_what_was_moved_from_a_tensor_that_stays_float_has_its_own_scale():
    model = quantized(option_a(), tensors=parse_choices(["r2=float"]))
    assert "r2" not in readers(model)
    assert scale_names(model)["p4"] == "s4_scale"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("float", TensorChoice(stays_float=True)),
        ("-3:3", TensorChoice(span=Range(-3, 3))),
        ("uint8:-1e-1:6", TensorChoice(span=Range(-0.1, 6), activation="uint8")),
        ("int8", TensorChoice(activation="int8")),
        ("scale:0.5", TensorChoice(span=Range(-63.5, 63.5), activation="int8")),
    ],
)
def test_forms_of_a_choice(text, choice):
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    "text",
    ["", "floats", "3", "3:3", "4:3", "0:nan", "0:inf", "int4:0:1", "scale:0", "scale:", "1:2:3"],
)
def test_choices_that_are_refused(text):
    with pytest.raises(InputError, match="bad choice for a tensor"):
        parse_choice(text)


def test_choices_for_tensors_that_are_not_quantized():
    with pytest.raises(InputError, match=r"(?s)no tensor 'r9' is quantized.*such as r"):
        quantized(option_a(), tensors=parse_choices(["r9=0:1"]))
    # c1 is a tensor of the model, but no rounding is in front of a Relu.
    with pytest.raises(InputError, match="no tensor 'c1' is quantized"):
        quantized(option_a(), tensors=parse_choices(["c1=0:1"]))


def test_tensors_of_one_scale_cannot_have_two_ranges():
    with pytest.raises(InputError, match=r"(?s)'r2' and 'p4' share one scale"):
        quantized(option_a(), tensors=parse_choices(["r2=0:1", "p4=0:2"]))


def test_choices_in_a_file(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"r1": "0:3", "*": "float"}))
    (tmp_path / "c.toml").write_text('r1 = "0:3"\n"*" = "float"\n')
    want = parse_choices(["r1=0:3", "*=float"])
    assert read_choices(tmp_path / "c.json") == read_choices(tmp_path / "c.toml") == want


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "{", "cannot read choices"),
        ("c.toml", "a = ", "cannot read choices"),
        ("c.json", "[1]", "no table of texts"),
        ("c.json", '{"a": 1}', "no table of texts"),
        ("c.json", '{"a": "1"}', "bad choice"),
        (None, "", "cannot read choices"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, message):
    path = tmp_path / (name or "none.json")
    if name:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_choices(path)


# Weights.


def test_weights_stored_as_floats():
    found, want = report(weights="float"), report()
    assert not [
        v
        for v in found.model.graph.initializers.values()
        if v.dtype == ir.DataType.INT8 and v.shape and v.shape.rank() > 1
    ]
    assert count_integer(found.model) == count_integer(want.model) == 5
    x = {"x": samples(8, seed=1)}
    assert np.array_equal(run(found.model, x)[0], run(want.model, x)[0])
    w1 = option_a().graph.initializers["w1"].const_value.numpy()
    assert np.array_equal(found.model.graph.initializers["w1"].const_value.numpy(), w1)


def test_weights_stored_as_floats_keep_their_pattern():
    dense = option_a()
    names = ("w2", "w3", "w4", "fc")
    arrays = {name: dense.graph.initializers[name].const_value.numpy() for name in names}
    model = option_a(**{name: sparse(w) for name, w in arrays.items()})
    assert verify_pattern(quantized(model, weights="float"), "2:4", ["w1*"]) == []


# Recipes.


def test_every_recipe_spends_all_steps_of_a_byte():
    for recipe in RECIPES:
        assert QuantizeOptions(recipe=recipe).ranges.activation == "uint8"
        assert QuantizeOptions(recipe=recipe, activation="int8").ranges.activation == "int8"


@pytest.mark.parametrize("name", ["method", "activation", "add_inputs", "first_last", "weights"])
def test_options_that_mean_nothing(name):
    with pytest.raises(InputError, match=f"bad quantization option {name}"):
        QuantizeOptions(**{name: "half"})
