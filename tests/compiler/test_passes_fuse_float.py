"""The passes that fuse float operators, and data movement of any type."""

import numpy as np
import pytest

from tests.graphs import apply, check, graph, op_types, refusal
from twofour.compiler import ops
from twofour.compiler.passes import canonical_conv, canonical_gemm, fuse_epilogue, fuse_slice_pad

W4 = np.random.default_rng(5).normal(size=(4, 3, 3, 3)).astype(np.float32)
CONV = "Conv <pads = [1, 1, 1, 1], strides = [2, 2]>"
WEIGHT = "float[4,3,3,3] w, float[4] b = {0.1, -0.2, 0.3, -0.4}"


def constants(*parts):
    return ", ".join(filter(None, parts))


# fuse_slice_pad

SLICE = "a = Slice (x, zero, end, two, step)\n b = Slice (a, zero, end, three, step)\n"
BOUNDS = (
    "int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[1] one = {1},"
    " int64[1] two = {2}, int64[1] three = {3}, int64[1] step = {2}"
)
CHANNELS = "int64[8] p = {0, 1, 0, 0, 0, 2, 0, 0}"


def slice_pad(nodes, shape="1,7,4,4", dtype="int8", extra=CHANNELS, size="1,4,7,8", inputs=""):
    return graph(
        f"({dtype}[{size}] x{inputs}) => ({dtype}[{shape}] y) <{constants(BOUNDS, extra)}>"
        f" {{ {nodes} }}"
    )


@pytest.mark.parametrize(
    ("name", "pad", "dtype", "extra"),
    [
        ("float", "y = Pad (b, p)", "float", CHANNELS),
        ("value", "y = Pad (b, p, v)", "int8", f"{CHANNELS}, int8 v = {{-5}}"),
        ("vector", "y = Pad (b, p, v)", "uint8", f"{CHANNELS}, uint8[1] v = {{5}}"),
        ("axes", "y = Pad (b, p, , axes)", "float", "int64[2] p = {1, 2}, int64[1] axes = {-3}"),
    ],
)
def test_slices_and_pad_become_one(golden, name, pad, dtype, extra):
    after = check(fuse_slice_pad, golden, slice_pad(SLICE + pad, dtype=dtype, extra=extra), name)
    assert op_types(after) == ["SlicePad"]


def test_one_slice_over_both_axes(golden):
    nodes = "a = Slice (x, starts, ends, axes, steps)\n y = Pad (a, p)"
    extra = (
        f"{CHANNELS}, int64[2] starts = {{-7, 0}}, int64[2] ends = {{7, 100}},"
        " int64[2] axes = {-2, 3}, int64[2] steps = {3, 2}"
    )
    model = slice_pad(nodes, "1,7,3,4", extra=extra)
    check(fuse_slice_pad, golden, model, "both")


@pytest.mark.parametrize(
    ("nodes", "extra", "inputs", "reason"),
    [
        (
            SLICE + 'y = Pad <mode = "edge"> (b, p)',
            CHANNELS,
            "",
            "it pads in mode edge; expected constant",
        ),
        (
            SLICE + "y = Pad (b, p)",
            "int64[8] p = {0, 1, 0, 1, 0, 2, 0, 0}",
            "",
            "its pads (0, 1, 0, 1, 0, 2, 0, 0) do not add to the channels alone",
        ),
        (
            SLICE + "y = Pad (b, p)",
            "int64[8] p = {0, -1, 0, 0, 0, 2, 0, 0}",
            "",
            "its pads (0, -1, 0, 0, 0, 2, 0, 0) do not add to the channels alone",
        ),
        (
            "b = Slice (x, one, end, two, step)\n y = Pad (b, p)",
            CHANNELS,
            "",
            "Slice 'b' takes 1:9223372036854775807:2 of axis 2, not the whole axis",
        ),
        (
            "b = Slice (x, zero, three, two, step)\n y = Pad (b, p)",
            CHANNELS,
            "",
            "Slice 'b' takes 0:3:2 of axis 2, not the whole axis",
        ),
        (
            "b = Slice (x, end, minus, two, minus)\n y = Pad (b, p)",
            f"{CHANNELS}, int64[1] minus = {{-1}}",
            "",
            "Slice 'b' takes 9223372036854775807:-1:-1 of axis 2, not the whole axis",
        ),
        (
            "b = Slice (x, zero, end, one, step)\n y = Pad (b, p)",
            CHANNELS,
            "",
            "Slice 'b' steps over batch or channels",
        ),
        (
            "b = Slice (x, from, end, two, step)\n y = Pad (b, p)",
            CHANNELS,
            ", int64[1] from",
            "Slice 'b' has unknown bounds, or its input is not known to have 4 axes",
        ),
        (
            SLICE + "y = Pad (b, p, v)",
            CHANNELS,
            ", int8 v",
            "it pads with a value computed at run time",
        ),
        (
            SLICE + "c = Pad (b, p)\n y = Concat <axis = 1> (c, b)",
            CHANNELS,
            "",
            "Slice 'b': its result has 2 readers: 'c', 'y'",
        ),
    ],
)
def test_slices_that_stay(nodes, extra, inputs, reason):
    model = slice_pad(nodes, "a,b,c,d", extra=extra, inputs=inputs)
    if "from" in nodes:
        model.graph[0].outputs[0].shape = model.graph.inputs[0].shape
    assert refusal(fuse_slice_pad, model) == reason


def test_a_pad_of_pixels_is_another_pattern():
    model = slice_pad(
        SLICE + "y = Pad (b, p)", "1,4,6,4", extra="int64[8] p = {0, 0, 1, 0, 0, 0, 1, 0}"
    )
    assert [fuse_slice_pad.rule(node) for node in model.graph] == [None] * 3


