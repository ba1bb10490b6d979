"""Products and sums as exporters nest them: factors and terms in any order, constants gathered."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.passes import reading


@dataclass(frozen=True)
class Product:
    """constant * factors[0] * factors[1] * ..."""

    constant: float
    factors: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Sum:
    """value + constant."""

    value: ir.Value
    constant: float


def number(value: ir.Value) -> float | None:
    """A constant of one element."""
    contents = reading.array(value)
    return float(contents.reshape(-1)[0]) if contents is not None and contents.size == 1 else None


def product(value: ir.Value) -> Product:
    """The value as a product, through Mul, Div by a number, and Pow with a small whole exponent.

    A factor that somebody else reads too is not taken apart.
    """
    constant, factors = 1.0, [value]
    opened = True
    while opened:
        opened, before, factors = False, factors, []
        for factor in before:
            inner = _opened(factor, whole=factor is value)
            if inner is None:
                factors.append(factor)
            else:
                constant, opened = constant * inner.constant, True
                factors += inner.factors
    return Product(constant, tuple(factors))


def sum_of(value: ir.Value) -> Sum | None:
    """The value as something plus a number; None if it is no such sum."""
    node = value.producer()
    if node is None or not reading.is_op(node, "Add"):
        return None
    for index in (0, 1):
        term = number(reading.data(node, index))
        if term is not None:
            return Sum(reading.data(node, 1 - index), term)
    return None


def _opened(value: ir.Value, *, whole: bool) -> Product | None:
    """The factors of a number or of one Mul, Div or Pow; None where the value stays in one piece.

    Args:
        value: a factor.
        whole: it is the whole product: others may read it.
    """
    constant = number(value)
    if constant is not None:
        return Product(constant, ())
    node = value.producer()
    if node is None or not reading.is_op(node, "Mul", "Div", "Pow"):
        return None
    if not whole and isinstance(reading.sole_reader(value), str):
        return None
    a, b = reading.data(node), reading.data(node, 1)
    if node.op_type == "Mul":
        return Product(1.0, (a, b))
    given = number(b)
    if node.op_type == "Div":
        return Product(1.0 / given, (a,)) if given else None
    return Product(1.0, (a,) * int(given)) if given in (2.0, 3.0) else None
