"""Small operators on tensors of any rank and layout, as nests of loops over byte strides.

A nest walks `dims` once and computes one element of y a turn; every operand says how many bytes one
step along each axis is. So a transpose, a slice, a broadcast (stride 0), a channels-last tensor
with a halo and a plain array are all the same loop:

    for i in ndindex(dims): y[i . y.strides] = op(x[i . x.strides], ...)

Axes of one element are dropped, the rest is ordered by the strides of y (of x, for a reduction) and
neighbours that are one run of memory in every operand are merged, so most nests end as one or two
loops. The innermost one is a scalar loop that LLVM vectorises (`Source(vectorize=True)`).

The kernel signature is that of nest.py, but x points to a table of pointers, those of all operands
in order and that of the arena, where the values of open sizes lie; w, y and r are not used. t0..t1
counts pieces of each nest's longest outer axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from twofour.core.sizes import Count, Size, most, usual
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.nd_rows import ROWS
from twofour.kernels.cpu.nd_scalar import (
    BYTES,
    REDUCTIONS,
    Expression,
    element,
    fill_value,
    load,
    reduced,
    store,
)
from twofour.kernels.cpu.sizes import emit_size

_SMALL = 8192  # elements: less is not worth a second thread
_MOST_PIECES = 64
_EVEN = 16  # an axis this long can be shared evenly enough
_TILE = 64  # elements of a transposed run
_LINE_BYTES = 64

Extent = int | Size | Value
"""A number of elements or bytes: known, known when running, or a value in the code."""


@dataclass(frozen=True)
class Ref:
    """Where a nest finds an operand.

    Attributes:
        index: of its pointer in the table.
        kind: of its elements, a key of `nd_scalar.BYTES`.
        strides: bytes of one step along each axis of the nest; 0 repeats, negative goes back.
        offset: bytes from the pointer to the element at index 0.
    """

    index: int
    kind: str
    strides: tuple[Extent, ...]
    offset: Extent = 0


@dataclass(frozen=True)
class Nest:
    """One walk over y.

    Attributes:
        op: "fill", "gather", "chain", one of ROWS, or an operation or reduction of nd_scalar.py.
        dims: elements along each axis; of ROWS the last axis is the one that sums to 1.
        y: the result; a reduction has stride 0 along what it reduces.
        inputs: operands.
        scalars: constants of the operation: the value of "fill", the limits of "clip", ...
        rows: of "gather", how many rows inputs[0] has and the bytes from one to the next;
            inputs[1] holds the row of each element (stride 0 of inputs[0] along its axes).
        steps: of "chain", what is computed of the inputs.
    """

    op: str
    dims: tuple[Extent, ...]
    y: Ref
    inputs: tuple[Ref, ...] = ()
    scalars: tuple[float, ...] = ()
    rows: tuple[Extent, Extent] = (0, 0)
    steps: tuple[Expression, ...] = ()

    @property
    def open(self) -> bool:
        """Whether some of its numbers are known only when it runs."""
        refs = (*self.inputs, self.y)
        numbers = [n for ref in refs for n in (*ref.strides, ref.offset)]
        return any(isinstance(n, Size) for n in (*numbers, *self.dims, *self.rows))

    def emitted(self, size: Callable[[Extent], Extent]) -> Nest:
        """The same with other numbers, size(n) for each n."""

        def ref(old: Ref) -> Ref:
            return replace(old, strides=tuple(map(size, old.strides)), offset=size(old.offset))

        dims, (count, step) = tuple(map(size, self.dims)), self.rows
        inputs, rows = tuple(map(ref, self.inputs)), (size(count), size(step))
        return replace(self, dims=dims, y=ref(self.y), inputs=inputs, rows=rows)


@dataclass(frozen=True)
class _Loop:
    """One loop: its turns, and the bytes a turn moves each operand (inputs, then y)."""

    count: Extent
    steps: tuple[Extent, ...]

    @property
    def kept(self) -> bool:
        """Whether the loop moves y; a reduction's own loops do not."""
        return self.steps[-1] != 0 or self.count == 1


def nd_pieces(nests: Sequence[Nest]) -> int:
    """Units of work that threads share."""
    if sum(_elements(nest) for nest in nests) < _SMALL:
        return 1
    found = [_loops(nest) for nest in nests]
    return min(_MOST_PIECES, max(_usual(loops[_split(loops)].count) for loops in found))


def emit_nd(name: str, nests: Sequence[Nest], operands: int = 0) -> str:
    """The kernel as an LLVM module; compile it with `vectorize`.

    Args:
        name: its symbol.
        nests: the walks.
        operands: pointers in the table before that of the arena; by default those in use.
    """
    pieces = nd_pieces(nests)
    arena = operands or 1 + max(ref.index for nest in nests for ref in (*nest.inputs, nest.y))
    pointers = [("ptr", p) for p in "xwyr"]
    kernel = Function(name, [*pointers, *(("i64", p) for p in ("t0", "t1", "p0", "p1"))])
    functions = [kernel]
    for number, nest in enumerate(nests):
        one = _nest(f"{name}_nest{number}", nest, pieces)
        at = [kernel.load("ptr", "%x", 8 * ref.index, 8) for ref in (*nest.inputs, nest.y)]
        at += [kernel.load("ptr", "%x", 8 * arena, 8)] if nest.open else []
        arguments = [("ptr", p) for p in at] + [("i64", "%t0"), ("i64", "%t1")]
        kernel.call("void", one.name, *arguments)
        functions.append(one)
    return module_text(functions)