def test_a_pad_alone_or_of_other_ranks_is_another_pattern():
    model = graph(f"(float[1,4,7,8] x) => (float[1,7,7,8] y) <{CHANNELS}> {{ y = Pad (x, p) }}")
    assert fuse_slice_pad.rule(model.graph[0]) is None
    model = slice_pad(
        "a = Slice (x, zero, end, two, step)\n y = Pad (a, p)",
        "1,6,4",
        extra="int64[6] p = {0, 1, 0, 0, 1, 0}",
        size="1,4,7",
    )
    assert [fuse_slice_pad.rule(node) for node in model.graph] == [None, None]


# fuse_epilogue


def convs(nodes, outputs="float[1,4,4,4] y", inputs=""):
    """Canonical convolutions c (and d) of x, and what follows."""
    model = graph(
        f"(float[1,3,8,8] x{inputs}) => ({outputs}) <{WEIGHT}>"
        f" {{ c = {CONV} (x, w, b)\n {nodes} }}",
        w=W4,
    )
    return apply(canonical_conv, model)[0]


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("relu", "y = Relu (c)"),
        ("add", "y = Add (c, r)"),
        ("add_relu", "a = Add (r, c)\n y = Relu (a)"),
        ("swish_add", "a = HardSwish (c)\n y = Add (r, a)"),
    ],
)
def test_the_epilogue_of_a_conv(golden, name, nodes):
    model = convs(nodes, inputs=", float[1,4,4,4] r")
    after = check(fuse_epilogue, golden, model, name)
    assert len(after.graph) == 1
    assert ops.parse_op(after.graph[0]).name == "c"


def test_the_later_of_two_convs_takes_the_other_as_residual(golden):
    model = convs(f"e = Neg (x)\n d = {CONV} (e, w, b)\n a = Add (d, c)\n y = Relu (a)")
    after = check(fuse_epilogue, golden, model, "projection")
    assert [(node.name, node.op_type) for node in after.graph][1:] == [
        ("e", "Neg"),
        ("d", "ConvAddRelu"),
    ]


def test_a_conv_without_an_activation_takes_the_other_as_residual():
    """Its sum may still go through an activation, also where the other one is computed later."""
    model = convs(f"e = Neg (x)\n d = {CONV} (e, w, b)\n s = HardSwish (d)\n y = Add (c, s)")
    after, _ = apply(fuse_epilogue, model)
    assert sorted(op_types(after)) == ["ConvAdd", "ConvHardSwish", "Neg"]


def test_a_gemm_has_an_epilogue_too():
    model = graph(
        """(float[2,5,3] x, float[2,5,4] r) => (float[2,5,4] y) <float[3,4] w> {
        c = MatMul (x, w)
        a = Add (r, c)
        y = Relu (a) }""",
        w=W4[:, :, 0, 0].T,
    )
    after = apply(fuse_epilogue, apply(canonical_gemm, model)[0])[0]
    assert op_types(after) == ["GemmAddRelu"]


@pytest.mark.parametrize(
    ("nodes", "outputs", "inputs", "reasons"),
    [
        (
            "y = Relu (c)\n n = Neg (c)",
            "float[1,4,4,4] y, float[1,4,4,4] n",
            "",
            ["not fused into 'c': its result has 2 readers: 'y', 'n'"],
        ),
        (
            "y = Relu (c)",
            "float[1,4,4,4] y, float[1,4,4,4] c",
            "",
            ["not fused into 'c': its result 'c' is an output of the model"],
        ),
        (
            "y = Add (c, r)",
            "float[2,4,4,4] y",
            ", float[2,4,4,4] r",
            ["not fused into 'c': the residual has shape 2x4x4x4, the result 1x4x4x4"],
        ),
        (
            "y = Add (c, c)",
            "float[1,4,4,4] y",
            "",
            ["not fused into 'c': its result has 2 readers:"],
        ),
    ],
)
def test_epilogues_that_stay(nodes, outputs, inputs, reasons):
    assert refusal(fuse_epilogue, convs(nodes, outputs, inputs)).startswith(reasons[0])


@pytest.mark.parametrize(
    ("nodes", "op_type", "reason"),
    [
        (
            "a = Relu (c)\n y = Add (a, r)",
            "ConvRelu",
            "not fused into 'c': it has an activation or a residual already",
        ),
        (
            "a = Add (c, r)\n y = Add (a, r)",
            "ConvAdd",
            "not fused into 'c': it has an activation or a residual already",
        ),
        ("a = Relu (c)\n y = Relu (a)", "ConvRelu", "'c' has a Relu already"),
        (
            "a = HardSwish (c)\n e = Add (a, r)\n y = Add (e, r)",
            "ConvHardSwishAdd",
            "not fused into 'c': it has an activation or a residual already",
        ),
        (
            "a = HardSwish (c)\n e = Add (a, r)\n y = Relu (e)",
            "ConvHardSwish",
            "not fused into 'c': it has an activation, and 'y' is one of the sum",
        ),
    ],
)
def test_an_epilogue_ends(nodes, op_type, reason):
    after, refusals = apply(fuse_epilogue, convs(nodes, inputs=", float[1,4,4,4] r"))
    assert op_types(after)[0] == op_type
    assert [r.reason for r in refusals] == [reason]


def test_other_producers_are_another_pattern():
    model = graph(
        f"""(float[1,3,8,8] x, float[1,4,4,4] r) => (float[1,4,4,4] y, float[1,3,8,8] z)
        <{WEIGHT}> {{
        c = {CONV} (x, w, b)
        a = Add (c, r)
        y = Relu (a)
        z = Relu (x) }}""",
        w=W4,
    )
    assert [fuse_epilogue.rule(node) for node in model.graph] == [None] * 4
