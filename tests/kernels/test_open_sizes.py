"""Kernels whose sizes are known only when they run: one kernel, many sizes."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.harness import make, run, targets
from tests.kernels.strided import Strided, compiled, in_parts
from tests.kernels.test_attention import TARGETS as ATTENTION_TARGETS
from tests.kernels.test_attention import Case as Attention
from tests.kernels.test_attention import Form
from tests.kernels.test_attention import Size as Lengths
from twofour.core.abi import SLACK_BYTES
from twofour.core.attention import attention_int8
from twofour.core.numerics import Window
from twofour.core.sizes import Symbol, most, symbol_size
from twofour.kernels.cpu.attention import Offsets, emit_attention, pack_attention
from twofour.kernels.cpu.llvm import Function, Source, compile_object, module_text
from twofour.kernels.cpu.nd import Nest, Ref, contiguous, emit_nd, nd_pieces
from twofour.kernels.cpu.nest import _ladder as ladder_of
from twofour.kernels.cpu.problem import Config, Pieces
from twofour.kernels.cpu.sizes import emit_size
from twofour.kernels.cpu.tactic import tactics
from twofour.runtime.cpu import Code, address, allocate

TARGETS = targets()
SYMBOLS = (Symbol("rows", 1, 16, 40), Symbol("keys", 1, 20, 150))
ROWS, KEYS = (symbol_size(SYMBOLS, i) for i in range(2))
COLUMN = [
    t for t in tactics() if not t.depthwise and t.dtype != "bfloat16" and t.is_for(TARGETS[0].isa)
]


def test_a_size_in_code_is_its_value() -> None:
    sizes = [ROWS, KEYS * 3 + 7, (ROWS + 1) * KEYS * KEYS, ROWS * -2 + KEYS * 5]
    f = Function("kernel", [("ptr", "symbols"), ("ptr", "out")])
    for index, size in enumerate([*sizes, 11]):
        f.store("i64", str(emit_size(f, "%symbols", size)), "%out", 8 * index)
    code = Code([compile_object([Source(module_text([f]))], TARGETS[0])])
    for values in ((1, 1), (3, 20), (40, 150)):
        symbols, out = np.array(values, np.int64), np.zeros(5, np.int64)
        code.kernel("kernel")(address(symbols), address(out), None, None, 0, 0, 0, 0)
        assert out.tolist() == [*(size.at(values) for size in sizes), 11]


class OpenCase:
    """A convolution of the harness whose number of rows is open."""

    def __init__(self, case) -> None:
        self.case = case

    def __getattr__(self, name):
        return getattr(self.case, name)

    def problem(self):
        return replace(self.case.problem(), open_rows=True)


class MadeFor:
    """A kernel that is made for a usual number of rows and runs any."""

    def __init__(self, kernel, usual_rows: int) -> None:
        self.kernel, self.usual_rows = kernel, usual_rows

    def emit(self, name, problem, config, isa):
        return self.kernel.emit(name, replace(problem, out_h=self.usual_rows), config, isa)

    def pack(self, *arguments):
        return self.kernel.pack(*arguments)

    def work(self, *arguments):
        return self.kernel.work(*arguments)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("t", COLUMN, ids=lambda t: f"{t.name} {t.dtype}")
@pytest.mark.parametrize("usual_rows", [29, 1])
def test_matrix_products_of_any_number_of_rows(t, target, usual_rows) -> None:
    rng = np.random.default_rng(0)
    form = {"width": 1, "c": 24, "n": 32, "window": Window((1, 1)), "pattern": t.pattern}
    form |= {"dtype": t.dtype, "add": t.dtype}
    usual = make(rng, height=usual_rows, **form).problem()
    if not t.is_for(target.isa) or t.refuse(
        usual, make(rng, height=usual_rows, **form).w, target.isa
    ):
        return
    config = t.configs(usual, target.isa)[0]
    made = replace(t, kernel=MadeFor(t.kernel, usual_rows))
    if target is not TARGETS[0] and usual_rows == 1:
        return  # other units differ in single operations, not in how the loops run
    for rows in (1, 2, 5, 11, 19, 28, 43) if target is TARGETS[0] else (5, 28):
        case = make(rng, height=rows, **form)
        (want,) = run(case, [(t, config)], target)
        for parts in (1, 3):
            (got,) = run(OpenCase(case), [(made, config)], target, parts)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("usual_rows", [1, 3, 13, 40])
def test_few_usual_rows_leave_tall_tiles_for_more(usual_rows) -> None:
    rng = np.random.default_rng(0)
    problem = make(rng, height=usual_rows, width=1, c=8, n=16, window=Window((1, 1))).problem()
    for height in {1, 2, 7, 13, 28, usual_rows} & set(range(usual_rows + 1)):
        config = Config(Pieces.of(usual_rows, height).size, 1, 1)
        ladder = ladder_of(replace(problem, open_rows=True), config, 20)
        assert ladder[-1] == 1
        assert max(ladder) == max(config.tile_h, 20 * (usual_rows < 19 and config.tile_h < 19))
    assert ladder_of(problem, config, 20) == ()


FORMS = [
    Form(),
    Form(mask="keys", batch=2),
    Form(mask="full", batch=2, heads=4),
    Form(causal=True, out="float32"),
    Form("float32", "float32", mask="keys", batch=3),
    Form("float32", "float32", mask="full"),
    Form("float32", "int8", causal=True),
]
LENGTHS = [(1, 1), (3, 150), (4, 4), (5, 17), (7, 64), (40, 16), (16, 65), (2, 128), (9, 80)]


def attention_of(form: Form, lengths: tuple[int, int], seed: int = 0) -> Attention:
    """A case whose sequences lie one after the other."""
    case = Attention.of(form, Lengths(*lengths, 40, 24), seed)
    shape = (form.batch, lengths[0], 1, form.heads * 24)
    case.y = Strided(shape, np.uint8 if form.out == "int8" else np.float32)
    return case


def run_open(kernel, case: Attention, problem, parts: int) -> np.ndarray:
    """The results where the header names the place of the lengths, and masks have wide rows."""
    arena, offsets, _ = case.place()
    begin = -(-arena.size // 64) * 64
    mask = np.full(0, np.nan, np.float32) if case.mask is None else case.mask
    if mask.ndim == 4:
        spread = np.full((*mask.shape[:3], most(KEYS)), np.nan, np.float32)
        spread[..., : mask.shape[3]] = mask
        mask = spread
    memory = allocate(begin + 64 + mask.nbytes + SLACK_BYTES)
    memory[:] = 255
    memory[: arena.size] = arena
    memory[begin : begin + 16].view(np.int64)[:] = case.size.q_len, case.size.k_len
    memory[begin + 64 : begin + 64 + mask.nbytes] = mask.reshape(-1).view(np.uint8)
    places = Offsets(offsets[1], offsets[2], begin + 64, begin)
    packed = pack_attention(case.scales, places)
    pointers = (address(memory) + offsets[0], address(packed), case.y.address, 0)
    in_parts(kernel, pointers, problem.pieces, 1, parts)
    form, size = case.form, case.size
    y = case.y.take().reshape(form.batch, size.q_len, form.heads, size.dv)
    return y.transpose(0, 2, 1, 3)


def open_problem(case: Attention):
    """As the compiler asks for it: the lengths open, rows of a full mask as wide as can be."""
    problem = case.place()[2]
    strides = {}
    if case.form.mask == "keys":
        strides = {"mask_batch": KEYS * 4}
    elif case.form.mask == "full":
        row = 4 * most(KEYS)
        strides = {"mask_row": row, "mask_head": 0, "mask_batch": ROWS * row}
    return replace(problem, q_len=ROWS, k_len=KEYS, **strides)


@pytest.mark.parametrize("target", ATTENTION_TARGETS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_of_any_lengths(form, target) -> None:
    if form.mask == "full":
        form = replace(form, heads=1, kv_heads=1)  # a mask of its own for each head is not open
    first = attention_of(form, (16, 20))
    problem = open_problem(first)
    texts = {"a_": emit_attention("a_", problem, target.isa)}
    (kernel,) = compiled(texts, target, vectorize=False)
    for index, lengths in enumerate(LENGTHS):
        case = attention_of(form, lengths, index)
        assert emit_attention("a_", open_problem(case), target.isa) == texts["a_"]
        got = run_open(kernel, case, problem, 1 + index % 3)
        fixed = {"b_": emit_attention("b_", case.place()[2], target.isa)}
        (static,) = compiled(fixed, target, vectorize=False)
        np.testing.assert_array_equal(got, case.run(static))
        if form.dtype == "int8":
            want = attention_int8(
                case.q, case.k, case.v, case.scales, case.whole_mask, causal=form.causal
            )
            np.testing.assert_array_equal(got, want)


def nest_at(nest: Nest, kernel_arrays: list[np.ndarray], values: tuple[int, int], parts: int):
    """Runs a nest where the symbols have these values."""
    symbols = np.array(values, np.int64)
    code = Code([compile_object([Source(emit_nd("nd_", [nest]), True)], TARGETS[0])])
    arrays = [*kernel_arrays, symbols]
    table = (ctypes.c_int64 * len(arrays))(*map(address, arrays))
    pieces = nd_pieces([nest])
    for part in reversed(range(parts)):
        bounds = pieces * part // parts, pieces * (part + 1) // parts
        code.kernel("nd_")(ctypes.addressof(table), None, None, None, *bounds, 0, 1)


def opened(index: int, dims, order: tuple[int, ...]) -> Ref:
    """A C-contiguous array of these dimensions, walked along its axes in an order; -1 repeats."""
    strides = contiguous("float32", dims)
    return Ref(index, "float32", tuple(0 if a < 0 else strides[a] for a in order))


POINTS = [(1, 1), (3, 20), (40, 150), (17, 33)]


@pytest.mark.parametrize("values", POINTS)
@pytest.mark.parametrize("parts", [1, 3])
def test_small_operators_of_any_size(values, parts) -> None:
    rows, keys = values
    random = np.random.default_rng(rows)
    x = random.normal(size=(rows, keys, 6)).astype(np.float32)
    r = random.normal(size=(keys, 6)).astype(np.float32)
    dims = (ROWS, KEYS, 6)
    y = np.full((rows, 6, keys + 1), 7, np.float32)
    wide = (ROWS, 6, KEYS + 1)
    to = contiguous("float32", wide)
    added = Nest(
        "add",
        dims,
        Ref(2, "float32", (to[0], to[2], to[1]), 4),
        (opened(0, dims, (0, 1, 2)), opened(1, (KEYS, 6), (-1, 0, 1))),
    )
    nest_at(added, [x, r, y], values, parts)
    np.testing.assert_array_equal(y[:, :, 1:], (x + r).transpose(0, 2, 1))
    assert (y[:, :, 0] == 7).all()

    mean = np.full((rows, 6), 7, np.float32)
    reduced = Nest("mean", dims, opened(1, (ROWS, 6), (0, -1, 1)), (opened(0, dims, (0, 1, 2)),))
    nest_at(reduced, [x, mean], values, parts)
    np.testing.assert_allclose(mean, x.mean(1), rtol=1e-5, atol=1e-5)

    soft = np.full_like(x, 7)
    order = (0, 2, 1)
    softmax = Nest("softmax", (ROWS, 6, KEYS), opened(1, dims, order), (opened(0, dims, order),))
    nest_at(softmax, [x, soft], values, parts)
    powers = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(soft, powers / powers.sum(1, keepdims=True), rtol=1e-5)

    picked = np.full((rows, 6), 7, np.float32)
    at = np.array(random.integers(-keys, keys, rows))
    gathered = Nest(
        "gather",
        (ROWS, 6),
        opened(2, (ROWS, 6), (0, 1)),
        (
            Ref(0, "float32", (contiguous("float32", dims)[0], 4)),
            Ref(1, "int64", (8, 0)),
        ),
        rows=(KEYS, 24),
    )
    nest_at(gathered, [x, at, picked], values, parts)
    np.testing.assert_array_equal(picked, x[np.arange(rows), at])
