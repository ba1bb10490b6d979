"""What each turn computes of the source model and what it writes where, as the plan records it.

Values in float8 are not recorded: who reads them back would need their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from twofour.compiler.cuda.graphs import Network
from twofour.compiler.cuda.lower import Turn, output_buffer
from twofour.compiler.cuda.tensors import Tensor
from twofour.compiler.passes import lineage
from twofour.compiler.writes import Scale, scales_of
from twofour.core.plan import Strided
from twofour.engine import TensorInfo, Write

_NO_VALUES = ("Copy", "Quantize")
_READ_BACK = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Recorder:
    """Records of the layers of one network."""

    network: Network

    @cached_property
    def _values(self) -> Mapping[str, ir.Value]:
        graph = self.network.fused.model.graph
        found = {value.name or "": value for value in graph.inputs}
        return found | {value.name or "": value for node in graph for value in node.outputs}

    @cached_property
    def _scales(self) -> Mapping[str, Scale]:
        return scales_of(self.network.fused.model.graph)

    def nodes(self, turn: Turn) -> tuple[str, ...]:
        """The nodes of the source model that a turn computes; one that moves computes none."""
        found: list[str] = []
        for op in (*turn.also, turn.op):
            if op.op_type in _NO_VALUES or op.y not in self._values:
                continue
            node = self._values[op.y].producer()
            found += () if node is None else self.nodes_of(node)
        return tuple(dict.fromkeys(found))

    def nodes_of(self, node: ir.Node) -> tuple[str, ...]:
        """The nodes of the source model that a node of the fused graph computes."""
        return self.network.names.nodes_of(lineage.computes(node))

    def writes(self, turn: Turn, offsets: Mapping[str, int]) -> tuple[Write, ...]:
        """The values that a turn writes.

        Args:
            turn: the turn.
            offsets: of each buffer in the arena.
        """
        if turn.op.op_type in _NO_VALUES:
            return ()
        found = []
        for role, name in zip(turn.writes, _names(turn), strict=False):
            tensor = turn.operands[role]
            at = _where(tensor, offsets)
            if name in self._values and at is not None:
                scale = self._scales.get(name) if tensor.dtype == "int8" else None
                info = TensorInfo(name, tensor.dtype, tensor.dims)
                values = scale.scale if scale else ()
                zero = _zero(scale, self._values[name]) if scale else 0
                found.append(Write(info, self._source(name), at, values, zero))
        return tuple(found)

    def _source(self, name: str) -> str:
        source = lineage.stands_for(self._values[name])
        return source if source in self.network.names.values else ""


def _names(turn: Turn) -> tuple[str, ...]:
    """The values in the order of `Turn.writes`."""
    own = turn.op.writes
    if len(turn.writes) == 1 and len(own) > 1:  # one walk of several: each writes its own
        buffer = turn.operands[turn.writes[0]].buffer
        return tuple(name for name in own if buffer in (name, output_buffer(name)))
    return own


def _where(tensor: Tensor, offsets: Mapping[str, int]) -> Strided | None:
    """Where it lies; None where it is no image and no rows, or of a type that is not read back."""
    if tensor.dtype not in _READ_BACK or not tensor.has_channels_together:
        return None
    view, size = tensor.view, tensor.item_bytes
    begin = offsets[tensor.buffer] + tensor.offset_bytes
    return Strided(begin, view.image * size, view.row * size, view.pixel * size)


def _zero(scale: Scale, value: ir.Value) -> int:
    """The zero point as held: uint8 is held as int8, 128 less."""
    return scale.zero_point - (128 if value.dtype == ir.DataType.UINT8 else 0)