def _nest(name: str, nest: Nest, pieces: int) -> Function:
    """One nest as a function of its own, whose pointers are known not to overlap."""
    refs = (*nest.inputs, nest.y)
    args = [("ptr noalias", f"a{i}") for i in range(len(refs))]
    args += [("ptr", "arena")] if nest.open else []
    f = Function(name, [*args, ("i64", "t0"), ("i64", "t1")], linkage="internal")
    loops = _loops(nest)
    split = _split(loops)

    @cache
    def size(number: Extent) -> Extent:
        return emit_size(f, "%arena", number) if isinstance(number, Size) else number

    loops = [_Loop(size(loop.count), tuple(map(size, loop.steps))) for loop in loops]
    nest = nest.emitted(size)
    bounds = [(_number(0), _number(loop.count)) for loop in loops]
    bounds[split] = _share(f, _number(loops[split].count), pieces)
    walk = _Walk(f, loops, bounds)
    at = [f.at(f"%a{i}", _number(ref.offset)) for i, ref in enumerate((*nest.inputs, nest.y))]
    if nest.op in REDUCTIONS:
        _reduce(f, nest, walk, at)
    elif nest.op in ROWS:
        x, y, count = nest.inputs[0], nest.y, _number(nest.dims[-1])
        steps = _number(x.strides[-1]), _number(y.strides[-1])
        row = ROWS[nest.op]
        walk.each(at, lambda here: row(f, here, steps, count, nest.scalars))
    else:
        walk.each(at, lambda here: _element(f, nest, here))
    return f


@dataclass
class _Walk:
    """Nested loops in a function.

    Attributes:
        f: the function.
        loops: outermost first.
        bounds: first and last turn of each.
    """

    f: Function
    loops: list[_Loop]
    bounds: list[tuple[Value | int, Value | int]]

    def each(
        self,
        at: list[Value],
        visit: Callable[[list[Value]], None],
        kept_only: bool = False,
        depth: int = 0,
    ) -> None:
        """Calls visit(pointers) for each turn, or only for each element of y."""
        if depth == len(self.loops):
            visit(at)
            return
        loop = self.loops[depth]
        if kept_only and not loop.kept:
            self.each(at, visit, kept_only, depth + 1)
            return

        def turn(i: Value) -> None:
            moved = [
                self.f.at(p, self.f.int_op("mul", i, _number(step))) if step else p
                for p, step in zip(at, loop.steps, strict=True)
            ]
            self.each(moved, visit, kept_only, depth + 1)

        self.f.repeat(*self.bounds[depth], turn)


def _element(f: Function, nest: Nest, at: list[Value]) -> None:
    """One element of y."""
    if nest.op == "fill":
        store(f, fill_value(nest.y.kind, nest.scalars[0]), at[-1], nest.y.kind)
        return
    if nest.op == "gather":
        at = [_picked(f, nest, at), at[-1]]
    values = [(load(f, p, ref.kind), ref.kind) for p, ref in zip(at, nest.inputs, strict=False)]
    if nest.op == "chain":
        for step in nest.steps:
            given = [values[i] for i in step.args]
            values.append((element(f, step.op, given, step.kind, step.scalars), step.kind))
        store(f, values[-1][0], at[-1], nest.y.kind)
        return
    op = "copy" if nest.op == "gather" else nest.op
    store(f, element(f, op, values[: len(at) - 1], nest.y.kind, nest.scalars), at[-1], nest.y.kind)


def _picked(f: Function, nest: Nest, at: list[Value]) -> Value:
    """Where the element's row lies: an index from -n to n - 1, clamped to that."""
    count, step = map(_number, nest.rows)
    index = load(f, at[1], nest.inputs[1].kind)
    if nest.inputs[1].kind == "int32":
        index = f.let(f"sext i32 {index} to i64")
    negative = f.let(f"icmp slt i64 {index}, 0")
    index = f.let(f"select i1 {negative}, i64 {f.int_op('add', index, count)}, i64 {index}")
    index = f.call("i64", "llvm.smax.i64", ("i64", index), ("i64", "0"))
    last = str(count - 1) if isinstance(count, int) else f.int_op("sub", count, 1)
    index = f.call("i64", "llvm.smin.i64", ("i64", index), ("i64", last))
    return f.at(at[0], f.int_op("mul", index, step))


