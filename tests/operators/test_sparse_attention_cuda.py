"""Sparse attention as an operator on a GPU: what its tactic asks of the kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.cuda.interpret import interpret
from twofour.core.plugins import Operand, Problem, c_strides
from twofour.core.sparse_attention import NO_BLOCKS
from twofour.operators.sparse_attention import SPARSE_ATTENTION, reference
from twofour.operators.sparse_attention_cuda import problem_of

(TACTIC,) = SPARSE_ATTENTION.cuda
SHAPE = (2, 40, 32)
ATTRIBUTES = {
    "heads": 2, "window": 6, "global_tokens": 1, "causal": 0, "block": 64, "scale": 0.0,
}  # fmt: skip


def operand(name: str, dtype: str, shape: tuple[int, ...] = SHAPE, **more: object) -> Operand:
    plain = Operand(name, shape, dtype, c_strides(shape, "int8" if dtype == "bool" else dtype))
    return replace(plain, **more)


def problem(dtype: str, keep: np.ndarray | None = None, **more: object) -> Problem:
    """q, k and v as thirds of one tensor; the mask of keys is given, or constant and all true."""
    size = np.dtype(dtype).itemsize
    strides = (40 * 96 * size, 96 * size, size)
    parts = [operand(name, dtype, strides=strides, **more) for name in ("q", "k", "v")]
    mask = operand("keep", "bool", (1, 1), constant=np.ones((1, 1), bool))
    if keep is not None:
        mask = operand("keep", "bool", keep.shape)
    table = operand("blocks", "int32", (1, 1), constant=NO_BLOCKS)
    y = operand("y", dtype, **more)
    return Problem("SparseAttention", (*parts, mask, table), (y,), ATTRIBUTES)


@pytest.mark.parametrize("shape", [None, (2, 40), (1, 40)])
def test_it_computes_the_meaning(shape: tuple[int, int] | None) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 40, 96)).astype(np.float32)
    keep = None if shape is None else random.random(shape) < 0.7
    asked = problem("float32", keep)
    assert TACTIC.refuse(asked, 90) == ""
    (recipe,) = TACTIC.recipes(asked, 90, effort=0)
    y = torch.full(SHAPE, 9.0)
    tensors = {name: torch.from_numpy(x)[:, :, 32 * i :] for i, name in enumerate("qkv")}
    flat = {
        name: part.as_strided((x.size - 32 * i,), (1,), 32 * i)
        for i, (name, part) in enumerate(tensors.items())
    }
    if keep is not None:
        flat["keep"] = torch.from_numpy(keep)
    interpret(recipe, {**flat, "y": y})
    shown = np.ones((1, 1), bool) if keep is None else keep
    wanted = reference(*np.split(x, 3, axis=2), shown, NO_BLOCKS, **ATTRIBUTES)
    np.testing.assert_allclose(y.numpy(), wanted, atol=2e-6)


def test_scales_and_zero_points() -> None:
    asked = problem("int8", scale=np.array([0.5], np.float32))
    dense = problem_of(asked).dense
    assert dense.score_scale == pytest.approx(0.25 / 4)
    assert (dense.v_scale, dense.y_scale) == (0.5, 0.5)
    assert dense.q.token == 96


def test_refusals() -> None:
    asked = problem("float32")
    q, k, v, keep, table = asked.inputs
    moved = replace(asked, inputs=(q, k, v, keep, replace(table, constant=None)))
    assert "computed while running" in TACTIC.refuse(moved, 90)
    nonsense = replace(asked, attributes={**ATTRIBUTES, "window": -5})
    assert "expected window >= -1" in TACTIC.refuse(nonsense, 90)
    odd = replace(asked, attributes={**ATTRIBUTES, "heads": 5})
    assert "not 5 heads" in TACTIC.refuse(odd, 90)
    apart = replace(q, strides=(1, 40, 80))
    assert "not neighbours" in TACTIC.refuse(replace(asked, inputs=(apart, *asked.inputs[1:])), 90)
    shifted = problem("int8", scale=np.ones(1, np.float32), zero_point=3)
    assert "symmetric" in TACTIC.refuse(shifted, 90)
