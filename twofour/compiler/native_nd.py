"""Small operators over tensors of any rank: what a node means as walks over its operands.

An operator is one or several parts. A part walks `dims` once; for each operand a `Look` says which
element a turn touches:

    element = start + sum of index[i] * step[i] along axis[i] of the value, over the axes i of dims

So a broadcast axis has no axis of the value, a transpose names them in another order, a slice has a
start and steps, a concatenation writes each input at a start of its own. Where the elements lie is
decided later (emit_nd.py): no layout is converted for these operators, and constants are read where
the engine keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import Array, NativeOp, NotNative, constant, name_of, shape
from twofour.core.sizes import Count, most
from twofour.kernels.cpu.nd_scalar import NUMBERS, Expression

KINDS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
    ir.DataType.BFLOAT16: "bfloat16",
}
"""Types that small operators take, and their numpy names; bfloat16 is only copied."""

BROADCAST = (-1, 0)
"""The entry of `Look.axes` that does not move."""


@dataclass(frozen=True)
class NdValue:
    """An operand.

    Attributes:
        name: of the value; "" for a constant.
        dims: its shape.
        kind: numpy name of its type.
        constant: its elements, or None where it is computed while running; where dimensions are
            open, those of the largest shape.
    """

    name: str
    dims: tuple[Count, ...]
    kind: str
    constant: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in numbers; where dimensions are open, the largest."""
        return tuple(most(dim) for dim in self.dims)


@dataclass(frozen=True)
class Look:
    """Which element of an operand a turn touches.

    Attributes:
        value: which operand, see `NdOp.values`.
        axes: for each axis of the walk (axis of the value, elements a step), or BROADCAST.
        start: index of the first element, one number for each axis of the value.
    """

    value: int
    axes: tuple[tuple[int, Count], ...]
    start: tuple[Count, ...]


@dataclass(frozen=True)
class Part:
    """One walk.

    Attributes:
        op: as kernels/cpu/nd.py has it.
        dims: turns along each axis.
        y: what is written.
        inputs: what is read.
        scalars: constants of the operation.
        rows_axis: of "gather", the axis of inputs[0] that inputs[1] chooses from.
        steps: of "chain", what is computed of the inputs, one after the other.
    """

    op: str
    dims: tuple[Count, ...]
    y: Look
    inputs: tuple[Look, ...] = ()
    scalars: tuple[float, ...] = ()
    rows_axis: int = -1
    steps: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class NdOp(NativeOp):
    """A small operator.

    Attributes:
        values: operands: those it reads, then those it writes.
        parts: its walks, whose results do not overlap.
    """

    values: tuple[NdValue, ...] = ()
    parts: tuple[Part, ...] = ()


def copy_op(layer: str, value: ir.Value, dims: tuple[Count, ...]) -> NdOp:
    """A copy of a value from one form to the other.

    Args:
        layer: name of the layer.
        value: the value.
        dims: its shape, of which some dimensions may be open.
    """
    x = NdValue(name_of(value), dims, _kind_of(value))
    y = replace(x, name=f"{x.name}/copy")
    part = Part("copy", dims, whole(1, y), (whole(0, x),))
    return NdOp(layer, "Copy", "nd", x.name, y.name, values=(x, y), parts=(part,))


def value_of(value: ir.Value | None) -> NdValue:
    """An operand of a type and shape that small operators take."""
    if value is None:
        raise NotNative("an input is missing")
    dims, kind = shape(value), _kind_of(value)
    if value.const_value is not None:
        return NdValue("", dims, kind, constant(value))
    return NdValue(name_of(value), dims, kind)


def _kind_of(value: ir.Value) -> str:
    kind = KINDS.get(value.dtype) if value.dtype is not None else None
    if kind is None:
        known = ", ".join(KINDS.values())
        raise NotNative(f"small native operators take {known}, not {value.dtype}")
    return kind


def nd_op(node: ir.Node, inputs: Sequence[NdValue], parts: Sequence[Part]) -> NdOp:
    """The operator of a node.

    Args:
        node: the node; all its outputs are written.
        inputs: the operands it reads.
        parts: its walks; operand len(inputs) is the first output.
    """
    outputs = [value_of(value) for value in node.outputs]
    reads = [value.name for value in inputs if value.name]
    if not reads:
        raise NotNative("nothing it reads is computed while running")
    halves = any(value.kind == "bfloat16" for value in (*inputs, *outputs))
    if halves and not all(part.op == "copy" for part in parts):
        raise NotNative("small native operators only copy bfloat16")
    return NdOp(
        node.name or "",
        node.op_type,
        "nd",
        reads[0],
        outputs[0].name,
        more=tuple(reads[1:]),
        also=tuple(value.name for value in outputs[1:]),
        values=(*inputs, *outputs),
        parts=tuple(parts),
    )


def whole(index: int, value: NdValue) -> Look:
    """A look that walks a value in its own order."""
    return Look(index, tuple((axis, 1) for axis in range(len(value.dims))), (0,) * len(value.dims))


def spread(index: int, value: NdValue, dims: tuple[int, ...]) -> Look:
    """A look that repeats a value as numpy broadcasts it to `dims`."""
    missing = len(dims) - len(value.dims)
    axes = [
        (axis - missing, 1) if axis >= missing and value.shape[axis - missing] != 1 else BROADCAST
        for axis in range(len(dims))
    ]
    return Look(index, tuple(axes), (0,) * len(value.dims))


