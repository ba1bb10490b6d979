"""Attention kernels: int8 equal to the definition bit for bit, float32 within the derived bound."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import pytest

from tests.kernels.harness import targets
from tests.kernels.strided import Strided, compiled, in_parts
from twofour.core.abi import SLACK_BYTES
from twofour.core.attention import AttentionScales, attention_int8
from twofour.kernels.cpu.attention import (
    AttentionProblem,
    Offsets,
    emit_attention,
    pack_attention,
    why_not,
)
from twofour.kernels.cpu.problem import Strides
from twofour.runtime.cpu import address, allocate

TARGETS = targets()
EPS = np.finfo(np.float32).eps


@dataclass(frozen=True)
class Form:
    """One kind of attention."""

    dtype: str = "int8"
    out: str = "int8"
    mask: str = ""
    causal: bool = False
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2

    def __str__(self) -> str:
        parts = (self.dtype, self.out, self.mask, "causal" * self.causal, f"b{self.batch}")
        return "-".join(filter(None, (*parts, f"h{self.heads}", f"kv{self.kv_heads}")))


@dataclass(frozen=True)
class Size:
    """Queries, keys, and channels of a head."""

    q_len: int
    k_len: int
    d: int
    dv: int


@dataclass
class Case:
    """One attention; q, k, v and the mask lie in one arena, as they do in an engine."""

    form: Form
    size: Size
    scales: AttentionScales
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    y: Strided = field(repr=False)

    @staticmethod
    def of(form: Form, size: Size, seed: int = 0) -> Case:
        random = np.random.default_rng(seed)
        head = (form.batch, form.kv_heads, size.k_len)
        shapes = ((form.batch, form.heads, size.q_len, size.d), (*head, size.d), (*head, size.dv))
        if form.dtype == "int8":
            q, k, v = (random.integers(0, 256, shape, np.uint8) for shape in shapes)
            scales = AttentionScales(2.5 / 5400 / size.d**0.5, 120, 0.02)
        else:
            q, k, v = (random.standard_normal(shape, np.float32) for shape in shapes)
            scales = AttentionScales(1.7 / size.d**0.5)
        if form.out == "int8":
            scales = replace(scales, y=0.004 if form.dtype == "int8" else 0.01, y_zero=125)
        y = Strided(
            (form.batch, size.q_len, 1, form.heads * size.dv),
            np.uint8 if form.out == "int8" else np.float32,
            "nhwc",
            (0, 0, 1, 2),
        )
        return Case(form, size, scales, q, k, v, _mask(random, form, size), y)

    @property
    def whole_mask(self) -> np.ndarray | None:
        """As the definition takes it."""
        return self.mask[:, None, None] if self.form.mask == "keys" else self.mask

    def run(self, kernel, parts: int = 1) -> np.ndarray:
        """y as [batch, heads, q_len, dv]."""
        arena, offsets, problem = self.place()
        packed = pack_attention(self.scales, Offsets(*(o - offsets[0] for o in offsets[1:])))
        pointers = (address(arena) + offsets[0], address(packed), self.y.address, 0)
        in_parts(kernel, pointers, problem.pieces, 1, parts)
        y = self.y.take().reshape(self.form.batch, self.size.q_len, self.form.heads, self.size.dv)
        return y.transpose(0, 2, 1, 3)

    def place(self) -> tuple[np.ndarray, list[int], AttentionProblem]:
        """The arena, where q, k, v and the mask begin, and the problem.

        Heads are channels of a token's row; q's and k's rows are views of wider ones.
        """
        gaps, parts, strides = (24, 8, 0), [], []
        for values, gap in zip((self.q, self.k, self.v), gaps, strict=True):
            rows = np.ascontiguousarray(values.transpose(0, 2, 1, 3))
            rows = rows.reshape(*rows.shape[:2], -1).view(np.uint8)
            rows = np.pad(rows, ((0, 0), (0, 0), (0, gap)), constant_values=255)
            strides.append(Strides(rows.strides[0], rows.strides[0], rows.strides[1]))
            parts.append(rows.reshape(-1))
        mask = np.zeros(0, np.float32) if self.mask is None else self.mask
        parts.append(np.ascontiguousarray(mask).reshape(-1).view(np.uint8))
        offsets = [0, *accumulate(-(-p.size // 64) * 64 for p in parts)]
        arena = allocate(offsets.pop() + SLACK_BYTES)
        arena[:] = 255  # NaN as floats: nothing beyond a tensor may count
        for at, part in zip(offsets, parts, strict=True):
            arena[at : at + part.size] = part
        form, size = self.form, self.size
        lengths = (size.q_len, size.k_len, size.d, size.dv)
        y = self.y.values.strides
        problem = AttentionProblem(
            *(form.batch, form.heads, form.kv_heads, *lengths, form.dtype, *strides),
            Strides(y[0], y[0], y[1]),
            form.out,
            form.mask,
            *self.mask_strides(),
            form.causal,
        )
        return arena, offsets, problem

    def mask_strides(self) -> tuple[int, int, int]:
        if self.mask is None:
            return (0, 0, 0)
        if self.form.mask == "keys":
            return (self.mask.strides[0], 0, 0)
        sized = zip(self.mask.shape, self.mask.strides, strict=True)
        batch, head, row, _ = (stride if count > 1 else 0 for count, stride in sized)
        return batch, head, row


def _mask(random: np.random.Generator, form: Form, size: Size) -> np.ndarray | None:
    """Small biases, some keys masked out.

    Of a "full" mask the first query sees no key, the last two only very small masks.
    """
    if not form.mask:
        return None
    shape = (form.batch, form.heads if form.heads > 1 else 1, size.q_len, size.k_len)
    mask = random.normal(size=shape if form.mask == "full" else (form.batch, size.k_len))
    hidden = random.random(mask.shape)
    mask = np.where(hidden < 0.2, -np.inf, np.where(hidden < 0.4, -1e9, mask))
    if form.mask == "full" and size.q_len > 3:
        mask[:, :, -2:-1] = -1e38
        mask[:, :, -1] = np.finfo(np.float32).min
        mask[:, :, 0] = -np.inf
    return mask.astype(np.float32)


def kernels(cases: list[Case], target) -> list:
    texts = {
        f"a{i}_": emit_attention(f"a{i}_", c.place()[2], target.isa) for i, c in enumerate(cases)
    }
    return compiled(texts, target, vectorize=False)


FORMS = [
    Form(),
    Form(out="float32"),
    Form(mask="keys", batch=2),
    Form(mask="full", batch=2, heads=4),
    Form(causal=True),
    Form(mask="keys", causal=True, out="float32", heads=4),
    Form(mask="full", heads=1, kv_heads=1),
]
SIZES = [
    Size(1, 1, 16, 16),
    Size(15, 17, 32, 32),
    Size(16, 15, 64, 64),
    Size(17, 128, 40, 40),
    Size(128, 16, 16, 80),
    Size(7, 197, 64, 64),
    Size(5, 70, 30, 7),
    Size(2, 49, 63, 33),
    Size(13, 64, 72, 128),
    Size(9, 128, 64, 64),
    Size(6, 150, 32, 16),
    Size(10, 80, 16, 48),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_int8_is_the_definition(target) -> None:
    # Each form at a third of the sizes, each size with two or three forms.
    cases = [Case.of(f, s) for i, f in enumerate(FORMS) for s in SIZES[i % 3 :: 3]]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        want = attention_int8(
            case.q, case.k, case.v, case.scales, case.whole_mask, case.form.causal
        )
        for parts in (1, 3):
            got = case.run(kernel, parts)
            assert got.dtype == want.dtype
            assert (got == want).all(), f"{case.form} {case.size}"
        assert len(np.unique(want)) > min(20, want.size // 16), "the outputs are nearly all alike"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_int8_extremes(target) -> None:
    """Every zero point of q and of y; bytes all alike; steep and flat; a y that saturates."""
    case = Case.of(Form(), Size(9, 33, 64, 32))
    (kernel,) = kernels([case], target)
    extremes = [(0, 0), (255, 255), (0, 255), (255, 0)]
    for q_zero, y_zero in ((0, 0), (128, 128), (255, 255), (128, 255)):
        for score, y in ((1e-12, 1.0), (1e-7, 0.002), (1e-4, 1e-12), (1.0, 0.002), (1e9, 0.002)):
            scales = AttentionScales(score, q_zero, 0.02, y, y_zero)
            one = replace(case, scales=scales)
            for q, k in (None, None), *extremes:
                if q is not None:
                    one = replace(one, q=np.full_like(case.q, q), k=np.full_like(case.k, k))
                want = attention_int8(one.q, one.k, one.v, scales)
                assert (one.run(kernel) == want).all(), (scales, q, k)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_query_whose_keys_are_all_masked_gets_zeros(target) -> None:
    """Of minus infinity there is no maximum; y is its zero point, in float32 the number 0."""
    forms = [
        Form(dtype, out, "full") for dtype in ("int8", "float32") for out in ("int8", "float32")
    ]
    cases = [Case.of(form, Size(4, 18, 16, 16)) for form in forms]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        got = case.run(kernel)
        assert (got[:, :, 0] == (case.scales.y_zero or 0)).all()
        assert np.isfinite(got).all()
        assert (got[:, :, 1] != got[:, :, 0]).any()


FLOATS = [
    Form("float32", "float32"),
    Form("float32", "float32", "keys", batch=2),
    Form("float32", "float32", "full", batch=2, heads=4),
    Form("float32", "float32", causal=True, heads=4),
    Form("float32", "int8", "keys"),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_float32_is_within_its_bound(target) -> None:
    cases = [Case.of(f, s) for i, f in enumerate(FLOATS) for s in SIZES[i % 3 :: 3]]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        want, bound = exact(case)
        for parts in (1, 3):
            got = case.run(kernel, parts).astype(np.float64)
            if case.form.out == "int8":
                # A value near a tie may go to either side of it.
                exact_steps = np.clip(want / case.scales.y + case.scales.y_zero, 0, 255)
                assert (np.abs(got - exact_steps) <= 0.5 + 1e-3).all()
                continue
            assert (np.abs(got - want) <= bound).all(), f"{case.form} {case.size}"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_float32_keeps_nan_in_its_row(target) -> None:
    """A network that diverged must not look healthy."""
    case = Case.of(Form("float32", "float32"), Size(9, 20, 16, 16))
    (kernel,) = kernels([case], target)
    for value in (np.nan, np.uint32(0x7FC12345).view(np.float32)):
        case.q[0, 1, 2, 5] = value
        got = case.run(kernel)
        assert np.isnan(got[0, 1, 2]).all()
        assert np.isnan(got).sum() == 16


def exact(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and the bound that kernels/cpu/attention.py derives."""
    q = case.q.astype(np.float64)
    share = case.form.heads // case.form.kv_heads
    k, v = (np.repeat(x.astype(np.float64), share, axis=1) for x in (case.k, case.v))
    mask = np.zeros(1) if case.whole_mask is None else case.whole_mask.astype(np.float64)
    mask = np.where(mask < -1e8, -np.inf, mask) if case.form.mask == "keys" else mask
    if case.form.causal:
        query, key = np.ogrid[: q.shape[2], : k.shape[2]]
        mask = np.where(key <= query, mask, -np.inf)
    s = q @ k.swapaxes(-1, -2) * case.scales.score + mask
    top = s.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        p = np.where(np.isfinite(s), np.exp(s - top), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    size = np.abs(q) @ np.abs(k).swapaxes(-1, -2) * case.scales.score
    seen = np.where(np.isfinite(s), np.abs(s), 0)
    off = (case.size.d + 4) * EPS * size + 3 * EPS * (seen + np.where(top > -np.inf, abs(top), 0))
    off = off + (p * off).sum(-1, keepdims=True) + (case.size.k_len + 12) * EPS
    bound = 1.1 * (p * off) @ np.abs(v) + 2.0**-124 * np.abs(v).sum(-2, keepdims=True)
    return p @ v, bound


def test_threads_have_scratch_memory_of_their_own() -> None:
    """More threads than any engine was tuned for, at once."""
    form = Form(batch=4, heads=4, kv_heads=4)
    case = Case.of(form, Size(20, 130, 64, 64))
    (kernel,) = kernels([case], TARGETS[0])
    want = attention_int8(case.q, case.k, case.v, case.scales)

    def together(*arguments: int) -> None:
        *pointers, begin, end, p0, p1 = arguments
        pieces = range(begin, end)
        with ThreadPoolExecutor(len(pieces)) as pool:
            done = [pool.submit(kernel, *pointers, t, t + 1, p0, p1) for t in pieces for _ in "ab"]
            [future.result() for future in done]

    for _ in range(5):
        assert (case.run(together) == want).all()


def test_what_does_not_fit_is_refused() -> None:
    problem = Case.of(Form(), Size(2, 2, 16, 16)).place()[2]
    with pytest.raises(ValueError, match="cannot share"):
        replace(problem, kv_heads=3)
    with pytest.raises(ValueError, match="fit into an int32 sum"):
        replace(problem, k_len=70000)
    with pytest.raises(ValueError, match=r"float32 attention over 4000 keys .* of the stack"):
        replace(problem, k_len=4000, d=64, dtype="float32", out="float32")


def test_the_longest_sequences_fit_on_a_small_stack() -> None:
    """What a thread has at least, 2 MiB; a sequence as long as one kernel takes."""
    form = Form("float32", "float32", "keys")
    longest = max(n for n in range(1000, 4000, 10) if not why_not("float32", n, 64, 64))
    assert longest > 1500
    case = Case.of(form, Size(3, longest, 64, 64))
    (kernel,) = kernels([case], TARGETS[0])
    before = threading.stack_size(2 << 20)
    try:
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(case.run, kernel).result()
    finally:
        threading.stack_size(before)
    want, bound = exact(case)
    assert (np.abs(got - want) <= bound).all()
