"""The passes for bfloat16: text before and after, what they refuse, and what stays float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import apply, graph, op_types, refusal, run
from twofour.compiler import ops
from twofour.compiler.passes import (
    canonical_activation,
    canonical_conv,
    canonical_gemm,
    cast_bf16,
    fuse_attention,
    fuse_epilogue,
    fuse_layer_norm,
    fuse_slice_pad,
    hold_bf16,
    read_bf16,
    text,
)
from twofour.core.bfloat16 import ROUNDING, round_bf16

FIRST = (
    canonical_conv,
    canonical_gemm,
    fuse_layer_norm,
    fuse_attention,
    fuse_slice_pad,
    fuse_epilogue,
)
BF16 = (cast_bf16, hold_bf16, read_bf16)
RANDOM = np.random.default_rng(11)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Small random weights, so that activations stay of size 1."""
    return {n: RANDOM.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}


def after(model: ir.Model, passes=(*FIRST, *BF16)) -> ir.Model:
    for one in passes:
        model, _ = apply(one, model)
    return model


def close(model: ir.Model, fused: ir.Model, roundings: int) -> None:
    """Results differ by so many roundings of the largest value, no more; and they do differ."""
    for want, got in zip(run(model), run(fused), strict=True):
        assert want.dtype == got.dtype
        error, largest = np.abs(want - got).max(), np.abs(want).max()
        assert 0 < error <= roundings * ROUNDING * largest


IMAGE = "(float[1,4,8,8] x) => (float[N,C,H,W] y)"
CONV = "Conv <pads = [1, 1, 1, 1]>"


def test_a_product_rounds_its_operands(golden) -> None:
    w = RANDOM.normal(size=(6, 4)).astype(np.float32)
    model = graph("(float[2,4] x) => (float[2,6] y) { y = Gemm <transB = 1> (x, w, b) }", w=w,
                  b=np.ones(6, np.float32))  # fmt: skip
    before = after(model, FIRST)
    made, refusals = apply(cast_bf16, before)
    assert not refusals
    golden("passes/cast_bf16", f"before\n{text.graph_text(before)}\nafter\n{text.graph_text(made)}")
    assert op_types(made) == ["Cast", "BGemmF"]
    x = np.array([[1.00390625, 2, -3, 4.015], [0, 1, 1, -1]], np.float32)
    (got,) = run(made, {"x": x})
    exact = round_bf16(x).astype(np.float64) @ round_bf16(w).astype(np.float64).T + 1
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_one_cast_serves_all_readers() -> None:
    nodes = "a = Conv (x, v)\n b = Conv (x, w)\n y = Add (a, b)"
    model = graph(f"{IMAGE} {{ {nodes} }}", **weights(v=(4, 4, 1, 1), w=(4, 4, 1, 1)))
    made = after(model, (*FIRST, cast_bf16))
    assert op_types(made) == ["Cast", "BConvF", "BConvAddF"]


@pytest.mark.parametrize(
    ("nodes", "w", "reason"),
    [
        ("y = Conv <group = 4> (x, w)", np.ones((4, 1, 1, 1)), "one input channel a group"),
        ("y = Conv (x, w)", np.full((4, 4, 1, 1), 3.4e38), "beyond bfloat16"),
    ],
)
def test_a_product_that_stays_float32(nodes, w, reason) -> None:
    model = graph(f"{IMAGE} {{ {nodes} }}", w=w.astype(np.float32))
    assert reason in refusal(cast_bf16, after(model, FIRST))


def test_sizes_that_are_not_known_stay_float32() -> None:
    # As canonical_conv would have left it, if it took open sizes.
    model = after(graph(f"{IMAGE} {{ y = Conv (x, w) }}", **weights(w=(4, 4, 1, 1))), FIRST)
    model.graph.inputs[0].shape = ir.Shape([1, 4, None, 8])
    assert "expected known float32" in refusal(cast_bf16, model)


RESIDUAL = f"""a = {CONV} (x, v)
 b = Relu (a)
 c = {CONV} (b, w)
 d = Add (c, b)
 e = Relu (d)
 f = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
 g = {CONV} (f, u)"""
NETWORK = weights(v=(4, 4, 3, 3), w=(4, 4, 3, 3), u=(4, 4, 3, 3))


