"""The pass that makes integer pooling."""

import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler.passes import fuse_integer_pool

PARAMS = "float s = {0.05}, int8 z = {3}, float s2 = {0.07}, int8 z2 = {-6}"


def constants(*parts):
    return ", ".join(filter(None, parts))


# fuse_integer_pool


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(
    ("name", "attributes", "shape"),
    [
        ("plain", "kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]", "1,4,4,8"),
        ("same", 'kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"', "1,4,4,4"),
    ],
)
def test_max_pool_of_bytes(golden, name, attributes, shape, dtype):
    model = graph(
        f"({dtype}[1,4,7,8] x) => ({dtype}[{shape}] y) {{ y = MaxPool <{attributes}> (x) }}"
    )
    check(fuse_integer_pool, golden if dtype == "int8" else None, model, f"max_{name}")


@pytest.mark.parametrize(
    ("x", "attributes", "y", "reason"),
    [
        ("1,4,9", "kernel_shape = [3]", "1,4,7", "it pools over 1 axes; expected 2"),
        (
            "1,4,9,9",
            "kernel_shape = [3, 3], dilations = [2, 2]",
            "1,4,5,5",
            "its window is dilated",
        ),
        (
            "1,4,9,9",
            "kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1",
            "1,4,5,5",
            "it rounds its output size up (ceil_mode)",
        ),
        (
            "n,4,9,9",
            "kernel_shape = [3, 3]",
            "n,4,7,7",
            "the shape of its input or result is not known",
        ),
    ],
)
def test_max_pools_that_stay(x, attributes, y, reason):
    model = graph(f"(int8[{x}] x) => (int8[{y}] y) {{ y = MaxPool <{attributes}> (x) }}")
    assert refusal(fuse_integer_pool, model) == reason


def test_a_max_pool_whose_indices_are_read_stays():
    model = graph("""(int8[1,4,9,9] x) => (int8[1,4,8,8] y, int64[1,4,8,8] i) {
        y, i = MaxPool <kernel_shape = [2, 2]> (x) }""")
    assert refusal(fuse_integer_pool, model) == "its indices are read"


def test_a_float_max_pool_stays():
    model = graph("""(float[1,4,9,9] x) => (float[1,4,8,8] y) {
        y = MaxPool <kernel_shape = [2, 2]> (x) }""")
    assert fuse_integer_pool.rule(model.graph[0]) is None


def average(nodes, output, extra="", opset=18, size="1,4,3,5", parameters=PARAMS):
    return graph(
        f"(int8[{size}] x) => ({output} y) <{constants(parameters, extra)}>"
        f" {{ t = DequantizeLinear <axis = 1> (x, s, z)\n {nodes} }}",
        opset=opset,
    )


AXES = "int64[2] axes = {-1, 2}"
AVERAGES = [
    ("global", "y = GlobalAveragePool (t)", "float[1,4,1,1]", "", 18),
    ("mean", "y = ReduceMean <keepdims = 0> (t, axes)", "float[1,4]", AXES, 18),
    ("mean17", "y = ReduceMean <axes = [2, 3]> (t)", "float[1,4,1,1]", "", 17),
    ("window", "y = AveragePool <kernel_shape = [3, 5]> (t)", "float[1,4,1,1]", "", 18),
    ("flat", "m = GlobalAveragePool (t)\n y = Flatten (m)", "float[1,4]", "", 18),
    ("quantized", "m = GlobalAveragePool (t)\n y = QuantizeLinear (m, s2, z2)",
     "int8[1,4,1,1]", "", 18),
    ("flat_quantized", "m = GlobalAveragePool (t)\n f = Flatten (m)\n"
     " y = QuantizeLinear (f, s2, z2)", "int8[1,4]", "", 18),
    ("quantized_flat", "m = GlobalAveragePool (t)\n q = QuantizeLinear (m, s2, z2)\n"
     " y = Squeeze (q, axes)", "int8[1,4]", AXES, 18),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "nodes", "output", "extra", "opset"), AVERAGES, ids=[a[0] for a in AVERAGES]
)
def test_global_averages(golden, name, nodes, output, extra, opset):
    model = average(nodes, output, extra, opset)
    # Float: 15 terms below 8, summed in another order. Quantized: that moves no result here.
    bound = 0.0 if "quantized" in name else 16 * 8 * 2.0**-24
    after = check(fuse_integer_pool, golden, model, f"mean_{name}", bound)
    assert op_types(after) == ["QGlobalAveragePool" + "F" * ("quantized" not in name)]


