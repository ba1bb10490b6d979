"""Walks on a GPU, in Triton's interpreter: equal to numpy for any shape, layout and type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda.interpret import interpret
from tests.kernels.cuda.walk_cases import Layout, check, plain, values
from twofour.kernels.cpu.nd_scalar import ELEMENTWISE, Expression
from twofour.kernels.cuda.kernel import Kernel, compile_kernel
from twofour.kernels.cuda.problem import Ref, Walk
from twofour.kernels.cuda.walk import recipes, why_not

REALS = ("float32", "float16", "bfloat16")
WHOLE = ("int32", "int64")
BYTES = ("uint8", "int8")
UNARY = ("neg", "abs", "relu", "square", "sign")
FLOAT_UNARY = (
    *UNARY, "sqrt", "reciprocal", "floor", "ceil", "exp", "log", "erf", "sigmoid", "tanh", "silu",
    "gelu", "gelu_tanh", "hard_swish", "softplus", "softsign", "Relu", "Gelu", "HardSigmoid", "",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "max", "min")
COMPARED = ("equal", "less", "lessorequal", "greater", "greaterorequal")
PARAMETRIC = {"clip": (-1.0, 2.5), "hard_sigmoid": (0.2, 0.5), "elu": (1.5, 0.5), "leaky": (0.1,)}


def layouts(rank: int, *, reads: bool) -> Any:
    """Any order, gaps and directions; what is read may repeat."""
    axes = st.frozensets(st.integers(0, rank - 1)) if rank else st.just(frozenset())
    return st.builds(
        Layout,
        st.permutations(range(rank)).map(tuple),
        st.tuples(*[st.sampled_from([0, 0, 1, 5])] * rank),
        axes if reads else st.just(frozenset()),
        axes,
        st.sampled_from([0, 4, 7]),
    )


@st.composite
def shaped(draw: Any, inputs: int) -> tuple[tuple[int, ...], list[Layout]]:
    """Dims, and how the inputs and y lie."""
    dims = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 33, 70]), max_size=4)))
    while torch.Size(dims).numel() > 800:
        dims = dims[:-1]
    lies = [draw(layouts(len(dims), reads=True)) for _ in range(inputs)]
    return dims, [*lies, draw(layouts(len(dims), reads=False))]


def run(op: str, types: list[str], dims: tuple[int, ...], lies: list[Layout], **more: Any) -> None:
    """A walk over operands that lie so; the last is y."""
    special, effort = more.pop("special", False), more.pop("effort", 0)
    placed = [lie.ref(dtype, dims) for lie, dtype in zip(lies, types, strict=True)]
    held = [
        values(ref.dtype, count, seed, special=special and seed < len(placed) - 1)
        for seed, (ref, count) in enumerate(placed)
    ]
    refs = [ref for ref, _ in placed]
    scale = more.pop("scale", 1.0)
    problem = Walk(op, dims, refs[-1], tuple(refs[:-1]), **more)
    check(problem, held[:-1], held[-1], interpret, effort=effort, scale=scale)


@settings(max_examples=20, deadline=None)
@given(shaped(1), st.sampled_from([*REALS, "float8e4m3fn", *WHOLE, *BYTES, "bool"]))
def test_moves_of_any_layout_and_type(shape: tuple[Any, Any], dtype: str) -> None:
    run("copy", [dtype, dtype], *shape, effort=1)


@settings(max_examples=15, deadline=None)
@given(shaped(2), st.sampled_from(BINARY), st.sampled_from([*REALS, *WHOLE]), st.booleans())
def test_two_operands(shape: tuple[Any, Any], op: str, dtype: str, special: bool) -> None:
    run(op, [dtype] * 3, *shape, special=special)


@pytest.mark.parametrize("op", FLOAT_UNARY)
def test_functions_of_a_real_number(op: str) -> None:
    special = op not in ("gelu", "gelu_tanh", "hard_swish", "erf", "Gelu")
    steps = (Expression(op, (0,), "float32"),)
    run("chain", ["float32"] * 2, (3, 50), [plain(2)] * 2, steps=steps, special=special)


@pytest.mark.parametrize("op", PARAMETRIC)
def test_functions_with_constants(op: str) -> None:
    run(op, ["float32"] * 2, (150,), [plain(1)] * 2, scalars=PARAMETRIC[op], special=op == "clip")


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_an_integer(op: str) -> None:
    for dtype in WHOLE:
        run(op, [dtype] * 2, (70,), [plain(1)] * 2)
    run("clip", ["int64"] * 2, (70,), [plain(1)] * 2, scalars=(-3, 5))


@pytest.mark.parametrize("op", COMPARED)
def test_comparisons(op: str) -> None:
    for dtype in ("float32", "int32", "int64"):
        special = dtype == "float32"
        run(op, [dtype, dtype, "bool"], (5, 40), [plain(2)] * 3, special=special)


def test_conditions() -> None:
    for op, count in (("and", 2), ("or", 2), ("xor", 2), ("xor", 1)):
        run(op, ["bool"] * (count + 1), (70,), [plain(1)] * (count + 1))
    run("isnan", ["float32", "bool"], (70,), [plain(1)] * 2, special=True)
    for dtype in ("float16", "int64", "int8"):
        run("where", ["bool", dtype, dtype, dtype], (5, 20), [plain(2)] * 4)


EXTREMES = (2.0**31, 2.0**63, -(2.0**31), -3e38, 3e38, 300.7, -129.5, 0.0, 0.9)


@pytest.mark.parametrize("to", [*WHOLE, *BYTES, "bool", "float16"])
def test_casts_saturate_or_wrap_around(to: str) -> None:
    for dtype in ("float32", *WHOLE, *BYTES, "bool"):
        run("cast", [dtype, to], (90,), [plain(1)] * 2, special=True)
    x = torch.tensor([*EXTREMES, float("nan"), float("inf"), -float("inf")])
    ref, y = Ref("float32", (1,)), torch.zeros(12, dtype=getattr(torch, to))
    if to != "float16":
        check(Walk("cast", (12,), Ref(to, (1,)), (ref,)), [x], y, interpret)


def test_integers_over_zero_and_the_smallest_over_minus_one() -> None:
    for dtype in WHOLE:
        least = torch.iinfo(getattr(torch, dtype)).min
        x = torch.tensor([least, 7, -7, 5, 0], dtype=getattr(torch, dtype))
        by = torch.tensor([-1, 0, 2, -3, 0], dtype=x.dtype)
        ref, y = Ref(dtype, (1,)), torch.ones_like(x)
        problem = Walk("div", (5,), ref, (ref, ref))
        (recipe,) = recipes(problem, {}, 90, effort=0)
        interpret(recipe, {"in0": x, "in1": by, "y": y})
        assert y.tolist() == [least, 0, -3, -1, 0]


@settings(max_examples=8, deadline=None)
@given(shaped(1), st.sampled_from(BYTES), st.sampled_from([0.25, 0.013]), st.integers(-9, 9))
def test_quantized_in_any_layout(
    shape: tuple[Any, Any], dtype: str, scale: float, zero: int
) -> None:
    constants = (scale, float(zero if dtype == "int8" else zero + 100))
    steps = (Expression("quantize", (0,), dtype, constants),)
    run("chain", ["float32", dtype], *shape, steps=steps, special=scale == 0.25)
    steps = (Expression("dequantize", (0,), "float32", constants),)
    run("chain", [dtype, "float16"], *shape, steps=steps)


def test_a_chain_of_operations() -> None:
    steps = (
        Expression("dequantize", (0,), "float32", (0.05, -3.0)),
        Expression("add", (2, 1), "float32"),
        Expression("Silu", (3,), "float32"),
        Expression("quantize", (4,), "int8", (0.03, 5.0)),
    )
    lies = [plain(2), Layout((0, 1), repeated=frozenset({0})), plain(2)]
    run("chain", ["int8", "float16", "int8"], (9, 64), lies, steps=steps)


def test_float8_is_exact_where_it_can_be_and_saturates() -> None:
    steps = (Expression("dequantize", (0,), "float32", (0.25, 0.0)),
             Expression("quantize", (1,), "float8e4m3fn", (0.25, 0.0)))  # fmt: skip
    run("chain", ["float8e4m3fn"] * 2, (60,), [plain(1)] * 2, steps=steps)
    x = torch.tensor([1e4, -1e4, 448.0, 2.0])
    y = torch.zeros(4, dtype=torch.float8_e4m3fn)
    check(Walk("cast", (4,), Ref("float8e4m3fn", (1,)), (Ref("float32", (1,)),)), [x], y, interpret)


@pytest.mark.parametrize("dtype", ["float16", "int8", "bool"])
@pytest.mark.parametrize("index", WHOLE)
def test_rows_by_index_which_is_clamped(dtype: str, index: str) -> None:
    x = values(dtype, 10 * 96, 1)
    at = torch.tensor([1, -1, 5, 99, -40, 3], dtype=getattr(torch, index))
    problem = Walk("gather", (6, 96), Ref(dtype, (96, 1)), (Ref(dtype, (0, 1)), Ref(index, (1, 0))),
                   rows=(10, 96))  # fmt: skip
    check(problem, [x, at], values(dtype, 6 * 96, 2), interpret)
    # One index for each element, along the first axis.
    at = torch.arange(6 * 5, dtype=at.dtype) * 7 % 23 - 11
    problem = Walk("gather", (6, 5), Ref(dtype, (5, 1)), (Ref(dtype, (0, 1)), Ref(index, (5, 1))),
                   rows=(10, 5))  # fmt: skip
    check(problem, [x, at], values(dtype, 30, 2), interpret)


@pytest.mark.parametrize("dtype", [*REALS, *WHOLE, *BYTES, "bool", "float8e4m3fn"])
def test_one_number_everywhere(dtype: str) -> None:
    run("fill", [dtype], (3, 4, 5), [Layout((2, 0, 1), (1, 0, 2))], scalars=(1.0,))


@st.composite
def reduced(draw: Any) -> tuple[tuple[int, ...], Layout, frozenset[int]]:
    """Dims, how x lies, and the axes that are reduced."""
    dims, (lie, _) = draw(shaped(1))
    gone = draw(st.frozensets(st.integers(0, max(len(dims) - 1, 0)), max_size=len(dims)))
    return dims, Layout(lie.order, lie.gaps, frozenset(), lie.turned, lie.start), gone


@settings(max_examples=15, deadline=None)
@given(
    reduced(),
    st.sampled_from(["sum", "mean", "reduce_max", "reduce_min", "prod", "l1", "l2", "sumsquare"]),
    st.sampled_from([*REALS, *WHOLE]),
)
def test_reductions(shape: tuple[Any, Any, Any], op: str, dtype: str) -> None:
    dims, lie, gone = shape
    if dtype in WHOLE and op in ("mean", "l1", "l2", "sumsquare"):
        dtype = "float32"
    if op == "prod":
        dims = dims[:2] if len(dims) > 2 else dims
        lie, gone = plain(len(dims)), frozenset(a for a in gone if a < len(dims))
    y = Layout(tuple(range(len(dims))), repeated=gone)
    types = [dtype, dtype] if op != "prod" or dtype in WHOLE else ["float32"] * 2
    scale = 3e3 if op == "sumsquare" else 300.0
    run(op, types, dims, [lie, y], scale=scale)


def test_reductions_of_nan() -> None:
    for op in ("reduce_max", "reduce_min", "sum"):
        y = Layout((0, 1), repeated=frozenset({1}))
        run(op, ["float32"] * 2, (9, 40), [plain(2), y], special=True, scale=100.0)


@pytest.mark.parametrize("op", ["sum", "reduce_max", "l2", "mean"])
def test_a_long_reduction_is_two_launches(op: str) -> None:
    for dtype in ("float32", "int32") if op in ("sum", "reduce_max") else ("float16",):
        dims = (2, 3, 12000)
        y = Ref(dtype, (0, 1, 0), 2)
        x = Ref(dtype, (36000, 12000, 1))
        problem = Walk(op, dims, y, (x,))
        (recipe,) = recipes(problem, {}, 90, effort=0)
        assert len(recipe.calls) == 2
        check(problem, [values(dtype, 72000, 1)], values(dtype, 6, 2), interpret, effort=0,
              scale=1e3)  # fmt: skip


@pytest.mark.parametrize("op", ["softmax", "log_softmax", "expect"])
def test_rows(op: str) -> None:
    for dims, order in (((6, 16), (0, 1)), ((2, 30, 7), (0, 2, 1)), ((3, 4, 70), (1, 0, 2))):
        weights = (*map(float, range(dims[-1])), 0.5) if op == "expect" else ()
        gone = frozenset({len(dims) - 1}) if op == "expect" else frozenset()
        y = Layout(order, repeated=gone)
        for dtype in ("float32", "float16"):
            run(op, [dtype] * 2, dims, [Layout(order, (1,) * len(dims)), y], scalars=weights,
                scale=dims[-1])  # fmt: skip


@pytest.mark.parametrize("op", ["softmax", "expect"])
def test_a_row_that_no_program_holds(op: str) -> None:
    weights = (*(float(i % 3) for i in range(17000)), 0.0) if op == "expect" else ()
    y = Layout((0, 1), repeated=frozenset({1}) if op == "expect" else frozenset())
    run(op, ["float32"] * 2, (2, 17000), [plain(2), y], scalars=weights)


def test_a_nan_spoils_its_row_alone() -> None:
    x = torch.randn(4, 50)
    x[2, 7] = float("nan")
    problem = Walk("softmax", (4, 50), Ref("float32", (50, 1)), (Ref("float32", (50, 1)),))
    check(problem, [x.reshape(-1)], torch.zeros(200), interpret)


def test_all_that_the_cpu_does_element_by_element_is_done() -> None:
    kinds = {"where": ("bool", "float32", "float32"), "prelu": ("float32",) * 2}
    kinds |= dict.fromkeys(("and", "or", "xor"), ("bool",))
    missing = []
    for op in sorted(ELEMENTWISE):
        given_ = kinds.get(op, ("float32",) * (2 if op in (*BINARY, *COMPARED) else 1))
        out = "bool" if op in (*COMPARED, "and", "or", "xor", "isnan") else "float32"
        refs = tuple(Ref(dtype, (1,)) for dtype in given_)
        if why_not(Walk(op, (8,), Ref(out, (1,)), refs, (0.1, 0.2))):
            missing.append(op)
    assert missing == []


def test_an_offset_beyond_int32_is_counted_in_int64() -> None:
    near, far = (Walk("copy", (3, n), Ref("int8", (n, 1)), (Ref("int8", (1, 3)),))
                 for n in (1 << 20, 1 << 30))  # fmt: skip
    texts = []
    for problem in (near, far):
        (recipe,) = recipes(problem, {}, 90, effort=0)
        call = recipe.calls[0]
        assert isinstance(call, Kernel)
        texts.append("int64" in call.function.src)
    assert texts == [False, True]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Walk("fft", (4,), Ref("float32", (1,)), (Ref("float32", (1,)),)), "no operation 'fft'"),
        (Walk("exp", (4,), Ref("int32", (1,)), (Ref("int32", (1,)),)), "no operation 'exp'"),
        (Walk("copy", (4,), Ref("int8", (1,)), (Ref("float32", (1,)),)), "expected a cast"),
        (Walk("copy", (4,), Ref("float64", (1,)), (Ref("float64", (1,)),)), "float64"),
        (Walk("copy", (0,), Ref("int8", (1,)), (Ref("int8", (1,)),)), "no elements"),
        (Walk("copy", (4,), Ref("int8", ()), (Ref("int8", (1,)),)), "no stride"),
        (Walk("mean", (4,), Ref("int32", (0,)), (Ref("int32", (1,)),)), "real numbers"),
        (Walk("softmax", (4,), Ref("int32", (1,)), (Ref("int32", (1,)),)), "softmax"),
        (Walk("chain", (4,), Ref("int8", (1,)), (Ref("int8", (1,)),)), "the result is nothing"),
    ],
)
def test_a_walk_that_has_no_kernel_says_why(problem: Walk, reason: str) -> None:
    assert reason in why_not(problem)
    assert recipes(problem, {}, 90) == ()


def test_float8_needs_a_gpu_that_has_it() -> None:
    ref = Ref("float8e4m3fn", (1,))
    assert recipes(Walk("copy", (4,), ref, (ref,)), {}, 80) == ()
    assert recipes(Walk("copy", (4,), ref, (ref,)), {}, 90) != ()


COMPILED = [
    Walk("chain", (9, 64), Ref("int8", (64, 1)), (Ref("float16", (64, 1)), Ref("bfloat16", (0, 1))),
         steps=(Expression("add", (0, 1), "float32"), Expression("Gelu", (2,), "float32"),
                Expression("quantize", (3,), "int8", (0.02, 3.0)))),
    Walk("copy", (2, 64, 100), Ref("int8", (6400, 1, 64)), (Ref("int8", (6400, 100, 1)),)),
    Walk("div", (70,), Ref("int64", (1,)), (Ref("int64", (1,)), Ref("int64", (0,)))),
    Walk("cast", (70,), Ref("uint8", (1,)), (Ref("float32", (1,)),)),
    Walk("gather", (6, 96), Ref("bool", (96, 1)), (Ref("bool", (0, 1)), Ref("int64", (1, 0))),
         rows=(10, 96)),
    Walk("reduce_max", (3, 70000), Ref("float16", (1, 0)), (Ref("float16", (70000, 1)),)),
    Walk("prod", (3, 70), Ref("int32", (1, 0)), (Ref("int32", (70, 1)),)),
    Walk("softmax", (3, 20000), Ref("float16", (20000, 1)), (Ref("float16", (20000, 1)),)),
    Walk("expect", (70, 16), Ref("float32", (1, 0)), (Ref("float32", (16, 1)),),
         scalars=(*map(float, range(16)), 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("problem", COMPILED, ids=lambda problem: problem.op)
def test_they_compile(problem: Walk) -> None:
    for capability in (80, 90):
        (recipe,) = recipes(problem, {}, capability, effort=0)
        for call in recipe.calls:
            assert isinstance(call, Kernel)
            assert len(compile_kernel(call, capability).cubin) > 1000
