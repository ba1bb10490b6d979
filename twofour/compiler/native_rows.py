"""Operators on rows of channels read as native ones: attention, normalization, parts of tensors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import (
    REAL,
    TYPES,
    AttentionOp,
    NativeOp,
    NormOp,
    NotNative,
    ViewOp,
    constant,
    name_of,
    operand,
    shape,
    stored,
)
from twofour.compiler.ops import FusedOp
from twofour.core.attention import AttentionScales
from twofour.kernels.cpu.attention import why_not

_SYMMETRIC = 128  # zero point 0 as stored


def _number(op: FusedOp, name: str) -> float:
    """A float attribute."""
    value = op.attributes[name]
    if isinstance(value, tuple):
        raise NotNative(f"{name} is {value}; expected one number")
    return float(value)


def _zero(op: FusedOp, name: str) -> int:
    """The zero point of a quantized operand, as stored."""
    zero_point = constant(op.inputs[f"{name}_zero_point"])
    return stored(zero_point, ir.DataType.from_numpy(zero_point.dtype))


def _layer_norm(op: FusedOp) -> NormOp:
    x = op.inputs["x"]
    if x.dtype != ir.DataType.FLOAT:
        raise NotNative(f"native normalization takes float32, not {x.dtype}")
    if len(shape(x)) == 4:
        raise NotNative("native normalization takes tensors of at most 3 dimensions")
    quantized, rounded = "y_scale" in op.inputs, op.base in ("BLayerNorm", "LayerNormB")
    both = op.base in ("LayerNormQ", "LayerNormB")
    return NormOp(
        op.name,
        op.op_type,
        "norm",
        operand(x),
        name_of(op.output),
        also=(name_of(op.outputs[1]),) if both else (),
        gamma=constant(op.inputs["gamma"]),
        beta=constant(op.inputs["beta"]),
        epsilon=_number(op, "epsilon"),
        scale=float(constant(op.inputs["y_scale"])) if quantized else 1.0,
        zero=_zero(op, "y") if quantized else 0,
        float_out=both or not (quantized or rounded),
        quantized_out=quantized or rounded,
        q="bfloat16" if rounded else "u8",
    )


def _attention(op: FusedOp) -> AttentionOp:
    """Attention that the CPU's kernel has room for."""
    found = attention_op(op)
    q, k, v = (op.inputs[name] for name in "qkv")
    dtype = "int8" if op.base == "QAttention" else _real(q, k, v)
    sizes = (shape(k)[1], shape(k)[2] // found.heads, shape(v)[2] // found.heads)
    if reason := why_not(dtype, *sizes):
        raise NotNative(reason)
    return found


def attention_op(op: FusedOp) -> AttentionOp:
    """Attention as any kernel takes it."""
    q, k, v = (op.inputs[name] for name in "qkv")
    quantized = op.base == "QAttention"
    if not quantized:
        _real(q, k, v)
    if any(len(shape(value)) != 3 for value in (q, k, v, op.output)):
        raise NotNative("native attention takes tensors of 3 dimensions")
    mask = op.inputs.get("mask")
    return AttentionOp(
        op.name,
        op.op_type,
        "attention",
        operand(q),
        name_of(op.output),
        more=tuple(operand(value) for value in (k, v, mask) if value is not None),
        batch=shape(q)[0],
        q_len=shape(q)[1],
        k_len=shape(k)[1],
        heads=int(_number(op, "heads")),
        scales=_scales(op) if quantized else AttentionScales(_number(op, "scale"), 0),
        mask_shape=() if mask is None else _mask_shape(mask),
        causal=op.mask == "Causal",
    )


def _real(*values: ir.Value) -> str:
    """The type that operands without scales have in common."""
    found = {value.dtype for value in values}
    if len(found) > 1 or not found <= set(REAL):
        names = ", ".join(str(dtype) for dtype in found)
        raise NotNative(
            f"native attention takes float32, bfloat16 or quantized tensors, not {names}"
        )
    return "float32" if found == {ir.DataType.FLOAT} else "bfloat16"


def _scales(op: FusedOp) -> AttentionScales:
    """The scales and zero points of an attention on bytes."""
    if others := [name for name in "kv" if _zero(op, name) != _SYMMETRIC]:
        raise NotNative(
            f"{others[0]} has the zero point {_zero(op, others[0])} (as stored);"
            f" native attention takes {_SYMMETRIC}: quantize k and v symmetrically"
        )
    number = {name: float(constant(op.inputs[f"{name}_scale"])) for name in "qkv"}
    return AttentionScales(
        score=float(np.float32(number["q"] * number["k"] * _number(op, "scale"))),
        q_zero=_zero(op, "q"),
        v=number["v"],
        y=1.0 if op.float_out else float(constant(op.inputs["y_scale"])),
        y_zero=None if op.float_out else _zero(op, "y"),
    )


def _mask_shape(mask: ir.Value) -> tuple[int, ...]:
    """The shape with leading ones, of 4 dimensions."""
    dims = shape(mask)
    if mask.dtype != ir.DataType.FLOAT or len(dims) > 4:
        raise NotNative("native attention takes a float32 mask of at most 4 dimensions")
    if len(dims) == 4 and dims[1] > 1 and dims[2] * dims[3] > 1:
        raise NotNative("native attention takes one mask for all heads")
    return (1,) * (4 - len(dims)) + dims


def _tokens(op: FusedOp) -> NativeOp:
    x = op.inputs["x"]
    if x.dtype not in TYPES:
        raise NotNative("native kernels take float32 and quantized tensors")
    shape(x)
    return ViewOp(op.name, op.op_type, "alias", operand(x), name_of(op.output), pixels=True)


def _split(node: ir.Node) -> ViewOp:
    """Channels of rows, or of an image."""
    x, outputs = _viewed(node), node.outputs
    axis, wanted = node.attributes.get_int("axis", 0), _channel_axis(x)
    if axis % len(shape(x)) != wanted:
        raise NotNative("splits something other than channels")
    sizes = [shape(value)[wanted] for value in outputs]
    starts = tuple(int(start) for start in np.cumsum([0, *sizes[:-1]]))
    return ViewOp(
        node.name or "",
        node.op_type,
        "alias",
        operand(x),
        name_of(outputs[0]),
        also=tuple(name_of(value) for value in outputs[1:]),
        channels=starts,
    )


def _slice(node: ir.Node) -> ViewOp:
    """Some consecutive channels."""
    x = _viewed(node)
    starts, ends = (constant(node.inputs[i]).reshape(-1) for i in (1, 2))
    axes = constant(node.inputs[3]).reshape(-1) if len(node.inputs) > 3 else np.arange(len(starts))
    steps = constant(node.inputs[4]).reshape(-1) if len(node.inputs) > 4 else np.ones(len(starts))
    dims, wanted = shape(x), _channel_axis(x)
    if [axis % len(dims) for axis in axes] != [wanted] or steps[0] != 1:
        raise NotNative("slices something other than consecutive channels")
    first, _, _ = slice(int(starts[0]), int(ends[0])).indices(dims[wanted])
    return ViewOp(
        node.name or "",
        node.op_type,
        "alias",
        operand(x),
        name_of(node.outputs[0]),
        channels=(first,),
    )


def _gather(node: ir.Node) -> ViewOp:
    """One row of each sequence: x[:, i]."""
    x = _viewed(node)
    dims, index = shape(x), constant(node.inputs[1])
    if len(dims) != 3 or node.attributes.get_int("axis", 0) % 3 != 1 or index.size != 1:
        raise NotNative("gathers something other than one row of each sequence")
    return ViewOp(
        node.name or "",
        node.op_type,
        "alias",
        operand(x),
        name_of(node.outputs[0]),
        image=int(index.reshape(())) % dims[1],
        image_step=dims[1],
    )


def _viewed(node: ir.Node) -> ir.Value:
    """What the node reads, of a type that kernels read as part of another tensor."""
    x = node.inputs[0]
    if x is None or x.dtype not in TYPES:
        raise NotNative("native kernels take float32 and quantized tensors")
    for value in node.outputs:
        shape(value)
    return x


def _channel_axis(x: ir.Value) -> int:
    """The axis of [N, C, H, W] or [..., C] that counts channels."""
    rank = len(shape(x))
    return 1 if rank == 4 else rank - 1


FUSED = {
    "LayerNorm": _layer_norm,
    "QLayerNorm": _layer_norm,
    "LayerNormQ": _layer_norm,
    "BLayerNorm": _layer_norm,
    "LayerNormB": _layer_norm,
    "Attention": _attention,
    "QAttention": _attention,
    "BAttention": _attention,
    "Tokens": _tokens,
}
STANDARD = {"Split": _split, "Slice": _slice, "Gather": _gather}
