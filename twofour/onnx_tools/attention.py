"""Finds attention in a float model, and the sums that a normalization follows.

    softmax(q k' * scale + mask) v

in any spelling: what counts is a Softmax between two products of computed operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twofour.onnx_tools.edit import constant, is_standard, operand, sole_use

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_PARTS = ("Gather", "Slice", "Squeeze", "Reshape", "Flatten")
_BETWEEN = ("Add", "Mul", "Div", "Where", "Reshape", "Unsqueeze", "Squeeze")
_DEEPEST = 6  # nodes between a product and the softmax
_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization")


@dataclass(frozen=True)
class Attention:
    """The tensors of an attention that are quantized.

    Attributes:
        operands: q, k and v, before they are moved and scaled.
        softmax: the result of the softmax, all of it between 0 and 1.
        products: of q and k, and of the softmax and v.
    """

    operands: tuple[ir.Value, ...]
    softmax: ir.Value
    products: tuple[ir.Node, ir.Node]


def find_attention(softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax, or None where there is none.

    Args:
        softmax: any node.
    """
    if not is_standard(softmax, "Softmax"):
        return None
    shares = _guarded(softmax.outputs[0])
    first = _product_before(softmax.inputs[0])
    if first is None or not sole_use(shares):
        return None
    second = shares.consumers()[0]
    if not _is_product(second) or second.inputs[0] is not shares:
        return None
    ends = [_source(value) for value in (*first.inputs, second.inputs[1])]
    operands = tuple(value for value in ends if value is not None)
    if len(operands) < 3:
        return None
    return Attention(operands, shares, (first, second))


def _guarded(shares: ir.Value) -> ir.Value:
    """What follows a softmax in place of NaN: Where(IsNaN(p), 0, p), else p itself."""
    guards = [node for node in shares.consumers() if is_standard(node, "Where")]
    if len(guards) != 1 or guards[0].inputs[2] is not shares or len(shares.uses()) != 2:
        return shares
    condition = guards[0].inputs[0]
    test = None if condition is None else condition.producer()
    return guards[0].outputs[0] if is_standard(test, "IsNaN") else shares


def is_normalized(node: ir.Node) -> bool:
    """Whether a normalization of rows reads the result of an Add.

    Such sums are the stream of floats that a transformer's blocks add to.
    """
    return is_standard(node, "Add") and _is_normalized(node.outputs[0])


def _is_normalized(value: ir.Value) -> bool:
    """Whether a normalization reads the value, or some rows of it."""
    return any(
        _normalizes(reader) or (is_standard(reader, *_PARTS) and _is_normalized(reader.outputs[0]))
        for reader in value.consumers()
    )


def _normalizes(node: ir.Node) -> bool:
    """Whether the node is a normalization of rows, or the mean that one begins with."""
    if is_standard(node, *_NORMALIZATIONS):
        return True
    x = operand(node, 0)
    if not is_standard(node, "ReduceMean") or x is None or x.shape is None:
        return False
    from_input = constant(operand(node, 1))
    axes = node.attributes.get_ints("axes", ()) if from_input is None else from_input.tolist()
    return [axis % len(x.shape) for axis in axes] == [len(x.shape) - 1]


def _is_product(node: ir.Node | None) -> bool:
    """Whether the node is a MatMul of two computed operands."""
    if node is None or not is_standard(node, "MatMul"):
        return False
    return all(value is not None and constant(value) is None for value in node.inputs)


def _product_before(value: ir.Value | None) -> ir.Node | None:
    """The product whose result, scaled and masked, is the value."""
    while value is not None and (node := value.producer()) is not None:
        if _is_product(node):
            return node
        if not is_standard(node, *_BETWEEN):
            return None
        behind = [v for v in _computed(node) if _scores(v)]
        value = behind[0] if len(behind) == 1 else None
    return None


def _scores(value: ir.Value, depth: int = 0) -> bool:
    """Whether a product is behind the value, scaled and masked at most."""
    node = value.producer()
    if node is None or depth > _DEEPEST:
        return False
    if _is_product(node):
        return True
    return is_standard(node, *_BETWEEN) and any(_scores(v, depth + 1) for v in _computed(node))


def _source(value: ir.Value | None) -> ir.Value | None:
    """The tensor whose elements the value has, before moves and factors."""
    while value is not None and (node := value.producer()) is not None:
        if is_standard(node, *_MOVES):
            value = operand(node, 0)
        elif is_standard(node, "Mul", "Div") and len(found := _computed(node)) == 1:
            value = found[0]
        else:
            break
    return value


def _computed(node: ir.Node) -> list[ir.Value]:
    """The operands that are computed, and more than one number."""
    values = [v for v in node.inputs if v is not None and constant(v) is None]
    return [v for v in values if v.shape is None or any(dim != 1 for dim in v.shape)]
