"""Placed operators on rows of channels -> what their kernels are asked."""

from __future__ import annotations

from twofour.compiler.layers import precision_of
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import AttentionOp, NormOp
from twofour.core.sizes import usual
from twofour.engine import TensorInfo
from twofour.kernels.cpu.attention import AttentionProblem, Offsets
from twofour.kernels.cpu.norm import NormProblem
from twofour.kernels.cpu.problem import Strides


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
    )


def attention_problem(op: AttentionOp, placed: Placed) -> tuple[AttentionProblem, Offsets]:
    """An attention, and where its operands lie."""
    q, k, v, *mask = [tensor(place) for place in placed.reads]
    starts = [place.at() - q.at() for place in (k, v, *mask)]
    mask_batch, mask_row = _mask_strides(op.mask_shape)
    problem = AttentionProblem(
        batch=op.batch,
        heads=op.heads,
        kv_heads=op.heads,
        q_len=q.batch // op.batch,
        k_len=k.batch // op.batch,
        d=q.channels // op.heads,
        dv=v.channels // op.heads,
        dtype=precision_of(q),
        q=_sequences(q, op.batch),
        k=_sequences(k, op.batch),
        v=_sequences(v, op.batch),
        y=_sequences(placed.y, op.batch),
        out=precision_of(placed.y),
        mask="" if not op.mask_shape else "full" if op.mask_shape[2] > 1 else "keys",
        mask_batch=mask_batch,
        mask_row=mask_row,
        causal=op.causal,
    )
    return problem, Offsets(*starts)


def attention_macs(problem: AttentionProblem) -> int:
    """Multiply-adds of both products."""
    pairs = problem.batch * problem.heads * problem.q_len * problem.k_len
    return pairs * (problem.d + problem.dv)


def _rows(place: Place) -> Strides:
    """The steps between rows of channels."""
    if isinstance(place, TensorInfo):
        row = place.shape[-1] * 4
        return Strides(row, row, row)
    step = place.strides.image  # a row is an image of one pixel
    return Strides(step, step, step)


def _sequences(place: Place, batch: int) -> Strides:
    """The steps between sequences and between their rows."""
    step = _rows(place).pixel
    count = place.batch if isinstance(place, Tensor) else _count(place)
    return Strides(count // batch * step, step, step)


def _count(place: TensorInfo) -> int:
    """Rows of channels of a plain array."""
    size = 1
    for dim in place.shape[:-1]:
        size *= dim
    return size


def _mask_strides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes from one sequence's mask to the next, and from one query's to the next."""
    if not shape:
        return 0, 0
    batch, _, queries, keys = shape
    row = keys * 4 if queries > 1 else 0
    return queries * keys * 4 if batch > 1 else 0, row
