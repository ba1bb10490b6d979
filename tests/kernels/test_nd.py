"""Small operators: any layout, any number of parts, equal to numpy; nothing else is written."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core import functions
from twofour.core.target import Target, host_target
from twofour.kernels.cpu import nd
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.nd import Nest, Ref, contiguous, emit_nd, nd_pieces
from twofour.kernels.cpu.nd_scalar import BYTES, FUNCTIONS, REDUCTIONS, Expression
from twofour.runtime.cpu import Code, address

HOST = host_target()
ISAS = dict.fromkeys((HOST.isa, "avx2", "vector") if HOST.arch == "x86_64" else (HOST.isa,))
TARGETS = [replace(HOST, isa=isa) for isa in ISAS]
GUARD = 0xA5
KINDS = sorted(set(BYTES) - {"s8"})
EXAMPLES = settings(max_examples=15, deadline=None)


@dataclass(frozen=True)
class Layout:
    """How an array lies: the order of its axes in memory, elements between, axes run backwards."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    flipped: tuple[bool, ...]


class Lying:
    """An array in guarded memory."""

    def __init__(self, dims: tuple[int, ...], dtype: str, layout: Layout) -> None:
        spread = [dims[axis] + layout.gaps[axis] for axis in layout.order]
        self.memory = np.full((int(np.prod(spread)) + 16) * np.dtype(dtype).itemsize, GUARD, "u1")
        size = 8 * np.dtype(dtype).itemsize
        inner = self.memory[size:-size].view(dtype).reshape(spread)
        whole = inner.transpose(np.argsort(layout.order)) if dims else inner
        cut = tuple(slice(gap // 2, gap // 2 + n) for gap, n in zip(layout.gaps, dims, strict=True))
        turn = tuple(slice(None, None, -1 if flip else 1) for flip in layout.flipped)
        self.values = whole[cut][turn] if dims else whole

    def take(self) -> np.ndarray:
        """The values, guard bytes in their place; fails if a byte around them changed."""
        values = self.values.copy()
        whole = np.dtype(f"u{self.values.itemsize}")  # a bool would be stored as 0 or 1
        self.values.view(whole)[...] = np.frombuffer(bytes([GUARD] * 8), whole)[0]
        assert (self.memory == GUARD).all(), "bytes around the output changed"
        return values


def ref(index: int, array: np.ndarray, kind: str = "", start: tuple[int, ...] = ()) -> Ref:
    offset = sum(a * b for a, b in zip(start, array.strides, strict=False))
    return Ref(index, kind or array.dtype.name, array.strides, offset)


def run(nests: list[Nest], arrays: list[np.ndarray], target: Target = HOST, parts: int = 1) -> None:
    """Calls the kernel on ranges of pieces, as threads would, the last range first."""
    code = Code([compile_object([Source(emit_nd("nd_", nests), True)], target)])
    kernel, pieces = code.kernel("nd_"), nd_pieces(nests)
    table = (ctypes.c_int64 * len(arrays))(*map(address, arrays))
    for part in reversed(range(parts)):
        bounds = pieces * part // parts, pieces * (part + 1) // parts
        kernel(ctypes.addressof(table), None, None, None, *bounds, 0, 1)


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=5).map(tuple)


@st.composite
def layouts(draw, dims: tuple[int, ...], *, backwards: bool = False) -> Layout:
    rank = len(dims)
    order = tuple(draw(st.permutations(range(rank))))
    gaps = tuple(draw(st.tuples(*[st.integers(0, 2)] * rank)))
    flips = st.booleans() if backwards else st.just(False)
    return Layout(order, gaps, tuple(draw(st.tuples(*[flips] * rank))))


def fill(array: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    if array.dtype.kind == "f":
        array[...] = random.normal(scale=3, size=array.shape)
    elif array.dtype.kind == "b":
        array[...] = random.integers(0, 2, array.shape)
    else:
        array[...] = random.integers(-5 if array.dtype.kind == "i" else 0, 99, array.shape)


def seen(array: np.ndarray, ones: tuple[bool, ...]) -> np.ndarray:
    """The array with some axes cut to one element, as a broadcast operand has them."""
    return array[(*(slice(0, 1) if one else slice(None) for one in ones), ...)]


@pytest.fixture(autouse=True)
def shared_however_small(monkeypatch) -> None:
    """Parts are tested on sizes that would not be shared."""
    monkeypatch.setattr(nd, "_SMALL", 0)


@EXAMPLES
@given(st.data(), st.sampled_from(["float32", "int64", "int32"]), st.integers(1, 3))
def test_broadcast_operands_in_any_layout(data, dtype, parts) -> None:
    dims = data.draw(shapes)
    arrays = [Lying(dims, dtype, data.draw(layouts(dims, backwards=True))) for _ in range(2)]
    y = Lying(dims, dtype, data.draw(layouts(dims)))
    for seed, one in enumerate(arrays):
        fill(one.values, seed)
    flags = st.tuples(*[st.booleans()] * len(dims))
    a, b = (seen(one.values, data.draw(flags)) for one in arrays)
    wide = [np.broadcast_to(v, dims) for v in (a, b)]
    op, meant = data.draw(st.sampled_from([("add", np.add), ("sub", np.subtract),
                                           ("mul", np.multiply), ("max", np.maximum)]))  # fmt: skip
    nest = Nest(op, dims, ref(2, y.values), (ref(0, wide[0]), ref(1, wide[1])))
    run([nest], [a, b, y.values], parts=parts)
    assert (y.take() == meant(*wide)).all()


@EXAMPLES
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 3))
def test_steps_and_starts_of_a_slice(data, dtype, parts) -> None:
    dims = data.draw(shapes)
    source = Lying(dims, dtype, data.draw(layouts(dims)))
    fill(source.values, 1)
    cuts = tuple(
        slice(*data.draw(st.sampled_from([(None, None, 1), (None, None, -1), (n - 1, None, -2),
                                          (n // 2, None, 1), (0, None, 3)]))) for n in dims
    )  # fmt: skip
    part = source.values[(*cuts, ...)]
    y = Lying(part.shape, dtype, data.draw(layouts(part.shape)))
    run([Nest("copy", part.shape, ref(1, y.values), (ref(0, part),))], [part, y.values],
        parts=parts)  # fmt: skip
    assert (y.take() == part).all()


@EXAMPLES
@given(st.data(), st.sampled_from(["int64", "int32"]), st.integers(1, 3))
def test_indices_are_clamped(data, index_type, parts) -> None:
    """-n to n - 1 as numpy has it; beyond, the nearest row, however far the index is out."""
    rows, dims = data.draw(st.integers(1, 7)), data.draw(shapes)
    table = Lying((rows, 3), "float32", data.draw(layouts((rows, 3))))
    fill(table.values, 0)
    at = Lying(dims, index_type, data.draw(layouts(dims)))
    limits = np.iinfo(index_type)
    extremes = [limits.min, limits.max, -rows - 1, rows]
    choice = st.sampled_from([*range(-rows, rows), *extremes])
    for place in np.ndindex(dims):
        at.values[place] = data.draw(choice)
    y = Lying((*dims, 3), "float32", data.draw(layouts((*dims, 3))))
    step, across = table.values.strides
    looks = (
        Ref(0, "float32", (0,) * len(dims) + (across,)),
        Ref(1, index_type, (*at.values.strides, 0)),
    )
    nest = Nest("gather", (*dims, 3), ref(2, y.values), looks, rows=(rows, step))
    run([nest], [table.values, at.values, y.values], parts=parts)
    index = at.values.astype(object)
    row = np.array(np.clip(np.where(index < 0, index + rows, index), 0, rows - 1), int)
    assert (y.take() == table.values[row]).all()


@EXAMPLES
@given(st.data(), st.sampled_from(sorted(REDUCTIONS)), st.integers(1, 3))
def test_reductions_of_any_axes(data, op, parts) -> None:
    dims = data.draw(shapes)
    x = Lying(dims, "float32", data.draw(layouts(dims, backwards=True)))
    fill(x.values, 2)
    x.values[...] /= 1.6 if op == "prod" else 1.0  # of 192 values, else beyond float32
    axes = tuple(a for a in range(len(dims)) if data.draw(st.booleans()))
    small = tuple(1 if a in axes else n for a, n in enumerate(dims))
    y = Lying(small, "float32", data.draw(layouts(small)))
    steps = tuple(0 if a in axes else s for a, s in enumerate(y.values.strides))
    nest = Nest(op, dims, Ref(1, "float32", steps), (ref(0, x.values),))
    run([nest], [x.values, y.values], parts=parts)
    wide, keep = x.values.astype(np.float64), {"axis": axes, "keepdims": True}
    count = max(1, int(np.prod([dims[a] for a in axes])))
    meant = {
        "sum": lambda v: v.sum(**keep), "mean": lambda v: v.mean(**keep),
        "reduce_max": lambda v: v.max(**keep), "reduce_min": lambda v: v.min(**keep),
        "prod": lambda v: v.prod(**keep), "l1": lambda v: np.abs(v).sum(**keep),
        "l2": lambda v: np.sqrt((v * v).sum(**keep)),
        "sumsquare": lambda v: (v * v).sum(**keep),
    }[op]  # fmt: skip
    size = np.abs(meant(wide)) if op == "prod" else meant(np.abs(wide)) if op != "l1" else 0
    bound = (count + 2) * 2.0**-23 * (np.abs(size) + np.abs(wide).sum(**keep) + 1)
    exact = op in ("reduce_max", "reduce_min") or (count == 1 and op in ("sum", "prod", "l1"))
    off = np.abs(y.take() - meant(wide))
    assert (off == 0).all() if exact else (off <= bound).all()


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_integer_reductions(dtype) -> None:
    x = np.random.default_rng(0).integers(-50, 50, (7, 9)).astype(dtype)
    for op, meant in (("sum", np.sum), ("reduce_max", np.max), ("reduce_min", np.min)):
        y = np.full(9, 77, dtype)
        run([Nest(op, (7, 9), Ref(1, dtype, (0, y.itemsize)), (ref(0, x),))], [x, y])
        assert (y == meant(x, axis=0)).all()


@EXAMPLES
@given(st.data(), st.integers(1, 3))
def test_softmax_of_any_layout(data, parts) -> None:
    dims = (*data.draw(shapes), data.draw(st.sampled_from([1, 3, 16, 37])))
    x, y = (Lying(dims, "float32", data.draw(layouts(dims))) for _ in range(2))
    fill(x.values, 3)
    run([Nest("softmax", dims, ref(1, y.values), (ref(0, x.values),))], [x.values, y.values],
        parts=parts)  # fmt: skip
    power = np.exp((x.values - x.values.max(-1, keepdims=True)).astype(np.float64))
    # exp comes within 2.1e-7 of itself, the difference within half a step of up to 32.
    assert np.allclose(y.take(), power / power.sum(-1, keepdims=True), rtol=6e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.isa)
@pytest.mark.parametrize("count", [16, 17, 80])
@pytest.mark.parametrize("step", [1, 2])
def test_softmax_and_its_expectation_on_rows(count, step, target) -> None:
    """Rows that lie side by side are walked in vectors."""
    random = np.random.default_rng(count)
    x = random.normal(0, 3, (7, count * step)).astype(np.float32)[:, ::step]
    x[3, 1], x[4] = np.nan, -np.inf
    y, mean = np.zeros((7, count), np.float32), np.zeros(7, np.float32)
    weights = random.normal(size=count).astype(np.float32)
    nests = [
        Nest("softmax", y.shape, ref(1, y), (ref(0, x),)),
        Nest("expect", y.shape, Ref(2, "float32", (4, 0)), (ref(0, x),), (*weights.tolist(), 0.5)),
    ]
    run(nests, [x, y, mean], target)
    with np.errstate(invalid="ignore"):
        power = np.exp((x - x.max(-1, keepdims=True)).astype(np.float64))
    share = power / power.sum(-1, keepdims=True)
    assert np.isnan(y[3:5]).all()
    assert np.isnan(mean[3:5]).all()
    assert np.allclose(y, share, rtol=6e-6, atol=0, equal_nan=True)
    size = 1e-5 * (share * np.abs(weights)).sum(-1)
    off = np.abs(mean - (share @ weights.astype(np.float64) + 0.5))
    assert (off <= size + 1e-7)[[0, 1, 2, 5, 6]].all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.isa)
def test_a_chain_of_operations(target) -> None:
    """((a - b) * a > 0.5) ? sqrt(|a|) : b, in one walk."""
    a, b = (np.random.default_rng(s).normal(size=(5, 37)).astype(np.float32) for s in (0, 1))
    y = np.zeros_like(a)
    steps = (
        Expression("sub", (0, 1), "float32"),
        Expression("mul", (2, 0), "float32"),
        Expression("clip", (3,), "float32", (0.5, np.inf)),
        Expression("less", (2, 4), "bool"),
        Expression("abs", (0,), "float32"),
        Expression("sqrt", (6,), "float32"),
        Expression("where", (5, 7, 1), "float32"),
    )
    run([Nest("chain", a.shape, ref(2, y), (ref(0, a), ref(1, b)), steps=steps)], [a, b, y], target)
    want = np.where(a - b < np.maximum((a - b) * a, np.float32(0.5)), np.sqrt(np.abs(a)), b)
    assert np.array_equal(y, want)


def test_softmax_of_extremes() -> None:
    inf = np.inf
    x = np.array([[-1e30, 1e30, 0], [-inf, 5, 5], [88, -88, 0], [-1e4, -1e4, -inf]], np.float32)
    y = np.zeros_like(x)
    run([Nest("softmax", x.shape, ref(1, y), (ref(0, x),))], [x, y])
    want = [[0, 1, 0], [0, 0.5, 0.5], [1, 0, np.exp(-88)], [0.5, 0.5, 0]]
    assert np.allclose(y, want, rtol=1e-6, atol=1e-37)


def elementwise(op: str, to: str, *inputs: np.ndarray, target: Target = HOST, **more) -> np.ndarray:
    """The operator on contiguous arrays of one shape; "s8" bytes come as uint8."""
    y = np.zeros(inputs[0].shape, "uint8" if to == "s8" else to)
    refs = tuple(ref(i, x) for i, x in enumerate(inputs))
    nest = Nest(op, y.shape, ref(len(inputs), y, to), refs, **more)
    run([nest], [*inputs, y], target)
    return y


FLOATS = np.array(
    [0, -0.0, 0.5, -0.5, 1, 2.5, -7.9, 300.7, 3e9, -3e9, 1e19, -1e19, np.inf, -np.inf, np.nan,
     2**23 + 1, -(2**24) - 2, 8388607.5, 1e-40], np.float32)  # fmt: skip
WHOLE = np.array([0, 1, -1, 127, 128, 255, 256, -128, -129, 2**31 - 1, -(2**31)])


@pytest.mark.parametrize("to", sorted(set(KINDS) - {"bfloat16"}))  # which is only copied
def test_casts(to) -> None:
    for kind in ("int64", "int32", "uint8", "int8", "bool"):
        x = WHOLE.astype(kind)
        assert (elementwise("cast", to, x) == x.astype(to)).all(), kind
    got, limits = elementwise("cast", to, FLOATS), np.iinfo("int64" if to == "int64" else "int32")
    if to == "float32":
        assert np.array_equal(got, FLOATS, equal_nan=True)
    elif to == "bool":
        assert (got == (FLOATS != 0)).all()
    else:
        cut = [0 if np.isnan(v) else limits.min if v == -np.inf else limits.max if v == np.inf
               else max(limits.min, min(int(v), limits.max)) for v in FLOATS]  # fmt: skip
        assert (got == np.array(cut, limits.dtype).astype(to)).all()


def test_stored_bytes_are_logical_values() -> None:
    """Int8 lies in the arena as uint8, plus 128; a copy between both forms and arithmetic on it."""
    x = WHOLE[:10].astype(np.int8)
    stored = elementwise("copy", "s8", x)
    assert (stored == (x.astype(int) + 128)).all()
    back = np.zeros(x.shape, np.float32)
    nest = Nest("cast", x.shape, ref(1, back), (ref(0, stored, "s8"),))
    run([nest], [stored, back])
    assert (back == x).all()


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_integer_division_never_traps(dtype) -> None:
    limits = np.iinfo(dtype)
    a, b = (v.reshape(-1).copy() for v in np.meshgrid(
        np.array([limits.min, limits.max, -7, 7, 0], dtype),
        np.array([0, -1, 1, 2, -2, limits.min], dtype)))  # fmt: skip
    want = [
        0 if q == 0 else int(p) if q == 1 else np.array(-int(p)).astype(object).item()
        if q == -1 else abs(int(p)) // abs(int(q)) * (1 if (p < 0) == (q < 0) else -1)
        for p, q in zip(a.tolist(), b.tolist(), strict=True)
    ]  # fmt: skip
    wrapped = [limits.min if v == limits.max + 1 else v for v in want]
    assert elementwise("div", dtype, a, b).tolist() == wrapped


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_comparisons_and_extremes_with_nan(target) -> None:
    a, b = (v.reshape(-1).copy() for v in np.meshgrid(FLOATS, FLOATS))
    for op, meant in (("equal", np.equal), ("less", np.less), ("greaterorequal", np.greater_equal),
                      ("greater", np.greater), ("lessorequal", np.less_equal)):  # fmt: skip
        assert (elementwise(op, "bool", a, b, target=target) == meant(a, b)).all()
    for op, meant in (("max", np.maximum), ("min", np.minimum)):
        got = elementwise(op, "float32", a, b, target=target)
        assert np.array_equal(got, meant(a, b), equal_nan=True)
    for op, meant in (("floor", np.floor), ("ceil", np.ceil), ("sign", np.sign), ("abs", np.abs),
                      ("relu", lambda v: np.maximum(v, 0)), ("neg", np.negative)):  # fmt: skip
        got = elementwise(op, "float32", FLOATS, target=target)
        assert np.array_equal(got, meant(FLOATS), equal_nan=True), op
    limited = elementwise("clip", "float32", FLOATS, target=target, scalars=(-1.5, 2.0))
    assert np.array_equal(limited, np.clip(FLOATS, -1.5, 2), equal_nan=True)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_functions_are_the_definition(target) -> None:
    """Bit for bit, however long the loop is and whatever LLVM makes of it."""
    meant = {name: getattr(functions, name) for name in FUNCTIONS}
    x = np.linspace(-20, 20, 1001, dtype=np.float32)
    for name, definition in meant.items():
        got = elementwise(name, "float32", x, target=target)
        assert np.array_equal(got, definition(x), equal_nan=True), name


def test_parts_of_one_output() -> None:
    """A concatenation and a border in one kernel: each nest is shared by itself."""
    a, b = np.arange(40, dtype=np.float32).reshape(20, 2), np.ones((20, 3), np.float32)
    for parts in (1, 2, 7):
        y = np.full((20, 6), np.nan, np.float32)
        nests = [
            Nest("copy", (20, 2), ref(2, y), (ref(0, a),)),
            Nest("copy", (20, 3), ref(2, y, start=(0, 2)), (ref(1, b),)),
            Nest("fill", (20, 1), ref(2, y, start=(0, 5)), scalars=(-2.5,)),
        ]
        run(nests, [a, b, y], parts=parts)
        assert (y == np.hstack([a, b, np.full((20, 1), -2.5)])).all()


def test_loops_that_are_one_run_of_memory_are_merged() -> None:
    """A contiguous copy of any rank is one loop; a channels-last concatenation two."""
    dims, wide = (2, 3, 4, 5), (2, 3, 4, 9)
    x, y = contiguous("float32", dims), contiguous("float32", wide)
    same = Nest("copy", dims, Ref(1, "float32", x), (Ref(0, "float32", x),))
    assert [loop.count for loop in nd._loops(same)] == [120]
    part = Nest("copy", dims, Ref(1, "float32", y), (Ref(0, "float32", x),))
    assert [loop.count for loop in nd._loops(part)] == [24, 5]
