"""Placed operators on rows of channels -> what their kernels are asked."""

from __future__ import annotations

import numpy as np

from twofour.compiler.layers import precision_of
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import AttentionOp, NormOp, RowsOp
from twofour.core.dynamic import TENSOR
from twofour.core.sizes import Count, most, usual
from twofour.engine import TensorInfo
from twofour.kernels.cpu.attention import AttentionProblem, Offsets
from twofour.kernels.cpu.norm import NormProblem
from twofour.kernels.cpu.problem import Strides
from twofour.kernels.cpu.quantize_rows import SHARES, RowsProblem


def tensor(place: Place) -> Tensor:
    """The place, which the compiler has put into the arena.

    Raises:
        TypeError: it is a plain array.
    """
    if not isinstance(place, Tensor):
        raise TypeError(f"{place.name!r} is a plain array; expected a tensor of the arena")
    return place


def norm_problem(op: NormOp, placed: Placed) -> NormProblem:
    """A layer normalization, row by row."""
    x = tensor(placed.x)
    second = placed.also[0] if placed.also else placed.y
    return NormProblem(
        rows=usual(x.count) * x.height * x.width,
        channels=x.channels,
        x_pixel=_rows(x).pixel,
        y_pixel=_rows(placed.y).pixel if op.float_out else 0,
        q_pixel=_rows(second).pixel if op.quantized_out else 0,
        x=x.kind,
        float_out=op.float_out,
        quantized_out=op.quantized_out,
        eps=op.epsilon,
        q=op.q,
        bounded=_bounded(op),
    )


def rows_problem(op: RowsOp, placed: Placed) -> RowsProblem:
    """Rows to be quantized at run time."""
    x = tensor(placed.x)
    return RowsProblem(op.step, x.channels, _rows(x).pixel)


def rows_work(op: RowsOp, placed: Placed) -> tuple[Count, int]:
    """Row pieces and panels: of the last step of a tensor every thread needs all rows."""
    x = tensor(placed.x)
    return x.count * (x.height * x.width), SHARES if op.step == TENSOR else 1


def _bounded(op: NormOp) -> bool:
    """Whether results, in steps, are sure to fit int32: normalized ones are at most sqrt(K)."""
    most = 1.1 * op.gamma.size**0.5 * np.abs(op.gamma).max() + np.abs(op.beta).max()
    return bool(most / op.scale < 2**30)


def attention_problem(op: AttentionOp, placed: Placed) -> tuple[AttentionProblem, Offsets]:
    """An attention, and where its operands lie."""
    q, k, v, *mask = [tensor(place) for place in placed.reads]
    starts = [place.at() - q.at() for place in (k, v, *mask)]
    mask_batch, mask_row = _mask_strides(op.mask_shape, mask[0]) if mask else (0, 0)
    problem = AttentionProblem(
        batch=op.batch,
        heads=op.heads,
        kv_heads=op.heads,
        q_len=op.q_len,
        k_len=op.k_len,
        d=q.channels // op.heads,
        dv=v.channels // op.heads,
        dtype=precision_of(q),
        q=_sequences(q, op.q_len),
        k=_sequences(k, op.k_len),
        v=_sequences(v, op.k_len),
        y=_sequences(placed.y, op.q_len),
        out=precision_of(placed.y),
        mask="" if not op.mask_shape else "full" if op.mask_shape[2] != 1 else "keys",
        mask_batch=mask_batch,
        mask_row=mask_row,
        causal=op.causal,
    )
    k_start, v_start, mask_start = (*starts, 0)[:3]
    return problem, Offsets(k_start, v_start, mask_start, -q.at())


def attention_macs(problem: AttentionProblem) -> int:
    """Multiply-adds of both products."""
    return attention_scores(problem) * (problem.d + problem.dv)


def attention_scores(problem: AttentionProblem) -> int:
    """Pairs of a query and a key, of all heads."""
    return usual(problem.pieces) * usual(problem.q_len) * usual(problem.k_len)


def _rows(place: Place) -> Strides:
    """The steps between rows of channels."""
    if isinstance(place, TensorInfo):
        row = place.shape[-1] * 4
        return Strides(row, row, row)
    step = place.strides.image  # a row is an image of one pixel
    return Strides(step, step, step)


def _sequences(place: Place, length: Count) -> Strides:
    """The steps between sequences, the longest there are, and between their rows."""
    step = _rows(place).pixel
    return Strides(most(length) * step, step, step)


def _mask_strides(shape: tuple[Count, ...], mask: Tensor) -> tuple[Count, int]:
    """Bytes from one sequence's mask to the next, and from one query's to the next.

    A mask of 4 dimensions lies as an image of queries x keys, any other as rows of keys.
    """
    batch, _, queries, keys = shape
    lie, in_rows = mask.strides, mask.height == 1 and mask.channels == most(keys)
    row = lie.image if in_rows else lie.row
    image = queries * lie.image if in_rows else lie.image
    return image if batch != 1 else 0, row if queries != 1 else 0
