"""The passes that move quantizers: results are equal to the last bit."""

import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler.passes import (
    drop_requantize,
    merge_quantize,
    move_clip,
    move_dequantize,
    move_quantize,
)

CHANNELS = "int64[8] p = {0, 1, 0, 0, 0, 1, 0, 0}"
WINDOW = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]"
BOUNDS = "int64[1] a = {1}, int64[1] b = {9}, int64[1] c = {2}"
# name, operator on t, shape of its result; t is [1,4,6,6]
MOVERS = [
    ("reshape", "Reshape (t, shape)", "1,144", "int64[2] shape = {1, 144}"),
    ("flatten", "Flatten (t)", "1,144", ""),
    ("squeeze", "Squeeze (t)", "4,6,6", ""),
    ("unsqueeze", "Unsqueeze (t, axes)", "1,1,4,6,6", "int64[1] axes = {0}"),
    ("transpose", "Transpose <perm = [0, 2, 3, 1]> (t)", "1,6,6,4", ""),
    ("slice", "Slice (t, a, b, c)", "1,4,5,6", BOUNDS),
    ("gather", "Gather <axis = 2> (t, at)", "1,4,2,6", "int64[2] at = {5, 0}"),
    ("expand", "Expand (t, shape)", "2,4,6,6", "int64[4] shape = {2, 1, 1, 1}"),
    ("tile", "Tile (t, times)", "1,4,12,6", "int64[4] times = {1, 1, 2, 1}"),
    ("resize", "Resize (t, , twice)", "1,4,12,12", "float[4] twice = {1, 1, 2, 2}"),
    ("max_pool", f"MaxPool <{WINDOW}> (t)", "1,4,3,3", ""),
    ("pad", "Pad (t, p)", "1,6,6,6", CHANNELS),
    ("pad_value", "Pad (t, p, v)", "1,6,6,6", f"{CHANNELS}, float v = {{0.5}}"),
    ("pad_edge", 'Pad <mode = "edge"> (t, p)', "1,4,7,6", "int64[8] p = {0, 0, 1, 0, 0, 0, 0, 0}"),
]
IDS = [case[0] for case in MOVERS]


def constants(*parts):
    return ", ".join(filter(None, parts))


def params(dtype="int8", scale=0.125, zero_point=3):
    return f"float s = {{{scale}}}, {dtype} z = {{{zero_point}}}"


# move_dequantize