def _reduce(f: Function, nest: Nest, walk: _Walk, at: list[Value]) -> None:
    """Start with the identity, combine with each prepared x, finish."""
    kind, (x,) = nest.y.kind, nest.inputs
    steps = reduced(f, nest.op, kind, _reduced_count(f, walk.loops))

    def begin(here: list[Value]) -> None:
        store(f, steps.identity, here[-1], kind)

    def combine(here: list[Value]) -> None:
        value = steps.prepare(load(f, here[0], x.kind))
        store(f, steps.combine(load(f, here[1], kind), value), here[1], kind)

    def finish(here: list[Value]) -> None:
        store(f, steps.finish(load(f, here[-1], kind)), here[-1], kind)

    walk.each(at, begin, kept_only=True)
    walk.each(at, combine)
    walk.each(at, finish, kept_only=True)


def _elements(nest: Nest) -> int:
    """The usual number."""
    total = 1
    for count in nest.dims:
        total *= _usual(count)
    return total


def _reduced_count(f: Function, loops: Sequence[_Loop]) -> int | Value:
    """Elements that become one."""
    total: int | Value = 1
    for count in [_number(loop.count) for loop in loops if not loop.kept]:
        known = isinstance(total, int) and isinstance(count, int)
        total = total * count if known else f.int_op("mul", total, count)  # type: ignore[operator]
    return total


def _usual(extent: Extent) -> int:
    """A number as far as it is known."""
    return usual(extent) if not isinstance(extent, str) else 0


def _number(extent: Extent) -> int | Value:
    """A number or a value in the code: all sizes were emitted."""
    if isinstance(extent, Size):
        raise TypeError(f"{extent} was not emitted")
    return extent


def _loops(nest: Nest) -> list[_Loop]:
    """The fewest loops that walk the nest, outermost first; at least one that moves y."""
    refs = (*nest.inputs, nest.y)
    axes = [i for i, count in enumerate(nest.dims) if count != 1]
    if nest.op in ROWS:  # which walk it themselves
        axes = [i for i in axes if i != len(nest.dims) - 1]
    leading = nest.inputs[0] if nest.op in REDUCTIONS else nest.y
    axes.sort(key=lambda i: -abs(_most(leading.strides[i])))
    loops: list[_Loop] = []
    for axis in axes:
        count, steps = nest.dims[axis], tuple(ref.strides[axis] for ref in refs)
        outer = loops[-1].steps if loops else ()
        if loops and outer == tuple(_times(step, count) for step in steps):
            loops[-1] = _Loop(_times(loops[-1].count, count), steps)
        else:
            loops.append(_Loop(count, steps))
    if not any(loop.kept for loop in loops):
        loops.insert(0, _Loop(1, (0,) * len(refs)))
    return _tiled(loops) if nest.op not in REDUCTIONS else loops


def _times(a: Extent, b: Extent) -> Count:
    """A product of what is not yet emitted."""
    if isinstance(a, str) or isinstance(b, str):
        raise TypeError(f"{a} times {b} is a value in the code")
    return a * b


def _most(extent: Extent) -> int:
    """The largest value."""
    return most(extent) if not isinstance(extent, str) else 0


def _tiled(loops: list[_Loop]) -> list[_Loop]:
    """Cuts the innermost loop where it strides through an input that another loop reads in a run.

    Then the cache lines of a tile are read once, not once for each element.
    """
    inner = loops[-1]
    if not isinstance(inner.count, int):
        return loops
    sizes = [n for n in range(_TILE, _TILE // 8 - 1, -1) if inner.count % n == 0]
    for which in range(len(inner.steps) - 1):
        apart = [abs(_most(loop.steps[which])) for loop in loops]
        near = [i for i, step in enumerate(apart[:-1]) if 0 < step < _LINE_BYTES]
        if apart[-1] >= _LINE_BYTES and near and sizes and sizes[0] < inner.count:
            size = sizes[0]
            steps = tuple(_times(step, size) for step in inner.steps)
            block = _Loop(inner.count // size, steps)
            return [*loops[: near[0]], block, *loops[near[0] : -1], _Loop(size, inner.steps)]
    return loops


def _split(loops: Sequence[_Loop]) -> int:
    """The loop that threads share: the outermost that divides evenly, else the longest."""
    kept = [i for i, loop in enumerate(loops) if loop.kept]
    even = [i for i in kept if _usual(loops[i].count) >= _EVEN]
    return even[0] if even else max(kept, key=lambda i: _usual(loops[i].count))


def _share(f: Function, count: int | Value, pieces: int) -> tuple[Value, Value]:
    """The turns of t0..t1 of `pieces`."""
    if count == pieces:
        return "%t0", "%t1"
    first, last = (f.int_op("udiv", f.int_op("mul", t, count), pieces) for t in ("%t0", "%t1"))
    return first, last


def contiguous(kind: str, dims: Sequence[Count]) -> tuple[Count, ...]:
    """Byte strides of a C-contiguous array."""
    strides: list[Count] = []
    step: Count = BYTES[kind]
    for count in reversed(dims):
        strides.append(step)
        step = step * count
    return tuple(reversed(strides))