def test_a_residual_block_is_held_in_bfloat16(golden) -> None:
    nodes = f"{RESIDUAL}\n h = GlobalAveragePool (g)\n i = Flatten (h)\n y = MatMul (i, m)"
    model = graph(
        f"(float[1,4,8,8] x) => (float[1,5] y) {{ {nodes} }}", **NETWORK, **weights(m=(4, 5))
    )
    before = after(model, (*FIRST, cast_bf16))
    held, _ = apply(hold_bf16, before)
    read, _ = apply(read_bf16, held)
    golden("passes/hold_bf16", f"before\n{text.graph_text(before)}\nafter\n{text.graph_text(held)}")
    golden("passes/read_bf16", f"before\n{text.graph_text(held)}\nafter\n{text.graph_text(read)}")
    kinds = ["Cast", "BConvRelu", "BConvAddRelu", "BMaxPool", "BConv", "BGlobalAveragePool"]
    assert op_types(read) == [*kinds, "Flatten", "BGemmF"]
    close(model, read, 30)


@pytest.mark.parametrize(
    "reader", ["y = Softmax (g)", "y = Identity (g)", "t = Transpose (g)\n y = Neg (t)"]
)
def test_what_somebody_reads_as_float32_stays_it(reader) -> None:
    model = graph(f"{IMAGE} {{ {RESIDUAL}\n {reader} }}", **NETWORK)
    made = after(model)
    assert "BConvF" in op_types(made)
    close(model, made, 30)


def test_an_output_of_the_model_stays_float32() -> None:
    outputs = "(float[1,4,8,8] x) => (float[N,C,H,W] b, float[N,C,H,W] g)"
    model = graph(f"{outputs} {{ {RESIDUAL} }}", **NETWORK)
    made = after(model)
    assert op_types(made)[:2] == ["Cast", "BConvReluF"]
    assert [v.dtype for v in made.graph.outputs] == [ir.DataType.FLOAT] * 2
    close(model, made, 30)


def test_a_depthwise_conv_between_products_reads_and_stores_bfloat16() -> None:
    """Its weights stay float32."""
    nodes = f"a = Conv (x, v)\n b = {CONV.replace('<', '<group = 4, ')} (a, w)\n y = Conv (b, u)"
    shapes = {"v": (4, 4, 1, 1), "w": (4, 1, 3, 3), "u": (4, 4, 1, 1)}
    model = graph(f"{IMAGE} {{ {nodes} }}", **weights(**shapes))
    made = after(model)
    assert op_types(made) == ["Cast", "BConv", "BConv", "BConvF"]
    depthwise = list(made.graph)[2]
    assert [v.dtype for v in depthwise.inputs[:2]] == [ir.DataType.BFLOAT16, ir.DataType.FLOAT]
    close(model, made, 10)


@pytest.mark.parametrize("end", ["y = Sin (b)", "c = Relu (b)\n y = Conv (c, u)"])
def test_a_depthwise_conv_at_an_end_has_one_end_in_float32(end) -> None:
    depthwise = f"{CONV.replace('<', '<group = 4, ')}"
    shapes = {"v": (4, 4, 1, 1), "w": (4, 1, 3, 3), "u": (4, 4, 1, 1)}
    first = (
        f"a = Conv (x, v)\n b = {depthwise} (a, w)" if "Sin" in end else f"b = {depthwise} (x, w)"
    )
    model = graph(f"{IMAGE} {{ {first}\n {end} }}", **weights(**shapes))
    made = after(model)
    wanted = ["Cast", "BConv", "BConvF", "Sin"] if "Sin" in end else ["BConvRelu", "BConvF"]
    assert op_types(made) == wanted
    close(model, made, 10)


JOINED = f"""a = {CONV} (x, v)
 p, q = Split <axis = 1, num_outputs = 2> (a)
 b = {CONV} (q, w)
 s = Sigmoid (b)
 c = Mul (b, s)
 d = Add (q, c)
 j = Concat <axis = 1> (p, q, d)
 e = Conv (j, u)
 f = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric",
  nearest_mode = "floor"> (e, , scales)
 k = Concat <axis = 1> (f, r)"""