@pytest.mark.parametrize(("name", "op", "shape", "extra"), MOVERS, ids=IDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_dequantize_moves_down(golden, name, op, shape, extra, dtype):
    model = graph(
        f"({dtype}[1,4,6,6] x) => (float[{shape}] y) <{constants(params(dtype), extra)}>"
        f" {{ t = DequantizeLinear (x, s, z)\n y = {op} }}"
    )
    after = check(move_dequantize, golden if dtype == "int8" else None, model, name)
    assert op_types(after)[-1] == "DequantizeLinear"


def test_a_resize_that_interpolates_is_no_mover():
    model = graph(f"""(int8[1,4,6,6] x) => (float[1,4,12,12] y)
        <{params()}, float[4] twice = {{1, 1, 2, 2}}> {{
        t = DequantizeLinear (x, s, z)
        y = Resize <mode = "linear"> (t, , twice) }}""")
    after, refusals = apply(move_dequantize, model)
    assert not refusals
    assert op_types(after) == ["DequantizeLinear", "Resize"]


def test_other_readers_keep_their_dequantizer():
    model = graph(f"""(int8[1,4] x) => (float[4,1] y, float[1,4] n) <{params()}> {{
        t = DequantizeLinear (x, s, z)
        y = Transpose (t)
        n = Neg (t) }}""")
    after, refusals = apply(move_dequantize, model)
    assert not refusals
    assert op_types(after) == ["DequantizeLinear", "Transpose", "DequantizeLinear", "Neg"]


@pytest.mark.parametrize(
    ("inputs", "parameters", "op", "shape", "reason"),
    [
        (
            "",
            "float[4] s = {1, 2, 3, 4}, int8[4] z = {0, 0, 0, 0}",
            "Flatten (t)",
            "1,144",
            "DequantizeLinear 't' is per channel; activations are quantized per tensor",
        ),
        (
            ", float s",
            "int8 z = {0}",
            "Flatten (t)",
            "1,144",
            "DequantizeLinear 't' has a scale or zero point that is computed at run time",
        ),
        (
            "",
            "float s = {-1}, int8 z = {0}",
            "Flatten (t)",
            "1,144",
            "DequantizeLinear 't' has scale -1.0 (float32); expected a positive float32",
        ),
        (
            "",
            constants(params(), "int64[8] p = {0, 1, 0, 0, 0, 1, 0, 0}, float v = {0.3}"),
            "Pad (t, p, v)",
            "1,6,6,6",
            "it pads with 0.3, which is no multiple of the scale 0.125",
        ),
        (
            ", float v",
            constants(params(), "int64[8] p = {0, 1, 0, 0, 0, 1, 0, 0}"),
            "Pad (t, p, v)",
            "1,6,6,6",
            "it pads with a value computed at run time",
        ),
    ],
)
def test_dequantizers_that_stay(inputs, parameters, op, shape, reason):
    model = graph(
        f"(int8[1,4,6,6] x{inputs}) => (float[{shape}] y) <{parameters}>"
        f" {{ t = DequantizeLinear <axis = 1> (x, s, z)\n y = {op} }}"
    )
    assert refusal(move_dequantize, model) == reason


def test_a_16_bit_tensor_stays():
    model = graph(
        f"""(int16[1,4] x) => (float[1,4] y) <{params("int16")}> {{
        t = DequantizeLinear (x, s, z)
        y = Flatten (t) }}""",
        opset=21,
    )
    reason = refusal(move_dequantize, model)
    assert reason == "DequantizeLinear 't' quantizes to int16; expected int8 or uint8"


POOL = "MaxPool <kernel_shape = [2, 2]>"


def test_a_max_pool_whose_indices_are_read_stays():
    model = graph(f"""(int8[1,1,4,4] x) => (float[1,1,3,3] y, int64[1,1,3,3] i) <{params()}> {{
        t = DequantizeLinear (x, s, z)
        y, i = {POOL} (t) }}""")
    assert refusal(move_dequantize, model) == "its indices are read"


# move_quantize


@pytest.mark.parametrize(("name", "op", "shape", "extra"), MOVERS, ids=IDS)
def test_quantize_moves_up(golden, name, op, shape, extra):
    model = graph(
        f"(float[1,4,6,6] t) => (int8[{shape}] y) <{constants(params(), extra)}>"
        f" {{ f = {op}\n y = QuantizeLinear (f, s, z) }}"
    )
    after = check(move_quantize, golden, model, name)
    assert op_types(after)[0] == "QuantizeLinear"


def test_quantize_moves_up_a_chain_to_its_equal():
    model = graph(f"""(float[1,4] x) => (int8[4,1] y, int8[1,4] z2) <{params()}> {{
        a = Flatten (x)
        b = Transpose (a)
        y = QuantizeLinear (b, s, z)
        z2 = QuantizeLinear (x, s, z) }}""")
    after, refusals = apply(move_quantize, model)
    assert not refusals
    assert op_types(after) == ["QuantizeLinear", "Flatten", "Transpose", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("rest", "outputs", "extra", "reason"),
    [
        (
            "a = Flatten (x)\n n = Neg (a)\n y = QuantizeLinear (a, s, z)",
            "float[1,4] n",
            "",
            "its result has 2 readers: 'n', 'y'",
        ),
        (
            "a = Flatten (x)\n n = Neg (x)\n y = QuantizeLinear (a, s, z)",
            "float[1,4] n",
            "",
            "'x' is also read by Neg 'n', not with this scale",
        ),
        (
            "a = Flatten (x)\n n = QuantizeLinear (x, s2, z)\n y = QuantizeLinear (a, s, z)",
            "int8[1,4] n",
            "float s2 = {1}",
            "'x' is also read by QuantizeLinear 'n', not with this scale",
        ),
        (
            "f = Flatten (x)\n a = Transpose <perm = [0, 1]> (f)\n n = Neg (x)\n"
            " y = QuantizeLinear (a, s, z)",
            "float[1,4] n",
            "",
            "'x' is also read by Neg 'n', not with this scale",
        ),
        (
            "c = Neg (x)\n a = Flatten (c)\n y = QuantizeLinear (a, s, z)",
            "float[1,4] c",
            "",
            "'c' is also an output of the model, in float",
        ),
        (
            "a = Flatten (x)\n y = QuantizeLinear (a, s16, z)",
            "",
            "float[1] s16 = {1}",
            "QuantizeLinear 'y' is per channel; activations are quantized per tensor",
        ),
    ],
)
def test_quantizers_that_stay(rest, outputs, extra, reason):
    model = graph(
        f"(float[1,4] x) => ({constants('int8[1,4] y', outputs)})"
        f" <{constants(params(), extra)}> {{ {rest} }}"
    )
    assert refusal(move_quantize, model) == reason


def test_a_quantizer_stays_below_a_pad_with_an_unknown_value():
    model = graph(f"""(float[4] x, float v) => (int8[6] y) <{params()}, int64[2] p = {{1, 1}}> {{
        a = Pad (x, p, v)
        y = QuantizeLinear (a, s, z) }}""")
    assert refusal(move_quantize, model) == "it pads with a value computed at run time"


# move_clip


@pytest.mark.parametrize("zero_point", [-128, -5, 0, 127])
def test_relu_moves_up(golden, zero_point):
    model = graph(f"""(float[4,16] x) => (float[4,16] y) <{params(zero_point=zero_point)}> {{
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        y = Relu (d) }}""")
    after = check(move_clip, golden if zero_point == -5 else None, model)
    assert op_types(after)[0] == "Relu"


RELU = "q = QuantizeLinear (x, s, z)\n d = DequantizeLinear (q, s2, z)\n y = Relu (d)"


@pytest.mark.parametrize(
    ("rest", "outputs", "extra", "reason"),
    [
        (RELU, "", "float s2 = {1}", "'q' and 'd' have different scales"),
        (RELU, "int8[4] q", "float s2 = {0.125}", "its result 'q' is an output of the model"),
        (RELU, "float[4] d", "float s2 = {0.125}", "its result 'd' is an output of the model"),
        (
            RELU,
            "",
            "float[1] s2 = {1}",
            "DequantizeLinear 'd' is per channel; activations are quantized per tensor",
        ),
    ],
)
def test_relus_that_stay(rest, outputs, extra, reason):
    model = graph(
        f"(float[4] x) => ({constants('float[4] y', outputs)})"
        f" <{constants(params(), extra)}> {{ {rest} }}"
    )
    assert refusal(move_clip, model) == reason


@pytest.mark.parametrize("op", ["Neg (d)", "Relu (g)"])
def test_other_operators_do_not_move(op):
    model = graph(f"""(float[4] x, int8[4] p) => (float[4] y, float[4] e) <{params()}> {{
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        g = DequantizeLinear (p, s, z)
        y = {op}
        e = Add (d, g) }}""")
    assert [move_clip.rule(node) for node in model.graph] == [None] * 5


@pytest.mark.parametrize("bounds", ["{-1.25}, float h = {2.5}", "{0}, float h = {6}"])
def test_clip_moves_up(golden, bounds):
    """Bounds that are multiples of the scale, or beyond what the quantizer can hold."""
    model = graph(f"""(float[4,16] x) => (float[4,16] y)
        <{params(scale=0.03125, zero_point=-70)}, float l = {bounds}> {{
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        y = Clip (d, l, h) }}""")
    after = check(move_clip, golden if "1.25" in bounds else None, model, "bounds")
    assert op_types(after)[0] == "Clip"


def test_a_clip_between_two_steps_stays():
    for low, high, bound in ((-1.01, 2.5, "-1.01"), (-1.25, 2.51, "2.51"), (9.5, 10.0, "9.5")):
        model = graph(f"""(float[4,16] x) => (float[4,16] y)
            <{params(scale=0.03125, zero_point=-70)}, float l = {{{low}}}, float h = {{{high}}}> {{
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = Clip (d, l, h) }}""")
        assert refusal(move_clip, model) == f"its bound {bound} lies between two values of 'q'"


# drop_requantize


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("scale", ["0.1", "3.0e-30", "1.0e+30"])
def test_an_equal_quantizer_is_dropped(golden, dtype, scale):
    model = graph(f"""({dtype}[16,16] x) => ({dtype}[16,16] y) <{params(dtype, scale)}> {{
        n = Flatten (x)
        f = DequantizeLinear (n, s, z)
        q = QuantizeLinear (f, s, z)
        y = Transpose (q) }}""")
    check(drop_requantize, golden if (dtype, scale) == ("int8", "0.1") else None, model)


def test_the_dropped_quantizer_was_an_output(golden):
    model = graph(f"""(int8[4] x) => (int8[4] y) <{params()}> {{
        f = DequantizeLinear (x, s, z)
        y = QuantizeLinear (f, s, z) }}""")
    check(drop_requantize, golden, model, "output")


REQUANTIZE = "f = DequantizeLinear (x, s, z)\n y = QuantizeLinear (f, s2, z2)"


@pytest.mark.parametrize(
    ("extra", "output", "reason"),
    [
        (
            "float s2 = {1}, int8 z2 = {3}",
            "int8",
            "'f' changes its scale from 0.125 (zero point 3) to 1 (3)",
        ),
        (
            "float s2 = {0.125}, int8 z2 = {4}",
            "int8",
            "'f' changes its scale from 0.125 (zero point 3) to 0.125 (4)",
        ),
        (
            "float s2 = {0.125}, uint8 z2 = {3}",
            "uint8",
            "'f' changes its scale from 0.125 (zero point 3) to 0.125 (3)",
        ),
        (
            "float[1] s2 = {1}, int8[1] z2 = {3}",
            "int8",
            "QuantizeLinear 'y' is per channel; activations are quantized per tensor",
        ),
    ],
)
def test_requantizers_that_stay(extra, output, reason):
    model = graph(
        f"(int8[4] x) => ({output}[4] y) <{constants(params(), extra)}> {{ {REQUANTIZE} }}"
    )
    assert refusal(drop_requantize, model) == reason


# merge_quantize


def test_equal_quantizers_become_one(golden):
    model = graph(f"""(float[4] x) => (int8[4] y, float[4] d) <{params()}> {{
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s, z)
        y = Transpose (a)
        d = DequantizeLinear (b, s, z) }}""")
    check(merge_quantize, golden, model)


def test_quantizers_of_different_scales_are_two():
    model = graph(f"""(float[4] x) => (int8[4] y, int8[4] y2) <{params()}, float s2 = {{1}}> {{
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s2, z)
        y = Transpose (a)
        y2 = Transpose (b) }}""")
    _, refusals = apply(merge_quantize, model)
    assert [r.reason for r in refusals] == [
        "'x' is quantized with scale 0.125 here and with 1 by 'b'",
        "'x' is quantized with scale 1 here and with 0.125 by 'a'",
    ]


def test_a_quantizer_per_channel_is_not_merged():
    model = graph(f"""(float[1] x) => (int8[1] y, int8[1] y2) <{params()}, float[1] s2 = {{1}}> {{
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s2, z)
        y = Transpose (a)
        y2 = Transpose (b) }}""")
    _, refusals = apply(merge_quantize, model)
    reason = "QuantizeLinear 'b' is per channel; activations are quantized per tensor"
    assert [r.reason for r in refusals] == [reason, reason]


def test_outputs_of_the_model_are_not_merged():
    model = graph(f"""(float[4] x) => (int8[4] a, int8[4] b) <{params()}> {{
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s, z) }}""")
    after, refusals = apply(merge_quantize, model)
    assert not refusals
    assert op_types(after) == ["QuantizeLinear", "QuantizeLinear"]
    assert [value.name for value in after.graph.outputs] == ["a", "b"]


def test_a_float_reader_beside_a_quantizer_is_another_pattern():
    model = graph(f"""(float[4] x) => (float[4] n, int8[4] q) <{params()}> {{
        n = Neg (x)
        q = QuantizeLinear (x, s, z) }}""")
    assert [merge_quantize.rule(node) for node in model.graph] == [None, None]
