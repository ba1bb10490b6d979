"""Sizes that are known when a network runs: polynomials with whole factors in a few symbols.

A dimension that a profile leaves open is a symbol, such as the batch or the length of a text. What
follows from it (rows of a matrix, bytes from one row to the next) is a `Size`: a sum of terms, each
a factor times a product of powers of the symbols. A size that does not depend on any symbol is an
int, so the type of both is `Count`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Symbol:
    """An open dimension and its range.

    Attributes:
        name: as the model has it, or "input[axis]".
        least: smallest value, at least 1.
        usual: the value that kernels are timed with.
        most: largest value.
    """

    name: str
    least: int
    usual: int
    most: int


@dataclass(frozen=True)
class Size:
    """A polynomial in the symbols of a profile.

    Attributes:
        terms: for each term its factor, then the power of each symbol; sorted, no two with equal
            powers, no factor 0.
        usual: its value where every symbol has its usual one.
        most: its value where every symbol has its largest one.
    """

    terms: tuple[tuple[int, ...], ...]
    usual: int = field(compare=False)
    most: int = field(compare=False)

    def at(self, values: Sequence[int]) -> int:
        """The value where the symbols have these."""
        return sum(
            factor * math.prod(v**p for v, p in zip(values, powers, strict=True))
            for factor, *powers in self.terms
        )

    def __add__(self, other: Count) -> Count:
        """The sum."""
        if isinstance(other, int):
            other = Size(((other, *(0 for _ in self.terms[0][1:])),), other, other)
        return _simplest(
            [*self.terms, *other.terms], self.usual + other.usual, self.most + other.most
        )

    __radd__ = __add__

    def __mul__(self, other: Count) -> Count:
        """The product."""
        if isinstance(other, int):
            terms = [(factor * other, *powers) for factor, *powers in self.terms]
            return _simplest(terms, self.usual * other, self.most * other)
        terms = [
            (a * b, *(p + q for p, q in zip(ps, qs, strict=True)))
            for a, *ps in self.terms
            for b, *qs in other.terms
        ]
        return _simplest(terms, self.usual * other.usual, self.most * other.most)

    __rmul__ = __mul__


Count = int | Size


def symbol_size(symbols: Sequence[Symbol], index: int) -> Size:
    """The symbol of that index as a size."""
    powers = tuple(int(i == index) for i in range(len(symbols)))
    return Size(((1, *powers),), symbols[index].usual, symbols[index].most)


def usual(count: Count) -> int:
    """The value that kernels are timed with."""
    return count if isinstance(count, int) else count.usual


def most(count: Count) -> int:
    """The largest value."""
    return count if isinstance(count, int) else count.most


def value(count: Count, values: Sequence[int]) -> int:
    """The value where the symbols have these."""
    return count if isinstance(count, int) else count.at(values)


def open_size(count: Count) -> Size | None:
    """The size if it is open, else None."""
    return None if isinstance(count, int) else count


def product(counts: Sequence[Count]) -> Count:
    """Of all; 1 of none."""
    total: Count = 1
    for count in counts:
        total = total * count
    return total


def written(size: Size, symbols: Sequence[Symbol]) -> str:
    """The polynomial for people, as in "2*batch*length + 1"."""
    parts = []
    for factor, *powers in reversed(size.terms):
        names = [s.name for s, power in zip(symbols, powers, strict=True) for _ in range(power)]
        parts.append("*".join(names if factor == 1 and names else [str(factor), *names]))
    return " + ".join(parts)


def _simplest(terms: Sequence[tuple[int, ...]], usual_value: int, most_value: int) -> Count:
    """Terms of equal powers joined; an int where no symbol is left."""
    factors: dict[tuple[int, ...], int] = {}
    for factor, *powers in terms:
        factors[tuple(powers)] = factors.get(tuple(powers), 0) + factor
    kept = sorted((powers, factor) for powers, factor in factors.items() if factor)
    if all(not any(powers) for powers, _ in kept):
        return sum(factor for _, factor in kept)
    return Size(tuple((factor, *powers) for powers, factor in kept), usual_value, most_value)