JOINING = {"v": (4, 4, 3, 3), "w": (2, 2, 3, 3), "u": (3, 6, 1, 1), "z": (5, 4, 1, 1)}
SCALES = {"scales": np.array([1, 1, 2, 3], np.float32)}


def joining(second: str, end: str, more: int) -> ir.Model:
    """Halves that meet again, a residual behind a SiLU, and rows repeated beside another map."""
    shapes = {**JOINING, "m": (4, 3 + more, 1, 1)}
    return graph(
        f"(float[1,4,8,8] x, float[1,4,16,24] t) => (float[N,C,H,W] y)"
        f" {{ {second}\n {JOINED}\n {end} }}",
        **weights(**shapes),
        **SCALES,
    )


FIRST_SILU = (canonical_conv, canonical_activation, fuse_epilogue, *BF16)


def test_what_is_joined_split_and_repeated_is_held() -> None:
    model = joining("r = Conv (t, z)", "y = Conv (k, m)", 5)
    made = after(model, FIRST_SILU)
    kinds = op_types(made)
    assert [kind for kind in kinds if kind != "Cast"] == [
        *("BConv", "BConv", "Split", "BConvSiluAdd", "Concat", "BConv", "BRepeat", "Concat"),
        "BConvF",
    ]
    assert kinds.count("Cast") == 2  # of the two images
    close(model, made, 30)


@pytest.mark.parametrize(
    ("second", "end", "more"),
    [
        ("r = Identity (t)", "y = Conv (k, m)", 4),  # an image is joined
        ("r = Conv (t, z)", "n = Neg (k)\n y = Conv (n, m)", 5),  # the result is read in float32
    ],
)
def test_what_is_joined_with_float32_stays_it(second, end, more) -> None:
    """The first join is held all the same; what is repeated for the other one is not."""
    made = after(joining(second, end, more), FIRST_SILU)
    kinds = op_types(made)
    assert "Resize" in kinds
    assert "BRepeat" not in kinds
    joins = [node for node in made.graph if node.op_type == "Concat"]
    assert [node.outputs[0].dtype for node in joins] == [ir.DataType.BFLOAT16, ir.DataType.FLOAT]


@pytest.mark.parametrize(
    "form", ['mode = "linear"', 'coordinate_transformation_mode = "align_corners"']
)
def test_other_resizing_is_of_float32(form) -> None:
    nodes = f"a = Conv (x, v)\n b = Resize <{form}> (a, , scales)\n y = Conv (b, w)"
    arrays = weights(v=(4, 4, 1, 1), w=(4, 4, 1, 1)) | SCALES
    made = after(graph(f"{IMAGE} {{ {nodes} }}", **arrays))
    assert op_types(made) == ["Cast", "BConvF", "Resize", "Cast", "BConvF"]


def test_the_expectation_of_a_softmax_stays_float32() -> None:
    nodes = "s = Softmax <axis = 1> (x)\n y = Conv (s, w)"
    model = graph(f"{IMAGE} {{ {nodes} }}", **weights(w=(1, 4, 1, 1)))
    assert "expectation" in refusal(cast_bf16, after(model, FIRST))


def test_slices_and_pads_of_bfloat16() -> None:
    nodes = f"""a = {CONV} (x, v)
 b = Slice (a, zero, end, axes, steps)
 c = Pad (b, pads)
 d = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (a, w)
 e = Add (d, c)
 y = {CONV} (e, u)"""
    constants = (
        "int64[2] zero = {0, 0}, int64[2] end = {100, 100}, int64[2] axes = {2, 3},"
        " int64[2] steps = {2, 2}, int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}"
    )
    shapes = {"v": (4, 4, 3, 3), "w": (6, 4, 3, 3), "u": (4, 6, 3, 3)}
    model = graph(f"{IMAGE} <{constants}> {{ {nodes} }}", **weights(**shapes))
    made = after(model)
    assert op_types(made) == ["Cast", "BConv", "BSlicePad", "BConvAdd", "BConvF"]
    close(model, made, 20)


