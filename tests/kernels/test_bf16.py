"""Kernels beside convolutions in bfloat16: maps, pools, normalization, attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernels import test_attention as attention
from tests.kernels.bf16 import TARGET, needs_bf16
from tests.kernels.harness import real
from tests.kernels.strided import Strided, compiled, in_parts
from tests.kernels.test_pool import naive_max, problem_of
from twofour.core.bfloat16 import ROUNDING, from_bf16, round_bf16, to_bf16
from twofour.core.norm import layer_norm
from twofour.core.numerics import Window
from twofour.kernels.cpu.attention import emit_attention, why_not
from twofour.kernels.cpu.norm import NormProblem, emit_norm, pack_norm
from twofour.kernels.cpu.pointwise import MapConstants, MapProblem, View, emit_map
from twofour.kernels.cpu.pool import emit_pool, pack_mean
from twofour.runtime.cpu import address

pytestmark = needs_bf16

HALO = (1, 2, 3, 1)
PLAIN = MapConstants()
SPECIAL = (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1.00390625, 1.01171875, 1e-30)


def words(shape: tuple[int, ...], values: np.ndarray | None = None) -> Strided:
    """A tensor of bfloat16 with a halo, holding the rounded values if there are some."""
    one = Strided(shape, np.uint16, halo=HALO)
    if values is not None:
        one.values[...] = to_bf16(values)
    return one


def view(one: Strided, kind: str) -> View:
    return View(kind, *one.values.strides)


@pytest.mark.parametrize(
    ("x_kind", "form"), [("float32", "nchw"), ("f32", "nhwc"), ("bfloat16", "nhwc")]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 3), (1, 2, 16, 16), (1, 3, 65, 17)])
def test_conversions_round_to_nearest_even(x_kind, form, shape) -> None:
    random = np.random.default_rng(0)
    values = random.normal(scale=10, size=shape).astype(np.float32)
    values.reshape(-1)[: len(SPECIAL)] = SPECIAL[: values.size]
    back = Strided(shape, np.float32, halo=HALO)
    if x_kind == "bfloat16":
        x, y, y_kind, want = words(shape, values), back, "f32", round_bf16(values)
    else:
        x, y, y_kind = Strided(shape, np.float32, form), words(shape), "bfloat16"
        x.values[...] = values
        want = round_bf16(values)
    problem = MapProblem("convert", *shape, view(x, x_kind), view(y, y_kind))
    (kernel,) = compiled({"m_": emit_map("m_", problem)}, TARGET, vectorize=True)
    header = PLAIN.pack()
    for parts in (1, 2):
        in_parts(kernel, (x.address, address(header), y.address, 0), shape[0] * shape[1], 1, parts)
        np.testing.assert_array_equal(real(y.take()), want)


@pytest.mark.parametrize("op", ["copy", "convert"])
def test_slices_and_pads(op) -> None:
    values = np.random.default_rng(1).normal(size=(1, 6, 8, 5)).astype(np.float32)
    x, y = words(values.shape, values), words((1, 3, 4, 10))
    steps = replace(view(x, "bfloat16"), row=2 * x.values.strides[1], pixel=2 * x.values.strides[2])
    problem = MapProblem(op, 1, 3, 4, 5, steps, view(y, "bfloat16"), before=2, after=3)
    (kernel,) = compiled({"m_": emit_map("m_", problem)}, TARGET, vectorize=True)
    in_parts(kernel, (x.address, address(PLAIN.pack()), y.address, 0), 3, 1, 2)
    want = np.pad(round_bf16(values)[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 3)))
    np.testing.assert_array_equal(real(y.take()), want)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 48])
def test_maximum_chooses(channels) -> None:
    window = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1))
    values = np.random.default_rng(2).normal(-5, 1, (2, 6, 7, channels)).astype(np.float32)
    x, y = words(values.shape, values), words((2, *window.output_size(6, 7), channels))
    problem = problem_of("max", x, y, "bfloat16", "bfloat16", window)
    (kernel,) = compiled({"p_": emit_pool("p_", problem)}, TARGET, vectorize=False)
    header = np.zeros(64, np.uint8)
    for parts in (1, 3):
        pointers = (x.address, address(header), y.address, 0)
        in_parts(kernel, pointers, problem.pieces, problem.blocks, parts)
        np.testing.assert_array_equal(real(y.take()), naive_max(real(x.values), window))


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("channels", [1, 16, 17, 48])
def test_mean(out, channels) -> None:
    values = np.random.default_rng(3).normal(size=(2, 5, 7, channels)).astype(np.float32)
    x, shape = words(values.shape, values), (2, 1, 1, channels)
    y = words(shape) if out == "bfloat16" else Strided(shape, np.float32, halo=HALO)
    problem = problem_of("mean", x, y, "bfloat16", out, Window((1, 1)))
    (kernel,) = compiled({"p_": emit_pool("p_", problem)}, TARGET, vectorize=False)
    pointers = (x.address, address(pack_mean(1 / 35, 0, 0)), y.address, 0)
    in_parts(kernel, pointers, problem.pieces, problem.blocks, 2)
    held = real(x.values).astype(np.float64)
    want = held.mean((1, 2), keepdims=True)
    # 34 additions and one product, each rounded; and the result.
    bound = 36 * np.finfo(np.float32).eps * np.abs(held).mean((1, 2), keepdims=True)
    bound = bound + (ROUNDING * np.abs(want) if out == "bfloat16" else 0)
    assert (np.abs(real(y.take()) - want) <= 1.01 * bound).all()


@pytest.mark.parametrize("float_out", [True, False])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 15), (5, 17), (9, 64), (7, 771)])
def test_layer_norm_is_the_definition_rounded(float_out, rows, channels) -> None:
    random = np.random.default_rng(channels)
    gap, shape = (0, 0, 0, 2), (rows, 1, 1, channels)
    x, y = (Strided(shape, np.float32, "nhwc", gap) for _ in "xy")
    q = Strided(shape, np.uint16, "nhwc", gap)
    x.values[...] = random.normal(3, 2, shape)
    gamma, beta = random.normal(1, 0.3, (2, channels)).astype(np.float32)
    pixels = (one.values.strides[0] for one in (x, y, q))
    problem = NormProblem(rows, channels, *pixels, "float32", float_out, True, 1e-5, "bfloat16")
    (kernel,) = compiled({"n_": emit_norm("n_", problem, TARGET.isa)}, TARGET, vectorize=False)
    outs = [y, q] if float_out else [q]
    packed = pack_norm(gamma, beta, PLAIN)
    want = layer_norm(x.values, gamma, beta, 1e-5)
    for parts in (1, 3):
        pointers = (x.address, address(packed), outs[0].address, outs[-1].address)
        in_parts(kernel, pointers, rows, 1, parts)
        np.testing.assert_array_equal(q.take(), to_bf16(want))
        if float_out:
            np.testing.assert_array_equal(y.take(), want)


def attention_case(form: attention.Form, size: attention.Size) -> attention.Case:
    """Random bits of bfloat16 in place of the floats."""
    case = attention.Case.of(replace(form, dtype="float32", out="float32"), size)
    dtype = np.uint16 if form.out == "bfloat16" else np.float32
    y = Strided((form.batch, size.q_len, 1, form.heads * size.dv), dtype, "nhwc", (0, 0, 1, 2))
    q, k, v = (to_bf16(x) for x in (case.q, case.k, case.v))
    return replace(case, form=form, q=q, k=k, v=v, y=y)


def exact(case: attention.Case) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and the bound that kernels/cpu/attention.py derives."""
    floats = replace(case, q=real(case.q), k=real(case.k), v=real(case.v))
    want, bound = attention.exact(floats)
    ones = replace(floats, v=np.abs(real(case.v)))
    weighted, _ = attention.exact(ones)  # sum of p |v|
    bound = bound + 1.1 * (ROUNDING + 2 * 1.2e-4) * weighted
    return want, bound + (ROUNDING * (np.abs(want) + bound) if case.form.out == "bfloat16" else 0)


