"""Sparse attention kernels against dense attention with the mask; int8 to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import targets
from tests.kernels.strided import Strided
from tests.operators.runner import operand, run
from twofour.core.attention import AttentionScales
from twofour.core.bfloat16 import from_bf16, round_bf16, to_bf16
from twofour.core.plugins import Problem
from twofour.core.sparse_attention import (
    NO_BLOCKS,
    Pattern,
    random_blocks,
    sparse_attention,
    sparse_attention_int8,
)
from twofour.core.target import Target, host_target, why_no_bf16
from twofour.operators import sparse_attention_code as code
from twofour.operators.sparse_attention_lists import LANES, Lists

HOST = host_target()
EPS = np.finfo(np.float32).eps


@dataclass(frozen=True)
class Size:
    """Sequences, tokens, heads, channels of a head."""

    batch: int
    length: int
    heads: int
    d: int


@dataclass(frozen=True)
class Form:
    """Types of q, k, v and of y, whether there is a mask of keys, and products in bfloat16."""

    dtype: str = "float32"
    out: str = "float32"
    masked: bool = False
    rounds: bool = False


STORED = {"float32": np.float32, "bfloat16": np.uint16, "uint8": np.uint8}


def scales_of(d: int) -> AttentionScales:
    """Of q, k and v as `Case.problem` has them, and a float y."""
    q, k, v = (float(np.float32(scale)) for scale in (0.011, 0.013, 0.02))
    return AttentionScales(d**-0.5 * (q * k), 120, v)


class Case:
    """One problem with its data: q, k and v are thirds of one tensor's channels."""

    def __init__(self, size: Size, pattern: Pattern, form: Form, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.size, self.pattern, self.form = size, pattern, form
        width = size.heads * size.d
        shape = (size.batch, size.length, 3 * width)
        if form.dtype == "uint8":
            data = random.integers(0, 256, shape, np.uint8)
        else:
            data = random.standard_normal(shape, np.float32)
            data = to_bf16(data) if form.dtype == "bfloat16" else data
        memory = Strided((*shape[:2], 1, shape[2]), data.dtype, "nhwc", (0, 0, 0, 0))
        memory.values[:, :, 0] = data
        self.memory, self.data = memory, data
        self.qkv = [memory.values[:, :, 0, i * width : (i + 1) * width] for i in range(3)]
        self.keep = np.ones((1, 1), bool)
        if form.masked:
            self.keep = random.random((size.batch, size.length)) < 0.6
            self.keep[0, : size.length // 2] = False  # so that some queries see no key
        self.y = Strided(
            (size.batch, size.length, 1, width), STORED[form.out], "nhwc", (0, 0, 0, 1)
        )

    def problem(self) -> Problem:
        """As the compiler puts it."""
        q, k, v = ({}, {}, {})
        y = {"scale": np.float32(0.004), "zero_point": 125} if self.form.out == "uint8" else {}
        if self.form.dtype == "uint8":
            q = {"scale": np.float32(0.011), "zero_point": 120}
            k = {"scale": np.float32(0.013), "zero_point": 128}
            v = {"scale": np.float32(0.02), "zero_point": 128}
        tensors = zip("qkv", self.qkv, (q, k, v), strict=True)
        inputs = (
            *(operand(name, array, **quantized) for name, array, quantized in tensors),
            operand("keep", self.keep, constant=not self.form.masked),
            operand("blocks", self.pattern.blocks, constant=True),
        )
        p = self.pattern
        attributes = {
            "heads": self.size.heads,
            "window": p.window,
            "global_tokens": p.global_tokens,
            "causal": int(p.causal),
            "block": p.block,
            "scale": 0.0,
        }
        outputs = (operand("y", self.y.values[:, :, 0], **y),)
        return Problem("SparseAttention", inputs, outputs, attributes)

    def run(self, target: Target, config: str, parts: int = 1) -> np.ndarray:
        """y as stored."""
        made = code.emit(self.problem(), target, config, rounds=self.form.rounds)
        arrays = [*self.qkv, self.keep, self.pattern.blocks]
        run(made, target, arrays, self.y.values[:, :, 0], parts)
        assert (self.memory.values[:, :, 0] == self.data).all(), "changed its inputs"
        return self.y.take()[:, :, 0].copy()

    def expected(self) -> np.ndarray:
        """By dense attention."""
        keep = self.keep if self.form.masked else None
        tensors = tuple(np.ascontiguousarray(x) for x in self.qkv)
        if self.form.dtype == "uint8":
            scales = scales_of(self.size.d)
            if self.form.out == "uint8":
                scales = replace(scales, y=float(np.float32(0.004)), y_zero=125)
            return sparse_attention_int8(tensors, self.size.heads, self.pattern, scales, keep)
        if self.form.dtype == "bfloat16":
            tensors = tuple(from_bf16(x) for x in tensors)
        if self.form.rounds:
            tensors = tuple(round_bf16(x) for x in tensors)
        return sparse_attention(tensors, self.size.heads, self.pattern, keep)

    def check(self, target: Target, config: str, parts: int = 1) -> np.ndarray:
        """Runs and compares; returns y."""
        y, expected = self.run(target, config, parts), self.expected()
        if self.form.out == "uint8":
            assert (y == expected).all()
            return y
        value = from_bf16(y) if y.dtype == np.uint16 else y
        # |scores| < 8, |v| < 6: rounding of scores, exponentials and sums, see attention.py; in
        # bfloat16 that of the exponentials and of the result.
        bound = (self.size.d + self.size.length + 64) * EPS * 6
        rounded = self.form.rounds or "bfloat16" in (self.form.dtype, self.form.out)
        bound += 2**-7 * 6 if rounded else 0
        np.testing.assert_allclose(value, expected, rtol=0, atol=bound)
        return y


def pattern(length: int, kind: str) -> Pattern:
    """Patterns of all kinds for any length."""
    if kind == "band":
        return Pattern(length, window=9)
    if kind == "longformer":
        return Pattern(length, window=16, global_tokens=3)
    if kind == "causal":
        return Pattern(length, window=20, global_tokens=2, causal=True)
    if kind == "bigbird":
        table = random_blocks(length, 8, 2, 12, 9, 0)
        return Pattern(length, 12, 9, False, 8, table)
    if kind == "blocks":  # a query block that sees nothing, and one row for all that follow
        return Pattern(length, -1, 0, False, 16, np.array([[0, 3], [-1, -1], [1, 900]], np.int32))
    if kind == "dense":
        return Pattern(length, window=length)
    return Pattern(length, window=-1)


KINDS = ("band", "longformer", "causal", "bigbird", "blocks", "dense", "nothing")
LENGTHS = (1, 2, 7, 16, 17, 131)


def lengths(target: Target) -> list[tuple[int, bool]]:
    """Lengths around the vector's width, and whether there is a mask of keys."""
    some = LENGTHS if target.isa == HOST.isa else (17, 40)
    return [(length, i % 2 == 1) for i, length in enumerate(some)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", targets(), ids=lambda t: t.isa)
def test_float32_equals_dense_attention(target, kind):
    """Every pattern."""
    for length, masked in lengths(target):
        case = Case(Size(2, length, 2, 20), pattern(length, kind), Form(masked=masked))
        case.check(target, code.TILES[target.isa][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", targets(), ids=lambda t: t.isa)
def test_int8_equals_the_definition(target, kind):
    """Bit for bit, bytes out."""
    for length, masked in lengths(target):
        form = Form("uint8", "uint8", masked)
        case = Case(Size(2, length, 2, 20), pattern(length, kind), form)
        case.check(target, code.TILES_INT8[target.isa][0])


@pytest.mark.skipif(bool(why_no_bf16(HOST)), reason="no AVX-512 with BF16 here")
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_equals_dense_attention(kind):
    """Of the rounded operands."""
    target = replace(HOST, bf16=True)
    for length, masked in lengths(target):
        form = Form("bfloat16", "float32" if masked else "bfloat16", masked)
        case = Case(Size(2, length, 2, 20), pattern(length, kind), form)
        case.check(target, code.TILES[target.isa][0])
        form = Form(masked=masked, rounds=True)
        case = Case(Size(2, length, 2, 36), pattern(length, kind), form)
        case.check(target, code.TILES[target.isa][0])


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("target", targets(), ids=lambda t: t.isa)
def test_all_tiles_equal_the_definition(target, dtype):
    """Every configuration, heads of one vector's channels and of several."""
    tiles = code.TILES if dtype == "float32" else code.TILES_INT8
    for config in tiles[target.isa]:
        for d in (4, 72) if config == tiles[target.isa][0] else (64,):
            Case(Size(1, 77, 1, d), pattern(77, "bigbird"), Form(dtype, dtype)).check(
                target, config
            )


@pytest.mark.parametrize("form", [Form(), Form("uint8", "float32"), Form("uint8", "uint8", True)])
def test_any_number_of_threads_gives_the_same(form):
    """Pieces of both stages are independent of each other."""
    case = Case(Size(2, 200, 3, 16), pattern(200, "longformer"), form)
    config = (code.TILES_INT8 if form.dtype == "uint8" else code.TILES)[HOST.isa][0]
    alone = case.check(HOST, config)
    for parts in (2, 3, 7):
        assert (case.run(HOST, config, parts) == alone).all()


def test_a_query_that_sees_no_key_gets_zeros():
    """As dense attention defines it."""
    table = np.array([[-1]], np.int32)
    case = Case(Size(1, 40, 1, 16), Pattern(40, -1, 0, False, 8, table), Form())
    assert (case.run(HOST, code.TILES[HOST.isa][0]) == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(-1, 40),
    st.integers(0, 10),
    st.booleans(),
    st.integers(1, 20),
    st.integers(0, 3),
    st.sampled_from(["float32", "uint8"]),
    st.booleans(),
)
def test_any_pattern_equals_dense_attention(
    length, window, global_tokens, causal, block, count, dtype, masked
):
    """Drawn patterns, best instruction set."""
    blocks = random_blocks(length, block, count, window, global_tokens, length)
    drawn = Pattern(length, window, global_tokens, causal, block, blocks)
    form = Form(dtype, dtype, masked)
    tiles = code.TILES_INT8 if dtype == "uint8" else code.TILES
    Case(Size(1, length, 2, 8), drawn, form).check(HOST, tiles[HOST.isa][0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(-1, 60),
    st.integers(0, 20),
    st.booleans(),
    st.integers(1, 33),
    st.integers(0, 3),
    st.sampled_from([(8, 3), (4, 4), (1, 1)]),
)
def test_lists_are_the_mask(length, window, global_tokens, causal, block, count, tile):
    """What lists and their words say is the pattern's mask, each key once."""
    blocks = random_blocks(length, block, count, window, global_tokens, 0)
    drawn = Pattern(length, window, global_tokens, causal, block, blocks)
    lists = Lists.of(drawn, *tile)
    mask = np.zeros((length, -(-length // LANES) * LANES), int)
    for record in lists.tiles:
        first, at, whole, chunks, masks_at = record[:5]
        words = np.full((chunks, lists.rows, lists.keys), 0xFFFF, np.uint16)
        count_ = (chunks - whole) * lists.rows * lists.keys
        words[whole:] = lists.masks[masks_at : masks_at + count_].reshape(-1, *words.shape[1:])
        seen = np.zeros((lists.rows, mask.shape[1]), int)
        for c in range(chunks):
            for k in range(lists.keys):
                block_ = lists.entries[at + c * lists.keys + k]
                bits = words[c, :, k, None] >> np.arange(LANES) & 1
                seen[:, block_ * LANES : (block_ + 1) * LANES] += bits
        mask[first : first + lists.rows] = seen
    assert mask.max() <= 1
    assert (mask[:, :length] == drawn.mask()).all()
    assert not mask[:, length:].any()
    assert lists.bounds[0] == 0
    assert lists.bounds[-1] == len(lists.tiles)


def test_work_and_memory_grow_with_the_length():
    """Twice the tokens: twice the products, tables and workspace, a row's scores the same."""
    visited, workspace, constants = [], [], []
    for length in (2048, 4096):
        case = Case(Size(1, length, 1, 16), Pattern(length, window=256), Form())
        visited.append(Lists.of(case.pattern, 8, 3).visited)
        made = code.emit(case.problem(), HOST, code.TILES[HOST.isa][0])
        workspace.append(made.workspace_bytes)
        constants.append(made.constants.size)
    for small, large in (visited, workspace, constants):
        assert large < 2.2 * small
    # 33 blocks of 16 keys is what 8 aligned queries with 256 neighbours on each side need.
    assert visited[1] <= 4096 * 33 * 16


def test_refuses_with_a_reason():
    """Each condition of `why_not`."""
    size = Size(1, 32, 2, 16)
    float_ = Case(size, pattern(32, "band"), Form()).problem()
    bytes_ = Case(size, pattern(32, "band"), Form("uint8", "uint8")).problem()
    q, k, v, keep, blocks = float_.inputs
    table = replace(blocks, constant=None)
    assert "constant" in code.why_not(replace(float_, inputs=(q, k, v, keep, table)), HOST)
    uneven = replace(float_, attributes={**float_.attributes, "heads": 3})
    assert "heads" in code.why_not(uneven, HOST)
    short = replace(float_, inputs=(q, replace(k, shape=(1, 16, 32)), v, keep, blocks))
    assert "[batch, length" in code.why_not(short, HOST)
    apart = replace(float_, inputs=(replace(q, strides=(1, 4, 128)), k, v, keep, blocks))
    assert "neighbours" in code.why_not(apart, HOST)
    ints = replace(keep, dtype="int64")
    assert "bool" in code.why_not(replace(float_, inputs=(q, k, v, ints, blocks)), HOST)
    q8, k8, v8, keep8, blocks8 = bytes_.inputs
    uneven = replace(k8, zero_point=127)
    assert "symmetric" in code.why_not(
        replace(bytes_, inputs=(q8, uneven, v8, keep8, blocks8)), HOST
    )
    mixed = (q8, k, v, keep, blocks)
    assert "no kernel for" in code.why_not(replace(float_, inputs=mixed), HOST)
    assert code.why_not(float_, HOST) == code.why_not(bytes_, HOST) == ""


def test_patterns_refuse_what_has_no_meaning():
    """With what was expected and what was got."""
    for wrong in (
        {"length": 0},
        {"length": 4, "window": -2},
        {"length": 4, "block": 0},
        {"length": 4, "blocks": np.zeros((0, 1), np.int32)},
        {"length": 4, "blocks": NO_BLOCKS.astype(float)},
    ):
        with pytest.raises(ValueError, match="expected"):
            Pattern(**wrong)
