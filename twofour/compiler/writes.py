"""What each layer writes and which source nodes it computes, as the plan records it.

The names are those of the source model, as far as they survive (passes/lineage.py). Scales are read
off the graph: a fused operator names those of its quantized operands and results, and an operator
that only moves bytes keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Lowered, Placed
from twofour.compiler.native import QUANTIZED, NativeOp, RowsOp, ViewOp, static_shape
from twofour.compiler.native_nms import NmsOp
from twofour.compiler.passes import lineage, movers, reading
from twofour.compiler.schedule import Schedule
from twofour.engine import Strided, TensorInfo, Write
from twofour.onnx_tools.plugins import quantizers

_MOVING_BASES = ("QMaxPool", "SlicePad", "Tokens")
_MOVING = ("Concat", "Split", "Identity")
_STORED = {"u8": "uint8"}


@dataclass(frozen=True)
class SourceNames:
    """The source model's own names.

    Attributes:
        values: of its inputs and of what its nodes compute.
        nodes: for each result of a node the node's name, or, without one, its type and result.
    """

    values: frozenset[str]
    nodes: Mapping[str, str]

    @staticmethod
    def of(graph: ir.Graph) -> SourceNames:
        """Of a graph as it was read."""
        nodes = {
            value.name: node.name or f"{node.op_type}:{value.name}"
            for node in graph
            for value in node.outputs
            if value.name
        }
        inputs = [value.name for value in graph.inputs if value.name]
        return SourceNames(frozenset((*inputs, *nodes)), nodes)

    def with_imported(self, graph: ir.Graph) -> SourceNames:
        """Knows also what the import made: the inside of a function, what a newer opset asks for.

        Such a node is part of the source's node that its result goes into.
        """
        nodes = dict(self.nodes)
        for node in reversed(list(graph)):
            readers = [use.node.outputs[0].name or "" for v in node.outputs for use in v.uses()]
            known = next((nodes[name] for name in readers if name in nodes), None)
            if known is not None:
                nodes |= {v.name: known for v in node.outputs if v.name and v.name not in nodes}
        return replace(self, nodes=nodes)

    @property
    def all(self) -> tuple[str, ...]:
        """Every node."""
        return tuple(dict.fromkeys(self.nodes.values()))

    def nodes_of(self, results: Iterable[str]) -> tuple[str, ...]:
        """The nodes that compute these values."""
        return tuple(dict.fromkeys(self.nodes.get(name, name) for name in results))

    def free(self, layers: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        """The nodes that none of these layers computes."""
        used = {name for names in layers for name in names}
        return tuple(name for name in self.all if name not in used)


@dataclass(frozen=True)
class Scale:
    """Of a quantized value: one number or one for each channel, and the zero point."""

    scale: tuple[float, ...]
    zero_point: int


class Recorder:
    """Records of the layers of one network."""

    def __init__(
        self, graph: ir.Graph, order: Schedule, lowered: Lowered, source: SourceNames
    ) -> None:
        """Reads what is needed off the fused graph."""
        self._source, self._lowered = source, lowered
        self._values = {value.name or "": value for value in graph.inputs}
        self._values |= {value.name or "": value for node in graph for value in node.outputs}
        self._scales = scales_of(graph)
        self._scheduled = {node for stretch in order.stretches for node in stretch.nodes}
        self._views: dict[str, list[ViewOp]] = {}
        for op in order.ops.values():
            if isinstance(op, ViewOp):
                self._views.setdefault(op.x, []).append(op)

    def nodes(self, placed: Placed) -> tuple[str, ...]:
        """The source nodes that a native layer computes.

        A copy computes none, nor what quantizes for a product: they are part of the product.
        """
        op = placed.op
        own = op.op_type != "Copy" and not isinstance(op, RowsOp)
        results = [self._values[name] for name in op.writes if own and name in self._values]
        made = [node for value in results if (node := value.producer()) is not None]
        behind = (before for node in dict.fromkeys(made) for before in self._joined(node, op))
        return self.nodes_of([*made, *behind])

    def nodes_of(self, nodes: Iterable[ir.Node]) -> tuple[str, ...]:
        """The source nodes that nodes of the fused graph compute."""
        return self._source.nodes_of(name for node in nodes for name in lineage.computes(node))

    def _joined(self, node: ir.Node, op: NativeOp) -> Iterator[ir.Node]:
        """What stands before a node in the graph and is done with it: moves that became one."""
        for value in node.inputs:
            before = value.producer() if value is not None and value.name not in op.reads else None
            if before is not None and before not in self._scheduled:
                yield before
                yield from self._joined(before, op)

    def writes(self, placed: Placed) -> tuple[Write, ...]:
        """What a native layer writes; rows that it quantized at run time are no value."""
        if isinstance(placed.op, RowsOp):
            return ()
        if isinstance(placed.op, NmsOp):  # what counts its rows is no value
            return (self._plain(self._lowered.plain[placed.op.y]),)
        found: list[Write] = []
        for place, name in zip(placed.writes, _written(placed.op), strict=True):
            if isinstance(place, Tensor):
                found += self._held(name, place)
            else:
                found.append(self._plain(place))
        return tuple(found)

    def outputs(self, node: ir.Node, step: Iterable[str]) -> tuple[Write, ...]:
        """What a node on ONNX Runtime leaves behind its step."""
        left = set(step)
        names = [value.name or "" for value in node.outputs]
        return tuple(self._plain(self._lowered.plain[name]) for name in names if name in left)

    def _plain(self, info: TensorInfo) -> Write:
        found = self._scales.get(info.name)
        scale, zero = (found.scale, found.zero_point) if found else ((), 0)
        return Write(info, self._stands_for(info.name), None, scale, zero)

    def _held(self, name: str, tensor: Tensor) -> Iterator[Write]:
        """A value in the arena; where it is none of the source's, the parts of it that are."""
        source = self._stands_for(name)
        views = [] if source else self._views.get(name, [])
        parts = [part for view in views for part in view.writes if self._stands_for(part)]
        if parts:
            for part in parts:
                yield from self._held(part, self._lowered.tensors[part])
            return
        dims = self._lowered.open_dims.get(name) or static_shape(self._values[name]) or ()
        kind = _STORED.get(tensor.kind, tensor.kind)
        strides = tensor.strides
        found = self._scales.get(name)
        zero = found.zero_point if found else 0
        if self._values[name].dtype == ir.DataType.INT8:
            found, zero = found or Scale((1.0,), 0), zero + 128
        yield Write(
            TensorInfo.of(name, kind, dims),
            source,
            Strided(tensor.at(), strides.image, strides.row, strides.pixel),
            found.scale if found else (),
            zero,
        )

    def _stands_for(self, name: str) -> str:
        """The source model's value, if it has that."""
        source = lineage.stands_for(self._values[name])
        return source if source in self._source.values else ""