ATTENTIONS = [
    attention.Form("bfloat16", "bfloat16"),
    attention.Form("bfloat16", "float32", "keys", batch=2),
    attention.Form("bfloat16", "bfloat16", "full", batch=2, heads=4),
    attention.Form("bfloat16", "bfloat16", causal=True, heads=4),
]
EVEN = [size for size in attention.SIZES if size.d % 2 == 0]


@pytest.mark.parametrize("form", ATTENTIONS, ids=str)
def test_attention_is_within_its_bound(form) -> None:
    cases = [attention_case(form, size) for size in EVEN]
    texts = {
        f"a{i}_": emit_attention(f"a{i}_", c.place()[2], TARGET.isa) for i, c in enumerate(cases)
    }
    for case, kernel in zip(cases, compiled(texts, TARGET, vectorize=False), strict=True):
        want, bound = exact(case)
        for parts in (1, 3):
            got = real(case.run(kernel, parts)).astype(np.float64)
            assert (np.abs(got - want) <= bound).all(), f"{case.form} {case.size}"


def test_attention_keeps_nan_in_its_row() -> None:
    case = attention_case(ATTENTIONS[0], attention.Size(9, 21, 16, 16))
    problem = case.place()[2]
    (kernel,) = compiled({"a_": emit_attention("a_", problem, TARGET.isa)}, TARGET, False)
    case.q[0, 1, 2, 5] = 0x7FC1
    got = from_bf16(case.run(kernel))
    assert np.isnan(got[0, 1, 2]).all()
    assert np.isnan(got).sum() == 16


def test_a_query_whose_keys_are_all_masked_gets_zeros() -> None:
    case = attention_case(ATTENTIONS[2], attention.Size(4, 18, 16, 16))
    problem = case.place()[2]
    (kernel,) = compiled({"a_": emit_attention("a_", problem, TARGET.isa)}, TARGET, False)
    got = from_bf16(case.run(kernel))
    assert (got[:, :, 0] == 0).all()
    assert np.isfinite(got).all()


def test_heads_of_an_odd_size_are_refused() -> None:
    assert "odd" in why_not("bfloat16", 16, 63, 64)
    assert why_not("bfloat16", 16, 64, 63) == ""