@pytest.mark.parametrize(
    ("nodes", "output", "extra", "options", "reason"),
    [
        (
            "y = ReduceMean (t, axes)",
            "float[1,1,1,5]",
            "int64[2] axes = {1, 2}",
            {},
            "it averages over axes [1, 2]; expected 2 and 3",
        ),
        (
            "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (t)",
            "float[1,4,2,3]",
            "",
            {},
            "it rounds its output size up (ceil_mode)",
        ),
        (
            "y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (t)",
            "float[1,4,1,3]",
            "",
            {"opset": 19},
            "its window is dilated",
        ),
        (
            "y = AveragePool <kernel_shape = [2]> (t)",
            "float[1,4,2]",
            "",
            {"size": "1,4,3"},
            "it pools over 1 axes; expected 2",
        ),
        (
            "y = AveragePool <kernel_shape = [2, 2]> (t)",
            "float[n,4,2,4]",
            "",
            {"size": "n,4,3,5"},
            "the shape of its input or result is not known",
        ),
        (
            "y = GlobalAveragePool (t)",
            "float[1,4,1]",
            "",
            {"size": "1,4,3"},
            "its input has shape 1x4x3; expected 4 known axes",
        ),
        (
            "y = GlobalAveragePool (t)",
            "float[1,4,1,1]",
            "",
            {"parameters": "float[4] s = {1, 2, 3, 4}, int8[4] z = {0, 0, 0, 0}"},
            "DequantizeLinear 't' is per channel; activations are quantized per tensor",
        ),
    ],
)
def test_averages_that_stay(nodes, output, extra, options, reason):
    assert refusal(fuse_integer_pool, average(nodes, output, extra, **options)) == reason


WINDOWS = [
    ("inside", "kernel_shape = [2, 3]", "1,4,2,3"),
    ("padded", "kernel_shape = [3, 3], strides = [2, 1], pads = [1, 1, 1, 0]", "1,4,2,4"),
    ("counted", "kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1", "1,4,3,5"),
    ("same", 'kernel_shape = [2, 2], strides = [2, 2], auto_pad = "SAME_LOWER"', "1,4,2,3"),
]


@pytest.mark.parametrize(("name", "attributes", "shape"), WINDOWS, ids=[w[0] for w in WINDOWS])
def test_averages_over_windows(golden, name, attributes, shape):
    model = average(f"y = AveragePool <{attributes}> (t)", f"float[{shape}]")
    after = check(fuse_integer_pool, golden, model, f"average_{name}")
    assert op_types(after) == ["QAveragePoolF"]
    nodes = f"m = AveragePool <{attributes}> (t)\n y = QuantizeLinear (m, s2, z2)"
    after = check(fuse_integer_pool, None, average(nodes, f"int8[{shape}]"))
    assert op_types(after) == ["QAveragePool"]


def test_an_average_read_twice_keeps_its_axes():
    model = graph(f"""(int8[1,4,3,5] x) => (float[1,4] y, float[1,4,1,1] n) <{PARAMS}> {{
        t = DequantizeLinear (x, s, z)
        m = GlobalAveragePool (t)
        y = Flatten (m)
        n = Neg (m) }}""")
    after, refusals = apply(fuse_integer_pool, model)
    assert not refusals
    assert op_types(after) == ["QGlobalAveragePoolF", "Flatten", "Neg"]


def test_a_float_average_is_another_pattern():
    model = graph("(float[1,4,3,5] x) => (float[1,4,1,1] y) { y = GlobalAveragePool (x) }")
    assert fuse_integer_pool.rule(model.graph[0]) is None


@pytest.mark.parametrize(
    ("op", "shape", "extra"),
    [
        ("ReduceMax <keepdims = 0> (m, axes)", "1,4", AXES),
        ("Reshape (m, to)", "4,1", "int64[2] to = {4, 1}"),
    ],
)
def test_what_follows_an_average_may_be_no_flattening(op, shape, extra):
    model = average(f"m = GlobalAveragePool (t)\n y = {op}", f"float[{shape}]", extra)
    after, refusals = apply(fuse_integer_pool, model)
    assert not refusals
    assert op_types(after) == ["QGlobalAveragePoolF", op.split()[0]]
