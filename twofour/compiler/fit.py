"""Numbers seen at several shapes -> the size that they are, as a polynomial in the symbols.

What a network's numbers are at some shape tells only the compiler itself, by compiling for it. So a
graph is read at a few shapes, and every number in it is fitted: one that is the same at all of them
is a constant, others are products

    c * (s_1 + d_1) * (s_2 + d_2) * ...

over the symbols they depend on. The largest shape and one more for each symbol determine c and d; a
last shape, where all symbols differ, has to confirm it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from twofour.core.sizes import Count, Size, Symbol, symbol_size

_SMALLEST = 2  # at 1 a dimension may be taken for one to broadcast


class Irregular(Exception):
    """Numbers that are no such product; the message shows them."""


@dataclass(frozen=True)
class Fit:
    """The shapes at which a graph is read.

    Attributes:
        symbols: open dimensions.
        points: values of the symbols: the largest; for each symbol that with another one for it;
            and one where all differ.
    """

    symbols: tuple[Symbol, ...]
    points: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(symbols: Sequence[Symbol]) -> Fit:
        """Points within the ranges where these are wide enough."""
        largest = tuple(symbol.most for symbol in symbols)
        others = [
            tuple(_near(n, 1) if i == at else n for i, n in enumerate(largest))
            for at in range(len(symbols))
        ]
        return Fit(tuple(symbols), (largest, *others, tuple(_near(n, 2) for n in largest)))

    def count(self, values: Sequence[int]) -> Count:
        """The size that is values[i] at point i.

        Raises:
            Irregular: it is not of the form above.
        """
        largest, (first, *varied, last) = self.points[0], values
        if len(set(values)) == 1:
            return first
        total: Count = 1
        scale = Fraction(first)
        for index, (value, point) in enumerate(zip(varied, self.points[1:], strict=False)):
            if value == first:
                continue
            slope = Fraction(first - value, largest[index] - point[index])
            root = first / slope - largest[index]  # first = slope * (largest + root)
            if root.denominator > 1 or first == 0:
                raise Irregular(f"{list(values)} at {list(self.points)}")
            total = total * (symbol_size(self.symbols, index) + int(root))
            scale /= largest[index] + root
        found = _scaled(total, scale)
        if found is None or _at(found, self.points[-1]) != last:
            raise Irregular(f"{list(values)} at {list(self.points)}")
        return found


def _near(number: int, distance: int) -> int:
    """Another number, smaller if it can be."""
    return number - distance if number - distance >= _SMALLEST else number + distance


def _scaled(total: Count, scale: Fraction) -> Count | None:
    """Total * scale, None where that has no whole factors."""
    if isinstance(total, int):
        return None
    if any((scale * factor).denominator > 1 for factor, *_ in total.terms):
        return None
    terms = tuple((int(scale * factor), *powers) for factor, *powers in total.terms)
    return Size(terms, math.floor(scale * total.usual), math.floor(scale * total.most))


def _at(count: Count, point: Sequence[int]) -> int:
    return count if isinstance(count, int) else count.at(point)
