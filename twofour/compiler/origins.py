"""Who wrote what each layer reads: the edges of the graph that the engine's layers are.

Values are told apart by where they lie. A plain array has one writer. Bytes in the arena may have
several, where a Concat is nothing but its parts written side by side, and one value may be read as
parts: so what counts is which layers wrote channels that a layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import NativeOp
from twofour.compiler.native_nd import NdOp
from twofour.engine import Read, TensorInfo
from twofour.onnx_tools.edit import reads

MODEL = -1
"""Stands for the layer that writes the model's inputs."""


class Origins:
    """Of one network, whose layers are told in the order in which they run."""

    def __init__(self, graph: ir.Graph) -> None:
        """Knows the inputs of the network."""
        self._plain = {value.name or "": MODEL for value in graph.inputs}
        self._held: dict[str, dict[str, tuple[Tensor, int]]] = {}

    def of_native(self, placed: Placed, layer: int) -> tuple[Read, ...]:
        """What a native layer reads; what it writes is read from `layer` from now on."""
        pairs = zip(placed.op.reads, placed.reads, strict=True)
        used = [(name, place) for name, place in pairs if _uses(placed.op, name)]
        found = [Read(origin, name) for name, place in used for origin in self._writers(place)]
        for place in placed.writes:
            if isinstance(place, TensorInfo):
                self._plain[place.name] = layer
                continue
            written = self._held.setdefault(place.root.name, {})
            if place.name in written:  # the second of two kernels that make it together
                found.append(Read(written[place.name][1], place.name))
            written[place.name] = place, layer
        return tuple(dict.fromkeys(found))

    def of_node(self, node: ir.Node, layer: int) -> tuple[Read, ...]:
        """The same of a node on ONNX Runtime."""
        names = [value.name or "" for value in reads(node)]
        found = [Read(self._plain[name], name) for name in names if name in self._plain]
        self._plain |= {value.name: layer for value in node.outputs if value.name}
        return tuple(dict.fromkeys(found))

    def _writers(self, place: Place) -> Iterator[int]:
        """The layers that wrote what lies in a place."""
        if isinstance(place, TensorInfo):
            if place.name in self._plain:
                yield self._plain[place.name]
            return
        written = self._held.get(place.root.name, {})
        part: Tensor | None = place
        while part is not None and part.parent is not None:  # a part that is a value of its own
            if part.name in written:
                yield written[part.name][1]
                return
            part = part.parent
        yield from (layer for tensor, layer in written.values() if _meet(tensor, place))


def _uses(op: NativeOp, name: str) -> bool:
    """Whether an operator reads a value; of a Concat only what does not lie in place already."""
    if not isinstance(op, NdOp):
        return True
    return any(op.values[look.value].name == name for part in op.parts for look in part.inputs)


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two parts of a tensor have channels in common; as far as is known."""
    first, second = (part.channel_in(one.root) for part in (one, other))
    if first is None or second is None:
        return True
    return first < second + other.channels and second < first + one.channels
