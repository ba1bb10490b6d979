"""Scheduled graph -> turns: operators with their operands on the GPU, and what is asked of kernels.

Every value has one home: the buffer that its operator writes, in the type that the engine holds
(`Types`), images channels-last. What the host gives or takes lies in buffers of its own, plain and
in the model's type; a turn of its own moves it where a kernel needs it otherwise. Views and
reshapes cost nothing where the elements lie evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.compiler.cuda import plugins, small
from twofour.compiler.cuda.products import conv_problem
from twofour.compiler.cuda.tensors import Dims, Tensor
from twofour.compiler.cuda.types import Types
from twofour.compiler.native import (
    AttentionOp,
    ConvOp,
    MapOp,
    NativeOp,
    NormOp,
    PoolOp,
    ViewOp,
    shape,
)
from twofour.compiler.native_nd import NdOp
from twofour.compiler.native_nms import NmsOp
from twofour.compiler.native_plugin import PluginOp, gpu_refusals
from twofour.compiler.native_resize import ResizeOp
from twofour.core.errors import Error
from twofour.core.plugins import Problem
from twofour.kernels.cuda.problem import REAL
from twofour.kernels.cuda.resize import tables

Array = NDArray[Any]


@dataclass(frozen=True)
class Turn:
    """One operator on the GPU, which one tactic runs.

    Attributes:
        op: as it was read; of a copy a `NativeOp` of type "Copy".
        problem: what is asked of a kernel.
        operands: role -> where it lies; what is read and what is written.
        writes: roles that are written.
        constants: role -> array that kernels may pack as they like.
        also: operators whose results only this one reads, and which it computes itself.
    """

    op: NativeOp
    problem: Any
    operands: Mapping[str, Tensor]
    writes: tuple[str, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    also: tuple[NativeOp, ...] = ()


@dataclass
class Stretch:
    """What becomes one step: turns, the plain values that they read and those that they write."""

    turns: list[Turn]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Lowering:
    """Collects the turns of one stretch of native operators."""

    def __init__(
        self,
        values: Mapping[str, ir.Value],
        types: Types,
        ops: Mapping[ir.Node, NativeOp],
        capability: int = 0,
    ) -> None:
        """Begins a stretch.

        Args:
            values: of the whole graph, by name.
            types: how values are held.
            ops: each native node, read.
            capability: of the GPU, for the tactics of plugins.
        """
        self._capability = capability
        self._values, self._types, self._ops = values, types, ops
        self._tensors: dict[str, Tensor] = {}
        self._turns: list[Turn] = []
        self._for_host: set[str] = set()

    def stretch(self, nodes: Sequence[ir.Node], wanted: Sequence[str]) -> Stretch:
        """The turns of these nodes.

        Args:
            nodes: in order.
            wanted: values that they compute and that are read outside, or are outputs of the model.
        """
        written = {name for node in nodes for name in self._ops[node].writes}
        read = dict.fromkeys(n for node in nodes for n in self._ops[node].reads)
        inputs = tuple(name for name in read if name not in written)
        self._for_host = set(wanted) - set(read)
        for name in inputs:
            self._tensors[name] = self._from_host(name)
        for node in nodes:
            self._lower(self._ops[node])
        for name in wanted:
            self._to_host(name)
        counts = [op.count for op in map(self._ops.__getitem__, nodes) if isinstance(op, NmsOp)]
        return Stretch(self._turns, inputs, (*wanted, *counts))

    def _from_host(self, name: str) -> Tensor:
        return Tensor.plain(
            input_buffer(name), self._types.plain(self._values[name]), self._dims(name)
        )

    def _dims(self, name: str) -> Dims:
        return shape(self._values[name])

    def _to_host(self, name: str) -> None:
        """A value as the host takes it, in a buffer of its own."""
        value, held = self._values[name], self._tensors[name]
        if held.buffer == output_buffer(name):
            return
        out = Tensor.plain(output_buffer(name), self._types.plain(value), self._dims(name))
        self._copy(f"{name}/out", held, out, value)

    def _copy(self, name: str, x: Tensor, y: Tensor, value: ir.Value) -> None:
        """A turn that moves a value into another form."""
        shifted = value.dtype == ir.DataType.UINT8 and (x.dtype == "uint8") != (y.dtype == "uint8")
        walk = small.copy_walk(x, y, shifted=shifted)
        op = NativeOp(name, "Copy", "copy", value.name or "", value.name or "")
        self._turns.append(Turn(op, walk, {"in0": x, "y": y}, ("y",)))

    def _lower(self, op: NativeOp) -> None:
        if op.kind == "alias":
            self._alias(op)
        elif isinstance(op, ConvOp):
            self._conv(op)
        elif isinstance(op, NmsOp):
            self._nms(op)
        elif isinstance(op, NdOp):
            self._nd(op)
        elif isinstance(op, MapOp):
            self._map(op)
        elif isinstance(op, NormOp):
            self._norm(op)
        elif isinstance(op, AttentionOp):
            self._attention(op)
        elif isinstance(op, PluginOp):
            self._plugin(op)
        else:
            self._pixels(op)

    def _pixels(self, op: NativeOp) -> None:
        """What looks at the pixels of images."""
        if isinstance(op, PoolOp):
            y = self._result(op.y)
            x = self._kernel_form(op.x)
            problem = small.pool_problem(op, x, y)
            self._turns.append(Turn(op, problem, {"x": x, "y": y}, ("y",)))
        elif isinstance(op, ResizeOp):
            y = self._result(op.y)
            x = self._kernel_form(op.x)
            both = tables(op.rows, op.columns)
            self._turns.append(Turn(op, small.resize_problem(x, y), {"x": x, "y": y}, ("y",), both))
        else:
            raise Error(f"{op.name}: no way to lower {type(op).__name__} for a GPU")

    def _result(self, name: str) -> Tensor:
        """Where a value will be written; in the host's type if nobody else reads it."""
        value = self._values[name]
        dtype = self._types.held(value)
        if name in self._for_host and dtype in REAL and self._types.plain(value) in REAL:
            dtype = self._types.plain(value)
        tensor = Tensor.held(name, dtype, self._dims(name))
        self._tensors[name] = tensor
        return tensor

    def _kernel_form(self, name: str, dtype: str = "") -> Tensor:
        """A value with its channels together, in the type that it is held in; moved if need be.

        Args:
            name: of the value.
            dtype: to read it in, if not as it is held.
        """
        found = self._tensors[name]
        wanted = dtype or self._types.held(self._values[name])
        if found.dtype == wanted and found.has_channels_together:
            return found
        key = f"{name}/{wanted}"
        if key not in self._tensors:
            tensor = Tensor.held(key, wanted, found.dims)
            self._copy(f"{name}/in", found, tensor, self._values[name])
            self._tensors[key] = tensor
        return self._tensors[key]

    def _conv(self, op: ConvOp) -> None:
        if op.dynamic:
            x = self._quantized_rows(op)
        else:
            x = self._kernel_form(op.x)
        r = None
        if op.r:
            r = self._kernel_form(op.r)
        y = self._result(op.y)
        problem, constants = conv_problem(op, x, y, r)
        operands = {"x": x, "y": y, **({"r": r} if r is not None else {})}
        if op.dynamic:
            operands["row_scale"] = self._tensors[f"{op.x}/row_scale"]
        self._turns.append(Turn(op, problem, operands, ("y",), constants))

    def _quantized_rows(self, op: ConvOp) -> Tensor:
        """The rows of a value as int8, each with its scale; several products may read the same."""
        key = f"{op.x}/rows"
        if key not in self._tensors:
            x = self._kernel_form(op.x)
            rows = Tensor.plain(key, self._types.quantized, x.dims)
            scales = Tensor.plain(f"{op.x}/row_scale", "float32", (x.extent[0],))
            self._tensors[key], self._tensors[f"{op.x}/row_scale"] = rows, scales
            layer = NativeOp(f"{op.name}/rows", "Quantize", "rows", op.x, key)
            operands = {"x": x, "y": rows, "row_scale": scales}
            problem = small.rows_problem(x, rows)
            self._turns.append(Turn(layer, problem, operands, ("y", "row_scale")))
        return self._tensors[key]

    def _map(self, op: MapOp) -> None:
        sources = [self._tensors[name] for name in (op.x, *([op.r] if op.r else ()))]
        y = self._result(op.y)
        for walk, reads in small.map_walks(op, sources, y):
            operands = {f"in{i}": sources[source] for i, source in enumerate(reads)}
            self._turns.append(Turn(op, walk, {**operands, "y": y}, ("y",)))

    def _nd(self, op: NdOp) -> None:
        tensors: list[Tensor | None] = []
        for value in op.values[: len(op.values) - len(op.writes)]:
            tensors.append(self._tensors[value.name] if value.name else None)
        tensors += [self._result(name) for name in op.writes]
        for walk, operands, constants in small.nd_walks(op, tensors):
            self._turns.append(Turn(op, walk, operands, ("y",), constants))

    def _nms(self, op: NmsOp) -> None:
        """The rows and their number, where the host takes them: nobody else reads rows."""
        boxes, scores = (self._tensors[value.name] for value in op.values[:2])
        y = Tensor.plain(output_buffer(op.y), "int64", op.most)
        count = Tensor.plain(output_buffer(op.count), "int64", (1,))
        self._tensors[op.y] = y
        operands = {"boxes": boxes, "scores": scores, "y": y, "count": count}
        problem = small.nms_problem(op, boxes, scores)
        self._turns.append(Turn(op, problem, operands, ("y", "count")))

    def _norm(self, op: NormOp) -> None:
        x = self._kernel_form(op.x)
        operands = {"x": x}
        real = self._result(op.y) if op.float_out else None
        narrow = None
        if op.quantized_out:
            narrow = self._result(op.also[0] if op.also else op.y)
        if real is not None:
            operands["y"] = real
        if narrow is not None:
            operands["q"] = narrow
        problem = small.norm_problem(op, x, real, narrow)
        constants = {"gamma": op.gamma.astype(np.float32), "beta": op.beta.astype(np.float32)}
        writes = tuple(role for role in ("y", "q") if role in operands)
        self._turns.append(Turn(op, problem, operands, writes, constants))

    def _attention(self, op: AttentionOp) -> None:
        q, k, v = (self._kernel_form(name) for name in (op.x, *op.more[:2]))
        operands = {"q": q, "k": k, "v": v}
        if op.mask_shape:
            operands["mask"] = self._in_float32(op.more[2])
        y = operands["y"] = self._result(op.y)
        problem = small.attention_problem(op, operands)
        self._turns.append(Turn(op, problem, {**operands, "y": y}, ("y",)))

    def _plugin(self, op: PluginOp) -> None:
        """An operator of a plugin; what its kernels do not take in the engine's type is float32."""
        pairs = list(zip(op.problem.operands, op.values, strict=True))
        running = {each.name: (each, value.name) for each, value in pairs if value.name}
        written = [operand.name for operand in op.problem.outputs]
        real = self._types.real
        if gpu_refusals(op.operator, self._plugin_forms(op, real), self._capability):
            real = "float32"
        tensors = {}
        for name, (operand, value) in running.items():
            dtype = plugins.held_as(operand, real, self._types.quantized)
            if name in written:
                tensors[name] = Tensor.plain(value, dtype, operand.shape)
                self._tensors[value] = tensors[name]
            else:
                tensors[name] = self._as_plugins_read(value, dtype, plugins.strided(op.operator))
        problem = plugins.placed(op.problem, tensors)
        constants = {o.name: o.constant for o, _ in pairs if o.constant is not None}
        asked = plugins.PluginProblem.of(problem, op.operator)
        self._turns.append(Turn(op, asked, tensors, tuple(written), constants))

    def _plugin_forms(self, op: PluginOp, real: str) -> Problem:
        """The problem as it would be with operands in C order, real ones in a type."""
        forms = {
            each.name: Tensor.plain(
                "", plugins.held_as(each, real, self._types.quantized), each.shape
            )
            for each, value in zip(op.problem.operands, op.values, strict=True)
            if value.name
        }
        return plugins.placed(op.problem, forms)

    def _as_plugins_read(self, name: str, dtype: str, strided: bool) -> Tensor:
        """A value of a type; in C order, unless any order will do."""
        found = self._tensors[name]
        if found.dtype == dtype and (strided or found.is_plain):
            return found
        key = f"{name}/plain {dtype}"
        if key not in self._tensors:
            tensor = Tensor.plain(key, dtype, found.dims)
            self._copy(f"{name}/in", found, tensor, self._values[name])
            self._tensors[key] = tensor
        return self._tensors[key]

    def _in_float32(self, name: str) -> Tensor:
        """A mask, plain: float16 cannot hold all that it is made of."""
        found = self._tensors[name]
        if found.dtype == "float32" and found.is_plain:
            return found
        key = f"{name}/float32"
        if key not in self._tensors:
            tensor = Tensor.plain(key, "float32", found.dims)
            self._copy(f"{name}/float32", found, tensor, self._values[name])
            self._tensors[key] = tensor
        return self._tensors[key]

    def _alias(self, op: NativeOp) -> None:
        """Other names for a value or parts of it."""
        x = self._even(op.x)
        if not isinstance(op, ViewOp):
            self._tensors[op.y] = self._reshaped(x, op.y)
        elif op.pixels:
            self._tensors[op.y] = x.pixels(self._dims(op.y))
        elif op.image_step != 1 or op.image:
            assert isinstance(op.image_step, int)
            self._tensors[op.y] = x.rows(op.image, op.image_step, self._dims(op.y))
        else:
            for name, first in zip(op.writes, op.channels, strict=True):
                self._tensors[name] = x.channels(first, self._dims(name))

    def _reshaped(self, x: Tensor, name: str) -> Tensor:
        dims = self._dims(name)
        return x if dims == x.dims else x.reshaped(dims)

    def _even(self, name: str) -> Tensor:
        """A value whose rows, or pixels, lie evenly; moved if they do not."""
        found = self._tensors[name]
        if len(found.dims) == 4:
            _, _, height, width = found.dims
            _, channel, row, pixel = found.strides
            even = (height == 1 or row == width * pixel) and (channel == 1 or found.dims[1] == 1)
        else:
            even = found.row_stride is not None
        if even:
            return found
        tensor = Tensor.held(f"{name}/even", found.dtype, found.dims)
        self._copy(f"{name}/even", found, tensor, self._values[name])
        self._tensors[name] = tensor
        return tensor


def input_buffer(name: str) -> str:
    """The buffer that the host's copy of a value arrives in."""
    return f"in:{name}"


def output_buffer(name: str) -> str:
    """The buffer that a value leaves to the host from."""
    return f"out:{name}"
