"""What is added to the scores of an attention before the softmax.

    Add(scores, mask)               mask
    Where(c, scores, low)           Where(c, 0, low)
    Where(c, low, scores)           Where(c, low, 0)

`low` is a number so far below any score that a score does not count beside it. A constant mask of
zeros is none, and one that hides exactly what comes after a query is "Causal".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.passes import reading

_DEEPEST = 6  # nodes between a product and the sum with its mask
_LOW = -1e9
"""At most this: float32 keeps no digit of a score beside it that a softmax could show."""


@dataclass(frozen=True)
class Mask:
    """A mask.

    Attributes:
        kind: "Mask", "Causal" or "".
        given: the float32 value that is added, or None.
        condition: what decides between `low` and 0, or None.
        low: the constant that hides a key.
        hides: `low` is for the keys where the condition holds, not where it fails.
    """

    kind: str = ""
    given: ir.Value | None = None
    condition: ir.Value | None = None
    low: ir.Value | None = None
    hides: bool = False

    def value(self, nodes: list[ir.Node]) -> ir.Value | None:
        """The value to add; what computes it is appended to `nodes`."""
        if self.condition is None or self.low is None:
            return self.given
        zero = reading.constant("zero", np.zeros((), np.float32))
        low = reading.constant("hidden", reading_number(self.low))
        both = (low, zero) if self.hides else (zero, low)
        node = ir.node("Where", [self.condition, *both])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = self.condition.shape
        nodes.append(node)
        return node.outputs[0]


def reading_number(value: ir.Value) -> reading.Array:
    """A constant of one number as a scalar."""
    held = reading.array(value)
    if held is None:
        raise ValueError(f"{value.name!r} is not a constant")
    return held.reshape(())


def read(node: ir.Node) -> tuple[ir.Value, Mask] | str | None:
    """The scores and the mask of an Add or Where before a softmax.

    Returns:
        A reason where the mask is none that attention takes; None where no score is masked.
    """
    if node.op_type == "Where":
        return _where(node)
    a, b = reading.data(node), reading.data(node, 1)
    scores = [value for value in (a, b) if _is_product(value)]
    if len(scores) != 1:
        return "which operand of the sum is the mask is not clear"
    mask = b if scores[0] is a else a
    size, whole = reading.shape_of(mask), reading.shape_of(scores[0])
    if size is None or whole is None or not _broadcasts(size, whole):
        return f"the mask is {reading.shape_text(mask)}, the scores {reading.shape_text(scores[0])}"
    return scores[0], _added(mask)


def _is_product(value: ir.Value, depth: int = 0) -> bool:
    """Whether a product of computed operands, scaled and masked at most, is the value."""
    node = value.producer()
    if node is None or depth > _DEEPEST:
        return False
    computed = [v for v in node.inputs if v is not None and reading.array(v) is None]
    if reading.is_op(node, "MatMul"):
        return len(computed) == 2
    if reading.is_op(node, "Mul", "Div", "Add", "Where", "Reshape", "Unsqueeze", "Squeeze"):
        return any(_is_product(v, depth + 1) for v in computed)
    return False


def _broadcasts(size: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another one."""
    pairs = zip(size[::-1], whole[::-1], strict=False)
    return len(size) <= len(whole) and all(m in (1, n) for m, n in pairs)


def _added(mask: ir.Value) -> Mask:
    """An added mask; a constant one may be nothing, or causal."""
    held = reading.array(mask)
    if held is None:
        return Mask("Mask", given=mask)
    if not held.any():
        return Mask()
    queries, keys = held.shape[-2:] if held.ndim > 1 else (1, held.size)
    if queries > 1 and held.size == queries * keys:
        table, seen = held.reshape(queries, keys), np.tri(queries, keys, dtype=bool)
        if not table[seen].any() and (table[~seen] <= _LOW).all():
            return Mask("Causal")
    return Mask("Mask", given=mask)


def _where(node: ir.Node) -> tuple[ir.Value, Mask] | str | None:
    """A choice between scores and a low number."""
    condition, yes, no = (reading.data(node, index) for index in range(3))
    for low, scores, hides in ((yes, no, True), (no, yes, False)):
        number = reading.array(low)
        if number is not None and number.size == 1 and number.dtype == np.float32:
            if float(number.reshape(())) > _LOW:
                return (
                    f"masked scores become {float(number.reshape(())):g}; expected {_LOW:g} or less"
                )
            return scores, Mask("Mask", condition=condition, low=low, hides=hides)
    return None