def _written(op: NativeOp) -> tuple[str, ...]:
    """The values that an operator writes; a copy writes the one that it reads."""
    return (op.x,) if op.op_type == "Copy" else op.writes


def scales_of(graph: ir.Graph) -> dict[str, Scale]:
    """The scale of every quantized value whose scale is a constant, by name."""
    found: dict[str, Scale] = {}
    moving: list[tuple[str, str]] = []
    for node in graph:
        for value, scale, zero in _quantized(node):
            known = _scale(scale, zero)
            if known is not None and value.dtype in QUANTIZED:
                found.setdefault(value.name or "", known)
        if _moves(node):
            sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            moving += [(x.name or "", y.name or "") for x in sources if x for y in node.outputs]
    for x, y in moving:
        if x in found:
            found.setdefault(y, found[x])
    for x, y in reversed(moving):
        if y in found:
            found.setdefault(x, found[y])
    return found


def _quantized(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value | None, ir.Value | None]]:
    """Values with the scale and zero point that a node has for them."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain == "":
        value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        if value is not None:
            yield value, node.inputs[1], reading.optional(node, 2)
    elif ops.is_fused(node):
        op = ops.parse_op(node)
        inputs = op.inputs
        yield from (
            (value, inputs.get(f"{name}_scale"), inputs.get(f"{name}_zero_point"))
            for name, value in inputs.items()
            if f"{name}_zero_point" in inputs
        )
        if "y_scale" in inputs:
            yield op.outputs[-1], inputs["y_scale"], inputs["y_zero_point"]
    else:
        yield from quantizers(node)


def _scale(scale: ir.Value | None, zero: ir.Value | None) -> Scale | None:
    """The numbers, where they are constants and there is one zero point."""
    factors = reading.array(scale) if scale is not None else None
    zeros = np.zeros(1) if zero is None else reading.array(zero)
    if factors is None or zeros is None or len(set(zeros.reshape(-1).tolist())) != 1:
        return None
    numbers = factors.astype(np.float64).reshape(-1).tolist()
    return Scale(tuple(numbers[:1] if len(set(numbers)) == 1 else numbers), int(zeros.flat[0]))


def _moves(node: ir.Node) -> bool:
    """Whether the results have the scale of the first operand, or of all."""
    if ops.is_fused(node):
        return ops.parse_type(node.op_type).base in _MOVING_BASES
    return movers.is_mover(node) or reading.is_op(node, *_MOVING)
