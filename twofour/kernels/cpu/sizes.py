"""Open sizes in generated code: the symbols' values lie at the start of the arena, as i64."""

from __future__ import annotations

from twofour.core.sizes import Count
from twofour.kernels.cpu.llvm import Function, Value


def emit_size(f: Function, symbols: Value, count: Count) -> Value | int:
    """The value of a size; the number itself where it is known.

    Args:
        f: the function.
        symbols: pointer to the symbols' values.
        count: the size.
    """
    if isinstance(count, int):
        return count
    total: Value | int = 0
    for factor, *powers in count.terms:
        term: Value | int = factor
        for index, power in enumerate(powers):
            for _ in range(power):
                symbol = f.load("i64", symbols, 8 * index, 8)
                term = symbol if term == 1 else f.int_op("mul", term, symbol)
        total = term if total == 0 else f.int_op("add", total, term)
    return total
