"""Finds attention in a traced graph: softmax(q k' * scale + mask) v, whoever spelled it out."""

from __future__ import annotations

from dataclasses import dataclass

from twofour.train.operators import MOVES, PRODUCTS, operand
from twofour.train.trace import Call, Value

_BETWEEN = frozenset(
    "add sub mul div true_divide where masked_fill reshape view squeeze unsqueeze to float".split()
)
_DEEPEST = 6  # calls between a product and the softmax


@dataclass(frozen=True)
class Attention:
    """The tensors of an attention that are quantized.

    Attributes:
        operands: q, k and v, before they are moved and scaled.
        softmax: the result of the softmax, all of it between 0 and 1.
        product: the second product.
    """

    operands: tuple[Value, ...]
    softmax: Value
    product: Call


def find_attention(softmax: Call) -> Attention | None:
    """The attention around a softmax, or None where there is none."""
    if softmax.function != "softmax":
        return None
    shares = softmax.outputs[0]
    x = operand(softmax)
    first = None if x is None else _product_before(x)
    readers = shares.readers
    if first is None or len(readers) != 1 or shares.returned:
        return None
    second, place = readers[0]
    if not _is_product(second) or place not in ((0,), ("input",)):
        return None
    ends = [_source(value) for value in (*first.inputs.values(), list(second.inputs.values())[1])]
    return Attention(tuple(ends), shares, second)


def _is_product(call: Call | None) -> bool:
    """Whether it is a product of two computed operands."""
    if call is None or call.function not in PRODUCTS or len(call.inputs) != 2:
        return False
    return not any(value.constant for value in call.inputs.values())


def _product_before(value: Value) -> Call | None:
    """The product whose result, scaled and masked, is the value."""
    while (call := value.producer) is not None:
        if _is_product(call):
            return call
        behind = [v for v in _computed(call) if _scores(v)]
        if call.function not in _BETWEEN or len(behind) != 1:
            return None
        value = behind[0]
    return None


def _scores(value: Value, depth: int = 0) -> bool:
    """Whether a product is behind the value, scaled and masked at most."""
    call = value.producer
    if call is None or depth > _DEEPEST:
        return False
    if _is_product(call):
        return True
    return call.function in _BETWEEN and any(_scores(v, depth + 1) for v in _computed(call))


def _source(value: Value) -> Value:
    """The tensor whose elements the value has, before moves and factors."""
    while (call := value.producer) is not None:
        if call.function in MOVES:
            before = operand(call)
            if before is None:
                break
            value = before
        elif call.function in ("mul", "div") and len(found := _computed(call)) == 1:
            value = found[0]
        else:
            break
    return value


def _computed(call: Call) -> list[Value]:
    """The operands that are computed, and more than one number."""
    values = [v for v in call.inputs.values() if not v.constant]
    return [v for v in values if any(size != 1 for size in v.shape)]