def elementwise(
    node: ir.Node, op: str, inputs: Sequence[NdValue], scalars: Sequence[float] = ()
) -> NdOp:
    """An operator on each element, its inputs broadcast."""
    y = value_of(node.outputs[0])
    looks = [spread(i, value, y.shape) for i, value in enumerate(inputs)]
    part = Part(op, y.dims, whole(len(inputs), y), tuple(looks), tuple(scalars))
    return nd_op(node, inputs, [part])


def _plainly(op: str, *kinds: str) -> Callable[[ir.Node], NdOp]:
    """A reader of operators that take any number of inputs of one of these kinds."""

    def read(node: ir.Node) -> NdOp:
        inputs = [value_of(value) for value in node.inputs]
        require_kinds(inputs, kinds)
        return elementwise(node, op, inputs)

    return read


def require_kinds(values: Sequence[NdValue], kinds: Sequence[str]) -> None:
    """Refuses operands of other kinds."""
    for value in values:
        if value.kind not in kinds:
            raise NotNative(f"its native kernel takes {', '.join(kinds)}, not {value.kind}")


def scalar_of(value: ir.Value | None, default: float) -> float:
    """The number in an optional constant input."""
    if value is None:
        return default
    number: float = constant(value).reshape(-1)[0].item()
    return number


_POWERS = {1.0: "copy", 2.0: "square", 0.5: "sqrt", -1.0: "reciprocal"}


def _power(node: ir.Node) -> NdOp:
    """A constant power; 0.5 is the square root, so of minus infinity NaN."""
    x, exponent = value_of(node.inputs[0]), constant(node.inputs[1])
    require_kinds([x], ["float32"])
    op = _POWERS.get(float(exponent.reshape(-1)[0])) if exponent.size == 1 else None
    if op is None:
        raise NotNative(f"native powers are {', '.join(map(str, _POWERS))}")
    return elementwise(node, op, [x])


def _where(node: ir.Node) -> NdOp:
    values = [value_of(value) for value in node.inputs]
    require_kinds(values[:1], ["bool"])
    return elementwise(node, "where", values)


def _clip(node: ir.Node) -> NdOp:
    x, *limits = node.inputs
    value = value_of(x)
    require_kinds([value], NUMBERS)
    widest: tuple[float, float] = (-np.inf, np.inf)
    if value.kind != "float32":
        widest = int(np.iinfo(value.kind).min), int(np.iinfo(value.kind).max)
    given = [*limits, None, None][:2]
    found = [scalar_of(limit, edge) for limit, edge in zip(given, widest, strict=True)]
    return elementwise(node, "clip", [value], found)


def _gelu(node: ir.Node) -> NdOp:
    value = value_of(node.inputs[0])
    require_kinds([value], ["float32"])
    form = node.attributes.get_string("approximate", "none")
    return elementwise(node, "gelu" if form == "none" else "gelu_tanh", [value])


def _attributed(op: str, **defaults: float) -> Callable[[ir.Node], NdOp]:
    """A reader of float operators with attributes."""

    def read(node: ir.Node) -> NdOp:
        value = value_of(node.inputs[0])
        require_kinds([value], ["float32"])
        numbers = [node.attributes.get_float(name, usual) for name, usual in defaults.items()]
        return elementwise(node, op, [value], [float(np.float32(n or 0.0)) for n in numbers])

    return read


_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def _elu(node: ir.Node) -> NdOp:
    """Elu, Celu of alpha 1 and Selu: x times one number above zero, exp(x) - 1 below."""
    value = value_of(node.inputs[0])
    require_kinds([value], ["float32"])
    scaled = node.op_type == "Selu"
    alpha = node.attributes.get_float("alpha", _SELU_ALPHA if scaled else 1.0) or 0.0
    if node.op_type == "Celu" and alpha != 1:
        raise NotNative("its native kernel takes alpha 1")
    gamma = node.attributes.get_float("gamma", _SELU_GAMMA if scaled else 1.0) or 0.0
    return elementwise(node, "elu", [value], [alpha * gamma, gamma])


def _first(op: str) -> Callable[[ir.Node], NdOp]:
    """A reader of operators whose further inputs say only what the shapes say, too."""
    return lambda node: elementwise(node, op, [value_of(node.inputs[0])])


_FLOAT = ("float32",)
_BOOL = ("bool",)

READERS: dict[str, Callable[[ir.Node], NdOp]] = {
    **{name: _plainly(name.lower(), *NUMBERS)
       for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Neg", "Abs", "Relu", "Sign",
                    "Less", "LessOrEqual", "Greater", "GreaterOrEqual")},
    **{name: _plainly(name.lower(), *_FLOAT)
       for name in ("Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "Floor", "Ceil",
                    "IsNaN", "Softplus", "Softsign", "PRelu")},
    **{name: _plainly(name.lower(), *_BOOL) for name in ("And", "Or", "Xor")},
    "Sum": _plainly("add", *_FLOAT),
    "Equal": _plainly("equal", *NUMBERS, *_BOOL),
    "Not": _plainly("xor", *_BOOL),
    "HardSwish": _plainly("hard_swish", *_FLOAT),
    "HardSigmoid": _attributed("hard_sigmoid", alpha=0.2, beta=0.5),
    **dict.fromkeys(("Elu", "Celu", "Selu"), _elu),
    "LeakyRelu": _attributed("leaky", alpha=0.01),
    "Gelu": _gelu,
    "Clip": _clip,
    "Pow": _power,
    "Where": _where,
    "Identity": _first("copy"),
    "Expand": _first("copy"),
    "Cast": _first("cast"),
}  # fmt: skip
