"""What is asked of kernels for everything but products: walks, pools, norms, attention, rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda.products import STORED
from twofour.compiler.cuda.shifted import is_shifted, shifted_walk
from twofour.compiler.cuda.tensors import Tensor, c_strides
from twofour.compiler.native import AttentionOp, MapOp, NormOp, PoolOp
from twofour.compiler.native_nd import Look, NdOp, Part
from twofour.compiler.native_nms import NmsOp
from twofour.core.bfloat16 import to_bf16
from twofour.core.functions import Activation
from twofour.core.sizes import most
from twofour.kernels.cpu.nd_scalar import Expression
from twofour.kernels.cuda.nms import NmsProblem
from twofour.kernels.cuda.problem import (
    QUANTIZED,
    AttentionProblem,
    NormProblem,
    PoolProblem,
    Ref,
    Rows,
    RowsProblem,
    Walk,
)
from twofour.kernels.cuda.resize import ResizeProblem

Array = NDArray[Any]
_REAL = "float32"


def ref_of(tensor: Tensor, dims: tuple[int, ...] | None = None) -> Ref:
    """A walk over a tensor in its own order; `dims` are what it is repeated to."""
    strides = tensor.strides
    if dims is not None:
        missing = len(dims) - len(tensor.dims)
        own = [
            0 if mine == 1 and wide > 1 else step
            for mine, step, wide in zip(tensor.dims, strides, dims[missing:], strict=True)
        ]
        strides = (*(0,) * missing, *own)
    return Ref(tensor.dtype, strides)


def copy_walk(x: Tensor, y: Tensor, *, shifted: bool = False) -> Walk:
    """A value in another form or type.

    Args:
        x: from there.
        y: to there, of the same shape.
        shifted: one of them holds uint8 as the model has it, the other one int8, 128 less.
    """
    inputs = (ref_of(x),)
    if not shifted:
        return Walk("chain", y.dims, ref_of(y), inputs, steps=(Expression("cast", (0,), y.dtype),))
    zeros = (STORED, 0) if x.dtype == "uint8" else (0, STORED)
    steps = (
        Expression("dequantize", (0,), _REAL, (1.0, float(zeros[0]))),
        Expression("quantize", (1,), y.dtype, (1.0, float(zeros[1]))),
    )
    return Walk("chain", y.dims, ref_of(y), inputs, steps=steps)


def map_walks(
    op: MapOp, sources: Sequence[Tensor], y: Tensor
) -> Iterator[tuple[Walk, tuple[int, ...]]]:
    """The walks of an operator that touches each element once, each with the sources it reads."""
    if op.op == "copy":
        yield from _copies(op, sources[0], y)
        return
    steps: list[Expression] = []
    count = len(sources)
    c = op.constants
    scales = [(c.x_scale, c.x_zero), (c.r_scale, c.r_zero)]
    args = []
    for index, (tensor, (scale, zero)) in enumerate(zip(sources, scales, strict=False)):
        at = index
        if tensor.dtype in QUANTIZED:
            steps.append(Expression("dequantize", (index,), _REAL, (scale, float(zero - STORED))))
            at = count + len(steps) - 1
        args.append(at)
    last = args[0]
    if op.op in ("add", "mul"):
        steps.append(Expression(op.op, tuple(args), _REAL))
        last = count + len(steps) - 1
    for step in activation_steps(op.activation, last):
        steps.append(step)
        last = count + len(steps) - 1
    if y.dtype in QUANTIZED:
        scale = 1.0 if op.op == "mul" else c.y_scale
        steps.append(Expression("quantize", (last,), y.dtype, (scale, float(c.y_zero - STORED))))
    elif not steps:
        steps.append(Expression("cast", (last,), y.dtype))
    inputs = tuple(ref_of(tensor, y.dims) for tensor in sources)
    yield Walk("chain", y.dims, ref_of(y), inputs, steps=tuple(steps)), tuple(range(count))


def activation_steps(activation: Activation, last: int) -> list[Expression]:
    """An activation of the value with index `last`, as steps of a chain."""
    if activation.name == "Clip":
        bounds = (activation.low, activation.high)
        return [] if bounds == (-np.inf, np.inf) else [Expression("Clip", (last,), _REAL, bounds)]
    return [Expression(activation.name, (last,), _REAL)] if activation.name else []


def _copies(op: MapOp, x: Tensor, y: Tensor) -> Iterator[tuple[Walk, tuple[int, ...]]]:
    """Subsampled images with channels around them: a walk for those, and one that moves."""
    before, after = op.channel_pads
    axis = y.channel_axis
    zero = float(op.constants.y_zero - STORED) if y.dtype in QUANTIZED else 0.0
    steps = list(x.strides)
    if len(x.dims) == 4:
        steps[2] *= op.steps[0]
        steps[3] *= op.steps[1]
    for first, count in ((0, before), (y.dims[axis] - after, after)):
        if count:
            dims = (*y.dims[:axis], count, *y.dims[axis + 1 :])
            at = Ref(y.dtype, y.strides, first * y.strides[axis])
            yield Walk("fill", dims, at, scalars=(zero,)), ()
    inner = (*y.dims[:axis], y.dims[axis] - before - after, *y.dims[axis + 1 :])
    at = Ref(y.dtype, y.strides, before * y.strides[axis])
    moved = (Expression("cast", (0,), y.dtype),)
    yield Walk("chain", inner, at, (Ref(x.dtype, tuple(steps)),), steps=moved), (0,)


def nd_walks(
    op: NdOp, tensors: Sequence[Tensor | None]
) -> Iterator[tuple[Walk, dict[str, Tensor], dict[str, Array]]]:
    """The walks of a small operator, with operands and constants by role.

    Args:
        op: the operator.
        tensors: of each of its values; None for constants.
    """
    for part in op.parts:
        y = tensors[part.y.value]
        assert y is not None
        operands: dict[str, Tensor] = {}
        constants: dict[str, Array] = {}
        refs = []
        for index, look in enumerate(part.inputs):
            role, tensor = f"in{index}", tensors[look.value]
            if tensor is None:
                array = op.values[look.value].constant
                assert array is not None
                dtype = array.dtype.name
                if part.op == "gather" and not index and dtype == "float32":  # a table
                    array, dtype = _as_held(array, y.dtype)
                constants[role] = array
                refs.append(_looked(look, dtype, c_strides(array.shape)))
            else:
                operands[role] = tensor
                refs.append(_looked(look, tensor.dtype, tensor.strides))
        operands["y"] = y
        at = _looked(part.y, y.dtype, y.strides)
        dims = tuple(most(dim) for dim in part.dims)
        rows = _gathered(op, part, tensors)
        walk = Walk(part.op, dims, at, tuple(refs), part.scalars, rows, part.steps)
        held = [is_shifted(op.values[look.value], ref.dtype) for look, ref in zip(
            (*part.inputs, part.y), (*refs, at), strict=True)]  # fmt: skip
        yield shifted_walk(walk, held[:-1], held[-1]), operands, constants


def _as_held(array: Array, dtype: str) -> tuple[Array, str]:
    """Numbers that are only moved, in the type that they are moved to, if it is a narrow one."""
    if dtype == "float16":
        return array.astype(np.float16), dtype
    if dtype == "bfloat16":
        return to_bf16(array), dtype
    return array, "float32"


def _gathered(op: NdOp, part: Part, tensors: Sequence[Tensor | None]) -> tuple[int, int]:
    """Rows that a gather chooses from, and the elements from one to the next."""
    if part.op != "gather":
        return 0, 0
    look = part.inputs[0]
    tensor, dims = tensors[look.value], op.values[look.value].shape
    strides = c_strides(dims) if tensor is None else tensor.strides
    return dims[part.rows_axis], strides[part.rows_axis]


def _looked(look: Look, dtype: str, strides: tuple[int, ...]) -> Ref:
    """A look in elements."""
    steps = tuple(strides[axis] * most(step) if step else 0 for axis, step in look.axes)
    offset = sum(most(start) * step for start, step in zip(look.start, strides, strict=True))
    return Ref(dtype, steps, offset)


def pool_problem(op: PoolOp, x: Tensor, y: Tensor) -> PoolProblem:
    """A maximum, an average or a mean."""
    batch, height, width, channels = x.extent
    quantized = x.dtype in QUANTIZED
    return PoolProblem(
        op.op,
        batch,
        height,
        width,
        channels,
        x.view,
        y.view,
        op.window,
        op.scale,
        op.x_zero - STORED if quantized and op.op != "max" else 0,
        op.y_zero - STORED if y.dtype in QUANTIZED and op.op != "max" else 0,
        op.include_pad,
    )


def resize_problem(x: Tensor, y: Tensor) -> ResizeProblem:
    """A linear resizing of images."""
    batch, height, width, channels = x.extent
    _, high, wide, _ = y.extent
    return ResizeProblem(batch, (height, high), (width, wide), channels, x.view, y.view)


def nms_problem(op: NmsOp, boxes: Tensor, scores: Tensor) -> NmsProblem:
    """A suppression of boxes [images, places, 4] by scores [images, classes, places]."""
    (a, b, c), (d, e, f) = boxes.strides, scores.strides
    images, classes, places = scores.dims
    kinds = (boxes.dtype, a, b, c), (scores.dtype, d, e, f)
    return NmsProblem(images, classes, places, *kinds, op.how)


def norm_problem(op: NormOp, x: Tensor, y: Tensor | None, q: Tensor | None) -> NormProblem:
    """A layer normalization."""
    rows, _, _, channels = x.extent

    def where(tensor: Tensor | None) -> tuple[str, int] | None:
        return None if tensor is None else (tensor.dtype, tensor.view.image)

    zero = op.zero - STORED if q is not None and q.dtype in QUANTIZED else 0
    own = (x.dtype, x.view.image)
    return NormProblem(rows, channels, op.epsilon, own, where(y), where(q), op.scale, zero)


def rows_problem(x: Tensor, y: Tensor) -> RowsProblem:
    """Rows that are quantized at run time."""
    rows, _, _, channels = x.extent
    return RowsProblem(rows, channels, (x.dtype, x.view.image), (y.dtype, y.view.image))


def attention_problem(op: AttentionOp, operands: Mapping[str, Tensor]) -> AttentionProblem:
    """Attention of each head."""
    batch, q_len, k_len = (most(n) for n in (op.batch, op.q_len, op.k_len))
    quantized = operands["q"].dtype in QUANTIZED
    scales = op.scales

    def rows(role: str) -> Rows:
        tensor = operands[role]
        sequence, token, _ = tensor.strides
        return Rows(tensor.dtype, sequence, token)

    mask: tuple[int, ...] = ()
    if op.mask_shape:
        dims = tuple(most(n) for n in op.mask_shape)
        steps = c_strides(dims)
        mask = tuple(0 if dim == 1 else step for dim, step in zip(dims, steps, strict=True))
    return AttentionProblem(
        batch,
        q_len,
        k_len,
        op.heads,
        operands["q"].dims[2] // op.heads,
        operands["v"].dims[2] // op.heads,
        rows("q"),
        rows("k"),
        rows("v"),
        rows("y"),
        scales.score,
        mask,
        op.causal,
        scales.q_zero - STORED if quantized else 0,
        scales.v if quantized else 1.0,
        scales.y if quantized else 1.0,
        scales.y_zero - STORED if quantized and scales.y_zero is not None else 0,
    )
