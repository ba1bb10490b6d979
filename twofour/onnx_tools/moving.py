"""What only moves data, and which tensors share a scale because of it.

A tensor whose values were all moved from others needs no rounding of its own if it has their scale.
Several tensors that are joined get one scale that holds the values of each. A Gather is not among
them: of many tokens it takes one, whose values have a range of their own, and where channels are
shuffled it would give all blocks of a stage one scale (FastestDet's cosine falls from 0.937 to
0.851 by that).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from twofour.onnx_tools.edit import constant, is_standard, operand

MOVERS = (
    "Slice",
    "Pad",
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Resize",
    "Expand",
    "Tile",
)
JOINERS = ("Concat", "Split")


def is_mover(node: ir.Node | None) -> bool:
    """Whether each output value is one of input 0, or zero."""
    if node is None or not is_standard(node, *MOVERS) or len(node.outputs) != 1:
        return False
    if node.op_type == "Resize":
        form = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        return nearest and form != "tf_crop_and_resize"
    if node.op_type != "Pad":
        return True
    fill = operand(node, 2)
    fill_array = constant(fill)
    return fill is None or (fill_array is not None and not fill_array.any())


def moved_from(node: ir.Node | None) -> list[ir.Value]:
    """The tensors that all values of the node's results were moved from; none if it computes.

    A Concat with a constant computes: the constant has no scale to share.
    """
    if node is None or not (is_mover(node) or is_standard(node, *JOINERS)):
        return []
    sources = list(node.inputs) if node.op_type == "Concat" else [operand(node, 0)]
    found = [value for value in sources if value is not None and constant(value) is None]
    return found if len(found) == len(sources) else []


@dataclass
class Scales:
    """Tensors that are quantized, in groups of one scale.

    Attributes:
        excluded: nodes that share no scale.
        floats: tensors that stay float whatever reads them.
        source_of: tensor -> the one that its group is named after.
        origins: that one -> the tensors of the group that are computed, not moved: their ranges
            together are the group's.
    """

    excluded: frozenset[ir.Node]
    floats: frozenset[ir.Value] = frozenset()
    source_of: dict[ir.Value, ir.Value] = field(default_factory=dict)
    origins: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)

    def take(self, value: ir.Value) -> None:
        """Adds a tensor, and what its data is moved from, however far."""
        if value in self.source_of or value in self.floats:
            return
        producer = value.producer()
        found = [] if producer in self.excluded else moved_from(producer)
        if self.floats.intersection(found):
            found = []
        for source in found:
            self.take(source)
        if not found:
            self.alone(value)
            return
        first = self.source_of[found[0]]
        for source in found[1:]:
            self._join(first, self.source_of[source])
        self.source_of[value] = first

    def alone(self, value: ir.Value) -> None:
        """Adds a tensor with a scale of its own."""
        if value not in self.source_of and value not in self.floats:
            self.source_of[value] = value
            self.origins[value] = [value]

    def share(self, values: list[ir.Value]) -> None:
        """Gives those of the tensors that are in a group one scale."""
        groups = [self.source_of[value] for value in values if value in self.source_of]
        for other in groups[1:]:
            self._join(self.source_of[groups[0]], self.source_of[other])

    def _join(self, first: ir.Value, other: ir.Value) -> None:
        """Makes one group of two."""
        if first is other:
            return
        self.origins[first] += self.origins.pop(other)
        for value, source in self.source_of.items():
            if source is other:
                self.source_of[value] = first
