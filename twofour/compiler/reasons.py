"""Why a layer is not integer, and who caused a conversion: what only the graph tells, at build.

A conversion computes nothing that the model means: a copy from one layout to the other, a Cast
between float32 and bfloat16, a quantizer by itself, a Transpose that no kernel took over. It is
there because of who writes the value and who reads it, and that is what is said.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.lower import Placed
from twofour.compiler.native import QUANTIZED, NativeOp
from twofour.compiler.passes import fuse_integer
from twofour.compiler.passes.pipeline import Fused
from twofour.compiler.schedule import Schedule
from twofour.engine import Layer, TensorInfo
from twofour.onnx_tools.edit import reads

NO_BF16 = "not bfloat16: not asked for (--bf16)"
NO_Q = "not INT8: the model has no Q/DQ (twofour quantize writes it)"
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "QActivation", "QActivationF")
_NAMED = 3  # readers that a message names


class Reasons:
    """Of one network.

    Args:
        fused: the graph after the passes.
        order: its schedule.
        bf16: whether bfloat16 was asked for.
    """

    def __init__(self, fused: Fused, order: Schedule, bf16: bool) -> None:
        """Reads what is needed off the graph."""
        graph = fused.model.graph
        self._order, self._bf16 = order, bf16
        self._values = {v.name: v for v in (*graph.inputs, *(v for n in graph for v in n.outputs))}
        self._refused = {r.node: r.reason for r in fused.refusals if r.rule == fuse_integer.NAME}
        self._quantized = any(v.dtype in QUANTIZED for v in self._values.values())
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node in graph:
            for value in dict.fromkeys(reads(node)):
                self._readers.setdefault(value, []).append(node)

    def notes(self, placed: Placed, layer: Layer) -> tuple[str, ...]:
        """Why a native layer is float32 or bfloat16; nothing where it is integer."""
        if layer.precision not in ("float32", "bfloat16") or self.cause(placed):
            return ()
        found = [self._not_integer(placed.op, product=bool(layer.pattern))]
        if layer.pattern and layer.precision == "float32" and not self._bf16:
            found.append(NO_BF16)
        return tuple(found)

    def _not_integer(self, op: NativeOp, *, product: bool) -> str:
        if not self._quantized:
            return NO_Q
        if any(self._values[name].dtype in QUANTIZED for name in op.also):
            return "writes float32 for a sum, and INT8 for what multiplies it"
        if op.name in self._refused:
            return f"not INT8: {self._refused[op.name]}"
        x = self._values.get(op.x)
        if x is not None and _is_dequantized(x):
            return f"not INT8: {op.op_type} has no integer kernel; its input is dequantized for it"
        if x is not None and x.dtype in QUANTIZED:
            return "its input is INT8, its result is read as float"
        if not product:
            return "float32 as in the model: no Q/DQ around it"
        return f"not INT8: no Q/DQ on its input {op.x!r}"

    def cause(self, placed: Placed) -> str:
        """Who made a conversion necessary; "" for a layer that is none."""
        op = placed.op
        value, result = self._values.get(op.x), self._values.get(op.y)
        if value is None or result is None:
            return ""
        if op.op_type == "Copy":
            return self._copied(placed, value)
        if op.op_type in _QUANTIZERS:
            return f"{self._written(value)}; {self._read(result)}"
        if op.op_type == "Cast":
            if {value.dtype, result.dtype} != {ir.DataType.FLOAT, ir.DataType.BFLOAT16}:
                return ""
            return f"{self._written(value)}; {self._read(result)}"
        if "Transpose" in op.op_type:
            return f"the model's own: {self._written(value)}; {self._read(result)}"
        return ""

    def _copied(self, placed: Placed, value: ir.Value) -> str:
        """Of a copy from one layout to the other."""
        if isinstance(placed.x, TensorInfo):
            return f"{self._written(value)}; {self._read(value, native=True)} channels-last"
        if isinstance(placed.y, TensorInfo):
            return self._read(value, native=False)
        return f"its pixels become rows, and lie beside the padding of a convolution: {placed.op.y}"

    def _written(self, value: ir.Value) -> str:
        """Who writes a value, and as what."""
        kind = _kind(value)
        node = value.producer()
        if node is None:
            dims = len(value.shape) if value.shape is not None else 0
            return f"the model's input {value.name!r} is {'NCHW ' * (dims == 4)}{kind}"
        if node in self._order.reasons:
            return f"ONNX Runtime step with {node.op_type} writes {kind}"
        return f"{node.name or node.op_type} writes {kind}"

    def _read(self, value: ir.Value, native: bool | None = None) -> str:
        """Who reads a value, and as what.

        Args:
            value: it.
            native: only kernels, or only ONNX Runtime; None for both.
        """
        kind = _kind(value)
        readers = list(dict.fromkeys(self._through_aliases(value)))
        found = []
        if native is not True:
            outside = [node.op_type for node in readers if node in self._order.reasons]
            if outside:
                found.append(f"ONNX Runtime step with {_list(outside)} reads {kind}")
            if self._is_output(value):
                found.append(f"output {value.name!r} of the model is {kind}")
        if native is not False:
            inside = [n.name or n.op_type for n in readers if n not in self._order.reasons]
            if inside:
                found.append(f"{_list(inside)} read{'s' * (len(inside) == 1)} {kind}")
        return ", ".join(found) or f"nobody else reads {kind}"

    def _through_aliases(self, value: ir.Value) -> Iterator[ir.Node]:
        """Who reads a value under this or another name."""
        for node in self._readers.get(value, []):
            op = self._order.ops.get(node)
            if op is not None and op.kind == "alias":
                for result in node.outputs:
                    yield from self._through_aliases(result)
            else:
                yield node

    def _is_output(self, value: ir.Value) -> bool:
        aliases = [
            result
            for node in self._readers.get(value, [])
            if (op := self._order.ops.get(node)) is not None and op.kind == "alias"
            for result in node.outputs
        ]
        return value.is_graph_output() or any(self._is_output(alias) for alias in aliases)


def _is_dequantized(value: ir.Value) -> bool:
    """Whether it comes from bytes by a node of its own."""
    node = value.producer()
    if node is None:
        return False
    dequantizer = node.op_type == "DequantizeLinear" and node.domain == ""
    return dequantizer or (ops.is_fused(node) and node.op_type == "QActivationF")


def _kind(value: ir.Value) -> str:
    """The type in words."""
    if value.dtype is None:
        return "a value of unknown type"
    return {"FLOAT": "float32", "BFLOAT16": "bfloat16"}.get(
        value.dtype.name, value.dtype.name.lower()
    )


def _list(names: list[str]) -> str:
    """A few names, and how many more."""
    shown, more = list(dict.fromkeys(names)), 0
    if len(shown) > _NAMED:
        more = len(shown) - _NAMED
        shown = shown[:_NAMED]
    return ", ".join(shown) + (f" and {more} more" if more else "")
