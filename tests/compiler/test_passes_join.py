"""The moves of quantizers over Concat and Split, and changes of scale: equal to the last bit."""

import pytest

from tests.graphs import apply, check, graph, op_types, refusal, run
from twofour.compiler.passes import (
    drop_requantize,
    fuse_requantize,
    move_dequantize,
    move_quantize,
    pipeline,
)

SCHEME = "float s = {0.125}, int8 z = {3}"
OTHER = "float s2 = {0.25}, int8 z2 = {-4}"
TWO = "(int8[1,2,3,3] a, int8[1,4,3,3] b)"


def concat(inputs="s, z", names="b", reader="") -> str:
    return (
        f"f = DequantizeLinear (a, s, z)\n g = DequantizeLinear ({names}, {inputs})\n"
        f" y = Concat <axis = 1> (f, g){reader}"
    )


def test_dequantize_moves_below_a_concat(golden):
    model = graph(f"{TWO} => (float[1,6,3,3] y) <{SCHEME}> {{ {concat()} }}")
    after = check(move_dequantize, golden, model, "concat")
    assert op_types(after) == ["Concat", "DequantizeLinear"]


def test_a_tensor_joined_with_itself():
    model = graph(
        f"(int8[1,2,3,3] a) => (float[1,4,3,3] y) <{SCHEME}>"
        "{ f = DequantizeLinear (a, s, z) y = Concat <axis = 1> (f, f) }"
    )
    assert op_types(check(move_dequantize, None, model)) == ["Concat", "DequantizeLinear"]


def test_dequantize_moves_below_a_split(golden):
    model = graph(f"""(int8[1,6,3,3] x) => (float[1,2,3,3] y, float[1,3,3,3] n) <{SCHEME},
        int64[3] sizes = {{2, 1, 3}}> {{
        f = DequantizeLinear (x, s, z)
        y, unread, m = Split <axis = 1> (f, sizes)
        n = Neg (m) }}""")
    after = check(move_dequantize, golden, model, "split")
    assert op_types(after) == ["Split", "DequantizeLinear", "DequantizeLinear", "Neg"]


@pytest.mark.parametrize(
    ("inputs", "extra", "reason"),
    [
        (
            "s2, z2",
            f", {OTHER}",
            "its inputs have different scales: 'a' 0.125 (3), 'b' 0.25 (-4)",
        ),
        (
            "s, z2",
            ", int8 z2 = {4}",
            "its inputs have different scales: 'a' 0.125 (3), 'b' 0.125 (4)",
        ),
        (
            "s2, z",
            ", float[1] s2 = {1}",
            "DequantizeLinear 'g' is per channel; activations are quantized per tensor",
        ),
    ],
)
def test_concats_of_different_scales_stay_float(inputs, extra, reason):
    model = graph(f"{TWO} => (float[1,6,3,3] y) <{SCHEME}{extra}> {{ {concat(inputs)} }}")
    assert refusal(move_dequantize, model) == reason


def test_a_concat_with_a_float_stays_float():
    model = graph(
        f"(int8[1,2,3,3] a, float[1,4,3,3] g) => (float[1,6,3,3] y) <{SCHEME}>"
        "{ f = DequantizeLinear (a, s, z) y = Concat <axis = 1> (f, g) }"
    )
    assert refusal(move_dequantize, model) == "'g' is float: it is an input of the model"


def test_concats_and_splits_of_floats_are_another_pattern():
    model = graph("""(float[1,4] x) => (float[1,4] y) {
        a, b = Split <axis = 1, num_outputs = 2> (x)
        y = Concat <axis = 1> (b, a) }""")
    for rule in (move_dequantize, move_quantize):
        assert [rule.rule(node) for node in model.graph] == [None, None]


def test_a_split_per_channel_stays():
    model = graph("""(int8[1,4] x) => (float[1,2] y) <float[1] s = {1}, int8[1] z = {0}> {
        f = DequantizeLinear (x, s, z)
        y, n = Split <axis = 1, num_outputs = 2> (f) }""")
    reason = "DequantizeLinear 'f' is per channel; activations are quantized per tensor"
    assert refusal(move_dequantize, model) == reason


def test_quantize_moves_above_a_concat(golden):
    model = graph(f"""(float[1,2,3,3] a, float[1,4,3,3] b) => (int8[1,8,3,3] y) <{SCHEME}> {{
        c = Concat <axis = 1> (a, b, a)
        y = QuantizeLinear (c, s, z) }}""")
    after = check(move_quantize, golden, model, "concat")
    assert op_types(after) == ["QuantizeLinear", "QuantizeLinear", "Concat"]


def test_quantize_moves_above_a_split(golden):
    model = graph(f"""(float[1,6] x) => (int8[1,2] y, int8[1,3] n) <{SCHEME},
        int64[3] sizes = {{2, 1, 3}}> {{
        a, unread, b = Split <axis = 1> (x, sizes)
        n = QuantizeLinear (b, s, z)
        y = QuantizeLinear (a, s, z) }}""")
    after = check(move_quantize, golden, model, "split")
    assert op_types(after) == ["QuantizeLinear", "Split"]


def test_quantize_moves_up_a_chain_of_joins_and_movers():
    model = graph(f"""(float[1,2,4,4] x, float[1,2,8,8] w) => (int8[1,4,2,2] y) <{SCHEME}> {{
        a = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (w)
        j = Concat <axis = 1> (x, a)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (j)
        y = QuantizeLinear (p, s, z) }}""")
    after = check(move_quantize, None, model)
    assert op_types(after) == ["QuantizeLinear", "QuantizeLinear", "MaxPool", "Concat", "MaxPool"]


