"""Parts of tensors and operators with several operands: where they lie, and for how long."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import graph
from twofour.compiler import native_rows
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Lowered, Placed, lower
from twofour.compiler.native import AttentionOp, NormOp, NotNative, ViewOp
from twofour.compiler.ops import FusedOp, Variant, make_node, parse_op
from twofour.compiler.passes import pipeline
from twofour.compiler.row_problems import attention_problem, norm_problem
from twofour.compiler.schedule import read, schedule
from twofour.core.numerics import Window
from twofour.engine import TensorInfo
from twofour.kernels.cpu.problem import Strides

RANDOM = np.random.default_rng(0)
B, S, H, D = 2, 3, 2, 16
C = H * D


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


SPLIT = "".join(
    f"{x}m = MatMul (n, w{x})\n {x}s = Reshape ({x}m, split)\n"
    f" {x}h = Transpose <perm = [0, 2, {order}]> ({x}s)\n "
    for x, order in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
)
BLOCK = (
    "n = LayerNormalization (x, gamma, beta)\n "
    + SPLIT
    + "s = MatMul (qh, kh)\n t = Add (s, mask)\n p = Softmax <axis = -1> (t)\n o = MatMul (p, vh)\n"
    " u = Transpose <perm = [0, 2, 1, 3]> (o)\n a = Reshape (u, join)\n m = MatMul (a, wo)\n"
    " r = Add (m, n)\n f = LayerNormalization (r, gamma, beta)\n"
    " c = Gather <axis = 1> (f, first)\n y = MatMul (c, wy)"
)
ROWS = f"float[{B},{S},{C}]"


def block(
    outputs: str = f"float[{B},8] y",
    body: str = BLOCK,
    mask: tuple[int, ...] = (B, 1, 1, S),
) -> Lowered:
    """One block of a transformer after the passes."""
    weights = {f"w{x}": normal(C, C) for x in "qkvo"} | {"wy": normal(C, 8)}
    weights |= {"gamma": normal(C), "beta": normal(C), "first": np.array(1)}
    sizes = {"split": np.array([B, S, H, D]), "join": np.array([B, S, C])}
    used = {k: v for k, v in (weights | sizes).items() if k in body}
    hidden = f"float[{','.join(map(str, mask))}] mask"
    model = pipeline.run_passes(
        graph(f"({ROWS} x, {hidden}) => ({outputs}) {{ {body} }}", **used)
    ).model
    return lower(model.graph, schedule(model.graph))


def placed(found: Lowered, op_type: str) -> list[Placed]:
    return [p for section in found.sections for p in section.ops if p.op.op_type == op_type]


def test_parts_of_a_projection_are_channels_of_one_tensor() -> None:
    found = block()
    (attention,) = placed(found, "AttentionMask")
    (joined,) = placed(found, "Gemm")[:1]
    wide = joined.y
    assert isinstance(wide, Tensor)
    q, k, v = attention.x, *attention.more[:2]
    for index, part in enumerate((q, k, v)):
        assert isinstance(part, Tensor)
        assert part.root is wide
        assert part.channels == C
        assert part.strides == Strides(*[wide.strides.pixel] * 3)
        assert part.at() == wide.at() + index * C * 4
    assert not placed(found, "Split"), "nothing is moved"


def test_the_problem_of_an_attention() -> None:
    (attention,) = placed(block(), "AttentionMask")
    assert isinstance(attention.op, AttentionOp)
    problem, offsets = attention_problem(attention.op, attention)
    row = 3 * C * 4
    assert (problem.batch, problem.heads, problem.q_len, problem.k_len) == (B, H, S, S)
    assert (problem.d, problem.dv, problem.dtype, problem.out) == (D, D, "float32", "float32")
    assert problem.q == problem.k == problem.v == Strides(S * row, row, row)
    assert problem.y == Strides(S * C * 4, C * 4, C * 4)
    assert (problem.mask, problem.mask_batch, problem.mask_row) == ("keys", S * 4, 0)
    assert (offsets.k, offsets.v) == (C * 4, 2 * C * 4)
    mask = attention.more[2]
    assert isinstance(mask, Tensor)
    assert isinstance(attention.x, Tensor)
    assert offsets.mask == mask.at() - attention.x.at()


@pytest.mark.parametrize(
    ("dims", "kind", "batch_bytes", "row_bytes"),
    [
        ((B, 1, S, S), "full", S * S * 4, S * 4),
        ((1, 1, S, S), "full", 0, S * 4),
        ((S, S), "full", 0, S * 4),
        ((1, 1, 1, S), "keys", 0, 0),
        ((S,), "keys", 0, 0),
    ],
)
def test_a_mask_may_be_shared(
    dims: tuple[int, ...], kind: str, batch_bytes: int, row_bytes: int
) -> None:
    (attention,) = placed(block(mask=dims), "AttentionMask")
    assert isinstance(attention.op, AttentionOp)
    problem, _ = attention_problem(attention.op, attention)
    assert (problem.mask, problem.mask_batch, problem.mask_row) == (kind, batch_bytes, row_bytes)


def test_a_row_of_each_sequence_is_a_view() -> None:
    found = block()
    last = placed(found, "Gemm")[-1]
    view, whole = last.x, placed(found, "LayerNorm")[-1].y
    assert isinstance(view, Tensor)
    assert isinstance(whole, Tensor)
    assert view.root is whole
    assert (view.batch, view.channels) == (B, C)
    assert view.strides.image == S * whole.strides.image
    assert view.at() == whole.at() + whole.strides.image  # row 1 of the first sequence
    assert not placed(found, "Gather")


def test_every_operand_lives_until_it_is_read() -> None:
    """No two tensors in use at the same time share a byte: q, k, v and the mask among them."""
    found = block()
    ops = [p for section in found.sections for p in section.ops]
    spans: dict[int, tuple[Tensor, list[int]]] = {}
    for index, op in enumerate(ops):
        for place in (*op.reads, *op.writes):
            if isinstance(place, Tensor):
                spans.setdefault(id(place.root), (place.root, []))[1].append(index)
    alive = [(t, range(min(at), max(at) + 1)) for t, at in spans.values()]
    (attention,) = [i for i, op in enumerate(ops) if op.op.op_type == "AttentionMask"]
    assert sum(attention in life for _, life in alive) >= 4  # n for the residual, qkv, mask, a
    for one, life in alive:
        for other, others in alive:
            if one is other or not set(life) & set(others):
                continue
            apart = (
                one.offset + one.size_bytes <= other.offset
                or other.offset + other.size_bytes <= one.offset
            )
            meet = life[0] == others[-1] or life[-1] == others[0]
            in_place = one.offset == other.offset and meet
            assert apart or in_place, (one.name, other.name)


def test_a_normalization_writes_an_output_itself() -> None:
    found = block(f"{ROWS} f", BLOCK.split(" c = ")[0])
    last = placed(found, "LayerNorm")[-1]
    assert last.y == TensorInfo("f", "float32", (B, S, C))
    assert isinstance(last.op, NormOp)
    assert norm_problem(last.op, last).y_pixel == C * 4


def test_a_quantized_normalization_writes_floats_and_bytes() -> None:
    body = (
        "n = LayerNormalization (x, gamma, beta)\n q = QuantizeLinear (n, s, z)\n"
        " d = DequantizeLinear (q, s, z)\n w = DequantizeLinear <axis = 1> (w8, ws)\n"
        " m = MatMul (d, w)\n y = Add (m, n)"
    )
    constants = {
        "gamma": normal(C),
        "beta": normal(C),
        "s": np.array(0.02, np.float32),
        "z": np.array(4, np.int8),
        "w8": RANDOM.integers(-127, 128, (C, C)).astype(np.int8),
        "ws": np.full(C, 0.01, np.float32),
    }
    model = pipeline.run_passes(graph(f"({ROWS} x) => ({ROWS} y) {{ {body} }}", **constants)).model
    found = lower(model.graph, schedule(model.graph))
    (norm,) = placed(found, "LayerNormQ")
    (product,) = placed(found, "QGemmAddFloatF")
    assert isinstance(norm.op, NormOp)
    assert (norm.op.zero, norm.op.float_out, norm.op.quantized_out) == (132, True, True)
    assert product.x is norm.also[0]
    assert product.r is norm.y
    problem = norm_problem(norm.op, norm)
    assert (problem.rows, problem.y_pixel, problem.q_pixel) == (B * S, C * 4, C)


def test_tokens_are_the_pixels_where_they_lie() -> None:
    body = (
        "c = Conv <strides = [2, 2]> (x, k)\n r = Reshape (c, flat)\n"
        " t = Transpose <perm = [0, 2, 1]> (r)\n y = MatMul (t, w)"
    )
    constants = {"k": normal(16, 3, 2, 2), "w": normal(16, 8), "flat": np.array([2, 16, -1])}
    model = pipeline.run_passes(
        graph(f"(float[2,3,4,6] x) => (float[2,6,8] y) {{ {body} }}", **constants)
    ).model
    found = lower(model.graph, schedule(model.graph))
    (conv,), (product,) = placed(found, "Conv"), placed(found, "Gemm")
    assert isinstance(product.x, Tensor)
    assert isinstance(conv.y, Tensor)
    assert product.x.root is conv.y
    assert product.x.at() == conv.y.at()
    assert (product.x.batch, product.x.channels) == (12, 16)


def test_tokens_of_a_padded_tensor_are_copied() -> None:
    """Between the rows of such a tensor there is a halo."""
    body = (
        "c = Conv (x, k)\n d = Conv <pads = [1, 1, 1, 1]> (c, k3)\n r = Reshape (c, flat)\n"
        " t = Transpose <perm = [0, 2, 1]> (r)\n y = MatMul (t, w)"
    )
    constants = {
        "k": normal(16, 3, 1, 1),
        "k3": normal(16, 16, 3, 3),
        "w": normal(16, 8),
        "flat": np.array([2, 16, -1]),
    }
    model = pipeline.run_passes(
        graph(
            f"(float[2,3,4,6] x) => (float[2,24,8] y, float[2,16,4,6] d) {{ {body} }}", **constants
        )
    ).model
    found = lower(model.graph, schedule(model.graph))
    (product,) = placed(found, "Gemm")
    conv = placed(found, "Conv")[0]
    assert isinstance(product.x, Tensor)
    assert isinstance(conv.y, Tensor)
    assert any(conv.y.halo)
    assert product.x.root is not conv.y
    assert not any(product.x.root.halo)
    assert [p.y for p in placed(found, "Copy") if p.x is conv.y] == [product.x.root]


# layout


def test_a_view_has_the_steps_of_its_parent() -> None:
    whole = Tensor("t", 6, 2, 3, 20, "float32", offset=640)
    some = whole.part("v", 4, 8, range(1, 6, 2))
    values = np.zeros((6, 2, 3, 20), np.float32)
    want = values[1::2, :, :, 4:12]
    begin = want.__array_interface__["data"][0] - values.__array_interface__["data"][0]
    assert (some.batch, some.height, some.width, some.channels) == want.shape
    assert (some.strides.image, some.strides.row, some.strides.pixel) == want.strides[:3]
    assert some.at() == 640 + begin
    inner = some.part("w", 2, 3, range(2))
    assert inner.root is whole
    assert inner.at() == some.at() + 8
    assert inner.strides == some.strides


def test_a_view_of_a_tensor_that_becomes_wider_moves_with_it() -> None:
    whole = Tensor("t", 2, 4, 4, 8, "u8", offset=0)
    some = whole.part("v", 3, 2, range(2))
    some.widen(Window((3, 3), pads=(1, 1, 1, 1)))
    assert whole.halo == [1, 1, 1, 1]
    assert some.at() == whole.at() + 3
    assert some.at(1, 1) == 3


# native_rows


def fused(op_type: str, **inputs: ir.Value) -> FusedOp:
    """A fused operator on values of 3 dimensions; quantizers are constants."""
    variant = Variant(op_type)
    given = {}
    for name in variant.inputs:
        if name.endswith("_scale"):
            given[name] = constant(np.array(0.5, np.float32))
        elif name.endswith("_zero_point"):
            given[name] = constant(np.array(0, np.int8))
        elif name in ("gamma", "beta"):
            given[name] = constant(np.ones(C, np.float32))
        else:
            kind = ir.DataType.INT8 if op_type.startswith("QA") else ir.DataType.FLOAT
            given[name] = ir.val(name, kind, (B, S, C))
    node = make_node(
        variant,
        given | inputs,
        {"heads": H, "scale": 0.25, "epsilon": 1e-5},
        ir.node("Softmax", [], name="layer"),
    )
    kind = ir.DataType.INT8 if variant.quantized_out else ir.DataType.FLOAT
    for value in node.outputs:
        value.name, value.shape, value.type = "y", ir.Shape((B, S, C)), ir.TensorType(kind)
    return parse_op(node)


def constant(array: np.ndarray) -> ir.Value:
    return ir.val(
        "c", ir.DataType.from_numpy(array.dtype), array.shape, const_value=ir.tensor(array)
    )


def test_the_scales_of_a_quantized_attention() -> None:
    op = native_rows.FUSED["QAttention"](fused("QAttention"))
    assert isinstance(op, AttentionOp)
    assert op.scales.score == 0.5 * 0.5 * 0.25
    assert (op.scales.q_zero, op.scales.y_zero) == (128, 128)


FLOAT = ir.DataType.FLOAT
THREE = np.array(3, np.int8)
ONES = np.ones((S, S), np.float32)


@pytest.mark.parametrize(
    ("reason", "op_type", "inputs"),
    [
        ("k has the zero point 131", "QAttention", {"k_zero_point": constant(THREE)}),
        ("one mask for all heads", "AttentionMask", {"mask": ir.val("m", FLOAT, (B, H, S, S))}),
        ("float32 mask", "AttentionMask", {"mask": ir.val("m", ir.DataType.DOUBLE, (S,))}),
        ("is a constant", "AttentionMask", {"mask": constant(ONES)}),
        ("tensors of 3 dimensions", "Attention", {"q": ir.val("q", FLOAT, (S, C))}),
        ("takes float32", "LayerNorm", {"x": ir.val("x", ir.DataType.FLOAT16, (B, S, C))}),
        ("at most 3 dimensions", "LayerNorm", {"x": ir.val("x", FLOAT, (B, S, 1, C))}),
    ],
)
def test_refusals(reason: str, op_type: str, inputs: dict[str, ir.Value]) -> None:
    variant = "Attention" if op_type == "AttentionMask" else op_type
    op = fused(variant, **({} if op_type == "AttentionMask" else inputs))
    if op_type == "AttentionMask":
        op = FusedOp(**{**vars(op), "inputs": {**op.inputs, **inputs}, "mask": "Mask"})
    with pytest.raises(NotNative, match=reason):
        native_rows.FUSED[variant](op)


@pytest.mark.parametrize(
    ("node", "view"),
    [
        ("y = Slice (x, i2, i5, i2)", None),  # channels 2 to 5
        ("y = Slice (x, i1, i2, i1)", "no view"),
        ("y = Gather <axis = 1> (x, s1)", None),
        ("y = Gather <axis = 2> (x, s1)", "no view"),
        ("y = Gather <axis = 1> (x, i1)", None),
    ],
)
def test_which_parts_are_views(node: str, view: str | None) -> None:
    numbers = {"i1": [1], "i2": [2], "i5": [5], "s1": 1}
    used = {name: np.array(value) for name, value in numbers.items() if name in node}
    model = graph(f"(float[2,3,8] x) => (float[] y) {{ {node} }}", **used)
    model.graph.outputs[0].shape = None
    ir.passes.common.ShapeInferencePass()(model)
    op = read(next(iter(model.graph)))
    assert isinstance(op, ViewOp) == (view is None)