@pytest.mark.parametrize(
    ("pool", "kind"),
    [
        ("MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>", "MaxPool"),
        ("MaxPool <kernel_shape = [2, 2], dilations = [2, 2]>", "MaxPool"),
        ("AveragePool <kernel_shape = [2, 2]>", "AveragePool"),
    ],
)
def test_pools_without_a_form_read_float32(pool, kind) -> None:
    nodes = f"a = {CONV} (x, v)\n b = {pool} (a)\n y = {CONV} (b, w)"
    model = graph(f"{IMAGE} {{ {nodes} }}", **weights(v=(4, 4, 3, 3), w=(4, 4, 3, 3)))
    assert op_types(after(model)) == ["Cast", "BConvF", kind, "Cast", "BConvF"]


NORM = "LayerNormalization <axis = -1>"
ROWS = "(float[1,6,8] x) => (float[1,6,8] y)"


@pytest.mark.parametrize(
    ("nodes", "kinds"),
    [
        (f"n = {NORM} (x, s, t)\n y = MatMul (n, w)", ["BLayerNorm", "BGemmF"]),
        (
            f"n = {NORM} (x, s, t)\n m = MatMul (n, w)\n y = Add (m, n)",
            ["LayerNormB", "BGemmAddF"],
        ),
        (
            f"a = MatMul (x, w)\n n = {NORM} (a, s, t)\n m = MatMul (n, w)\n y = Add (m, a)",
            ["Cast", "BGemmF", "BLayerNorm", "BGemmAddF"],
        ),
    ],
)
def test_layer_norms_store_what_is_read(nodes, kinds) -> None:
    """The stream of residuals stays float32: a normalization reads it, or is it."""
    shapes = {"w": (8, 8), "s": (8,), "t": (8,)}
    model = graph(f"{ROWS} {{ {nodes} }}", **weights(**shapes))
    made = after(model)
    assert op_types(made) == kinds
    close(model, made, 20)


HEADS = """int64[4] split = {1, 6, 2, 4}, int64[3] join = {1, 6, 8}, float k = {0.5}"""
ATTENTION = """a = MatMul (x, wq)
 b = MatMul (x, wk)
 c = MatMul (x, wv)
 q = Reshape (a, split)
 r = Reshape (b, split)
 s = Reshape (c, split)
 qt = Transpose <perm = [0, 2, 1, 3]> (q)
 rt = Transpose <perm = [0, 2, 3, 1]> (r)
 st = Transpose <perm = [0, 2, 1, 3]> (s)
 p = MatMul (qt, rt)
 scaled = Mul (p, k)
 probabilities = Softmax <axis = -1> (scaled)
 o = MatMul (probabilities, st)
 ot = Transpose <perm = [0, 2, 1, 3]> (o)
 joined = Reshape (ot, join)"""
PROJECTIONS = weights(wq=(8, 8), wk=(8, 8), wv=(8, 8), w=(8, 8))


@pytest.mark.parametrize(
    ("end", "kinds"),
    [("y = MatMul (joined, w)", ["BAttention", "BGemmF"]), ("y = Tanh (joined)", ["BAttentionF"])],
)
def test_attention_of_products(end, kinds) -> None:
    model = graph(f"{ROWS} <{HEADS}> {{ {ATTENTION}\n {end} }}", **PROJECTIONS)
    made = after(model)
    found = [kind for kind in op_types(made) if kind.startswith("B")]
    assert found == ["BGemm"] * 3 + kinds
    close(model, made, 20)


def test_attention_of_anything_else_stays_float32() -> None:
    other = ATTENTION.replace("c = MatMul (x, wv)", "c = Sin (x)")
    model = graph(f"{ROWS} <{HEADS}> {{ {other}\n y = MatMul (joined, w) }}", **PROJECTIONS)
    made = after(model)
    assert "Attention" in op_types(made)
    assert op_types(made).count("BGemmF") == 3
    close(model, made, 20)


def test_values_in_bfloat16_are_read_by_operators_that_have_a_form_for_them() -> None:
    """No standard operator but Casts and those that move elements reads one."""
    nodes = f"{RESIDUAL}\n h = GlobalAveragePool (g)\n i = Flatten (h)\n y = MatMul (i, m)"
    model = graph(
        f"(float[1,4,8,8] x) => (float[1,5] y) {{ {nodes} }}", **NETWORK, **weights(m=(4, 5))
    )
    for node in after(model).graph:
        if any(v is not None and v.dtype == ir.DataType.BFLOAT16 for v in node.inputs):
            assert ops.is_fused(node) or node.op_type in ("Cast", "Flatten")