def test_a_part_that_other_movers_read_stays_float():
    model = graph(f"""(float[1,2,4,4] x) => (int8[1,4,4,4] y) <{SCHEME}> {{
        a = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)
        j = Concat <axis = 1> (x, a)
        y = QuantizeLinear (j, s, z) }}""")
    reason = "'x' is also read by MaxPool 'a', not with this scale"
    assert refusal(move_quantize, model) == reason


@pytest.mark.parametrize(
    ("rest", "outputs", "extra", "reason"),
    [
        (
            "c = Concat <axis = 1> (x, w)\n n = Neg (c)\n y = QuantizeLinear (c, s, z)",
            ", float[1,8] n",
            "",
            "its result has 2 readers: 'n', 'y'",
        ),
        (
            "c = Concat <axis = 1> (x, w)\n n = Neg (w)\n y = QuantizeLinear (c, s, z)",
            ", float[1,4] n",
            "",
            "'w' is also read by Neg 'n', not with this scale",
        ),
        (
            "v = Neg (w)\n c = Concat <axis = 1> (x, v)\n y = QuantizeLinear (c, s, z)",
            ", float[1,4] v",
            "",
            "'v' is also an output of the model, in float",
        ),
        (
            "a, b = Split <axis = 1, num_outputs = 2> (x)\n n = Neg (b)\n"
            " y = QuantizeLinear (a, s, z)",
            ", float[1,2] n",
            "",
            "its result is read as float by Neg 'n'",
        ),
        (
            "a, b = Split <axis = 1, num_outputs = 2> (x)\n y = QuantizeLinear (a, s, z)",
            ", float[1,2] b",
            "",
            "its result 'b' is an output of the model",
        ),
        (
            "a, b = Split <axis = 1, num_outputs = 2> (x)\n n = Neg (x)\n"
            " y = QuantizeLinear (a, s, z)",
            ", float[1,4] n",
            "",
            "'x' is also read by Neg 'n', not with this scale",
        ),
    ],
)
def test_quantizers_that_stay_below_joins(rest, outputs, extra, reason):
    model = graph(
        f"(float[1,4] x, float[1,4] w) => (int8[1,k] y{outputs}) <{SCHEME}{extra}> {{ {rest} }}"
    )
    assert refusal(move_quantize, model) == reason


def test_a_split_of_two_scales_stays():
    model = graph(f"""(float[1,4] x) => (int8[1,2] y, int8[1,2] n) <{SCHEME}, {OTHER}> {{
        a, b = Split <axis = 1, num_outputs = 2> (x)
        y = QuantizeLinear (a, s, z)
        n = QuantizeLinear (b, s2, z2) }}""")
    after, refusals = apply(move_quantize, model)
    assert op_types(after) == op_types(model)
    text = "its results have different scales: 'a' 0.125 (3), 'b' 0.25 (-4)"
    assert [r.reason for r in refusals] == [text, text]


def test_inputs_of_other_scales_are_rescaled_as_bytes(golden):
    """As ONNX Runtime's own tool writes a Concat: each input and the result have a scale."""
    model = graph(
        f"{TWO} => (int8[1,6,3,3] q) <{SCHEME}, {OTHER}>"
        f"{{ {concat('s2, z2')}\n q = QuantizeLinear (y, s, z) }}"
    )
    want, fused = run(model), pipeline.run_passes(model)
    assert op_types(fused.model) == ["QActivation", "Concat"]
    assert (run(fused.model)[0] == want[0]).all()


def test_a_chain_of_equal_scales_keeps_its_bytes():
    model = graph(
        f"{TWO} => (int8[1,6,3,3] q) <{SCHEME}>{{ {concat()}\n q = QuantizeLinear (y, s, z) }}"
    )
    assert op_types(pipeline.run_passes(model).model) == ["Concat"]


def test_a_change_of_scale_becomes_one_operator(golden):
    for dtype, after in (("int8", "uint8"), ("uint8", "int8")):
        model = graph(
            f"({dtype}[64] x) => ({after}[64] y) <float s = {{0.1}}, {dtype} z = {{9}},"
            f" float s2 = {{0.07}}, {after} z2 = {{30}}>"
            "{ f = DequantizeLinear (x, s, z) y = QuantizeLinear (f, s2, z2) }"
        )
        changed = check(fuse_requantize, golden if dtype == "int8" else None, model)
        assert op_types(changed) == ["QActivation"]


@pytest.mark.parametrize(
    ("inputs", "extra", "reason"),
    [
        (
            "x, s, z",
            "float[1] s2 = {1}, int8[1] z2 = {0}",
            "QuantizeLinear 'y' is per channel; activations are quantized per tensor",
        ),
        ("k, s, z", "float s2 = {1}, int8 z2 = {0}, int8[4] k = {1, 2, 3, 4}", "'k' is a constant"),
    ],
)
def test_changes_of_scale_that_stay(inputs, extra, reason):
    model = graph(
        f"(int8[4] x) => (int8[4] y) <{SCHEME}, {extra}>"
        f"{{ f = DequantizeLinear ({inputs}) y = QuantizeLinear (f, s2, z2) }}"
    )
    assert refusal(fuse_requantize, model) == reason


def test_a_quantizer_of_floats_changes_no_scale():
    model = graph(f"(float[4] x) => (int8[4] y) <{SCHEME}> {{ y = QuantizeLinear (x, s, z) }}")
    assert [fuse_requantize.rule(node) for node in model.graph] == [None]
    assert [drop_requantize.rule(node) for node in model.graph] == [None]
