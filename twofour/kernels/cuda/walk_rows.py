"""The text of reductions, and of operations on whole rows.

A program has a block of results (rows of the block) and goes along what is reduced or normalized
(its columns), a block after the other. Sums are kept lane by lane and added up at the end.

A reduction with few results and much to reduce is two launches: each program of the first does a
share, the second puts the shares together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from twofour.kernels.cuda.problem import Ref, Walk
from twofour.kernels.cuda.walk_axes import Axis, Tiling, axes_of, power, size
from twofour.kernels.cuda.walk_ops import FLOAT, TYPES, kind_of, loaded, stored
from twofour.kernels.cuda.walk_text import Text, both, is_wide

REDUCTIONS: dict[str, tuple[str, str, str]] = {
    "sum": ("add", "{0}", "{0}"),
    "mean": ("add", "{0}", "tl.div_rn({0}, {count})"),
    "reduce_max": ("max", "{0}", "{0}"),
    "reduce_min": ("min", "{0}", "{0}"),
    "prod": ("mul", "{0}", "{0}"),
    "l1": ("add", "tl.abs({0})", "{0}"),
    "l2": ("add", "{0} * {0}", "tl.sqrt_rn({0})"),
    "sumsquare": ("add", "{0} * {0}", "{0}"),
}
"""What is combined, and what is done before and after."""
ROWS = ("softmax", "log_softmax", "expect")
"""Operations whose last axis is a row."""
AT_ONCE, PIECE = 16384, 4096
"""Elements of a row that one program holds, and of those of a longer one that it takes at once."""
_NAN = "propagate_nan=tl.PropagateNan.ALL"
_COMBINED = {
    "add": "{0} + {1}",
    "mul": "{0} * {1}",
    "max": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "min": f"tl.minimum({{0}}, {{1}}, {_NAN})",
}
_PROGRAMS, _SHARE, _LEAST = 264, 8192, 256


@dataclass(frozen=True)
class Fold:
    """One launch of a reduction.

    Attributes:
        op: "add", "mul", "max" or "min".
        before: applied to each element, a template.
        after: applied to the result, a template.
        dims: of the walk.
        x: what is reduced.
        y: the results; stride 0 along what is reduced.
        shares: parts that what is reduced is cut into; part i goes to y + i * results.
    """

    op: str
    before: str
    after: str
    dims: tuple[int, ...]
    x: Ref
    y: Ref
    shares: int = 1

    @property
    def axes(self) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """What is kept, and what is reduced; none becomes one of one element."""
        kept = [i for i, step in enumerate(self.y.strides) if step and self.dims[i] > 1]
        gone = [i for i in range(len(self.dims)) if i not in kept]
        found = []
        for chosen, leading in ((kept, 1), (gone, 0)):
            refs = [
                Ref(ref.dtype, tuple(ref.strides[i] for i in chosen)) for ref in (self.x, self.y)
            ]
            axes = axes_of([self.dims[i] for i in chosen], refs, leading)
            found.append(axes or (Axis(1, (0, leading)),))
        return found[0], found[1]


def folds(problem: Walk) -> tuple[Fold, ...]:
    """The launches of a reduction; the results of the first of two lie in "scratch"."""
    op, before, after = REDUCTIONS[problem.op]
    (x,), y = problem.inputs, problem.y
    one = Fold(op, before, after, problem.dims, x, y)
    kept, gone = (size(axes) for axes in one.axes)
    after = after.replace("{count}", f"{float(gone)}")
    one = Fold(op, before, after, problem.dims, x, y)
    programs = -(-kept // block_of(one)[0])
    shares = min(_PROGRAMS // programs, gone // _SHARE)
    if shares < 2:
        return (one,)
    kind = kind_of(x.dtype)
    flat = tuple(n if step else 1 for n, step in zip(problem.dims, y.strides, strict=True))
    strides = _dense(flat)
    between = Ref(kind, tuple(s if own else 0 for s, own in zip(strides, y.strides, strict=True)))
    first = Fold(op, before, "{0}", problem.dims, x, between, shares)
    source = Ref(kind, (kept, *strides))
    second = Fold(
        op, "{0}", after, (shares, *flat), source, Ref(y.dtype, (0, *y.strides), y.offset)
    )
    return first, second


def _dense(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(dims[i + 1 :]) for i in range(len(dims)))


def block_of(fold: Fold, elements: int = 2048) -> tuple[int, int]:
    """Results of a program, and elements that it looks at at once."""
    kept, gone = fold.axes
    runs = abs(gone[-1].steps[0]) <= abs(kept[-1].steps[0]) or size(kept) == 1
    if runs or not kept[-1].steps[0]:
        columns = min(power(size(gone)), elements)
        return _rows_of(size(kept), columns, elements), columns
    rows = min(power(size(kept)), 64)
    return rows, min(elements // rows, power(size(gone)))


def _rows_of(results: int, columns: int, elements: int) -> int:
    """Rows of a block: as many as leave enough programs, but enough for its threads."""
    wanted = max(power(results // _PROGRAMS), _LEAST // columns)
    return max(1, min(elements // columns, wanted, power(results)))


def fold_text(fold: Fold, roles: tuple[str, str], block: tuple[int, int]) -> tuple[str, int]:
    """The kernel `reduction` and the programs it takes."""
    kept, gone = fold.axes
    results, count = size(kept), size(gone)
    kind, type_ = kind_of(fold.x.dtype), TYPES[kind_of(fold.x.dtype)]
    programs = -(-results // block[0])
    text = Text("reduction", roles, wide=is_wide(fold.dims, (fold.x, fold.y)))
    text.program()
    text.group("r", f"pid % {programs}" if fold.shares > 1 else "pid", kept, block[0])
    blocks = -(-count // block[1])
    share = -(-blocks // fold.shares)
    start, end = "0", str(blocks)
    if fold.shares > 1:
        start = f"pid // {programs} * {share}"
        end = f"tl.minimum(pid // {programs} * {share} + {share}, {blocks})"
    none = identity(fold.op, kind)
    text.add(f"so_far = tl.full([{block[0]}, {block[1]}], {none}, {type_})")
    text.add(f"for turn in range({start}, {end}):")
    text.indent = " " * 8
    text.group("c", "turn", gone, block[1])
    place, mask = text.at(roles[0], 0, fold.x.offset)
    text.add(f"x = {loaded(f'tl.load({place}{mask})', fold.x.dtype)}")
    text.add(f"v = {fold.before.format('x')}")
    if text.masks:
        text.add(f"v = tl.where({both(list(text.masks.values()))}, v, {none})")
    text.add(f"so_far = {_COMBINED[fold.op].format('so_far', 'v')}")
    text.indent = "    "
    _together(text, fold.op, kind, block[1])
    text.axes.pop("c")
    own = f"pid // {programs} * {results}" if fold.shares > 1 else ""
    place, mask = text.at(roles[1], 1, fold.y.offset, own)
    text.add(f"v = {fold.after.format('total')}")
    text.add(f"tl.store({place}, {stored('v', kind, fold.y.dtype)}{mask})")
    return text.whole, programs * fold.shares


def identity(op: str, kind: str) -> str:
    """What changes nothing when combined."""
    if op in ("add", "mul"):
        return str(int(op == "mul")) + (".0" if kind == FLOAT else "")
    if kind == FLOAT:
        return 'float("inf")' if op == "min" else 'float("-inf")'
    bits = 63 if kind == "int64" else 31
    return str(2**bits - 1 if op == "min" else -(2**bits))


def _together(text: Text, op: str, kind: str, columns: int) -> None:
    """The lanes of each row as one: `total`; NaN where one is, which tl.max does not see."""
    if op == "add":
        text.add("total = tl.sum(so_far, axis=1, keep_dims=True)")
    elif op in ("max", "min"):
        text.add(f"total = tl.{op}(so_far, axis=1, keep_dims=True)")
        if kind == FLOAT:
            flags = "tl.sum((so_far != so_far).to(tl.int32), axis=1, keep_dims=True)"
            text.add(f'total = tl.where({flags} > 0, float("nan"), total)')
    else:
        rows = "so_far.shape[0]"
        while columns > 1:  # halves are multiplied until one column is left
            columns //= 2
            text.add(f"low, high = tl.split(tl.reshape(so_far, [{rows}, {columns}, 2]))")
            text.add("so_far = low * high")
        text.add("total = so_far")


def rows_tiling(problem: Walk) -> Tiling:
    """Rows of a program, and the elements of each that it looks at at once."""
    kept, along = row_axes(problem)
    count = along[0].count
    columns = power(count) if count <= AT_ONCE else PIECE
    rows = _rows_of(size(kept), columns, 1024)
    if kept and abs(kept[-1].steps[0]) < abs(along[0].steps[0]):  # side by side are the rows
        rows = max(rows, min(32, power(size(kept)), max(1, AT_ONCE // columns)))
    warps = max(1, min(16, rows * columns // 512))
    return Tiling(kept, along, (), (rows, columns), 1 << (warps.bit_length() - 1))


def row_axes(problem: Walk) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """What tells the rows apart, and the axis along them."""
    refs = (*problem.inputs, problem.y)
    rest = [Ref(ref.dtype, ref.strides[:-1]) for ref in refs]
    last = Axis(problem.dims[-1], tuple(ref.strides[-1] for ref in refs))
    kept = axes_of(problem.dims[:-1], rest)
    return kept or (Axis(1, (0, 1)),), (last,)


def rows_text(problem: Walk, tiling: Tiling) -> str:
    """The kernel `rows` of an operation on rows; "expect" reads its weights from `weights`."""
    roles = ("in0", *(("weights",) if problem.op == "expect" else ()), "y")
    text = Text("rows", roles, wide=is_wide(problem.dims, (*problem.inputs, problem.y)))
    text.program()
    text.group("r", "pid", tiling.rows, tiling.block[0])
    blocks = tiling.pieces[1]
    if blocks == 1:
        _short_row(text, problem, tiling)
    else:
        _long_row(text, problem, tiling, blocks)
    return text.whole


def _read(text: Text, problem: Walk) -> None:
    """A block of x; what lies outside cannot win."""
    place, mask = text.at("in0", 0, problem.inputs[0].offset)
    load = f"tl.load({place}{mask})"
    text.add(f"x = {loaded(load, problem.inputs[0].dtype)}")
    if "c" in text.masks:
        text.add(f'x = tl.where({text.masks["c"]}, x, float("-inf"))')


def _write(text: Text, problem: Walk, value: str) -> None:
    place, mask = text.at("y", 1, problem.y.offset)
    text.add(f"v = {value}")
    text.add(f"tl.store({place}, {stored('v', FLOAT, problem.y.dtype)}{mask})")


def _weights(text: Text) -> str:
    mask = f", mask={text.masks['c']}, other=0.0" if "c" in text.masks else ""
    return f"tl.load(weights + c{mask})"


def _expectation(text: Text, problem: Walk) -> None:
    """Of `product` and `total`, one number a row."""
    text.axes.pop("c", None)
    text.masks.pop("c", None)
    place, mask = text.at("y", 1, problem.y.offset)
    bias = f" + {float(problem.scalars[-1])!r}" if problem.scalars[-1] else ""
    text.add(f"v = product / total{bias}")
    text.add(f"tl.store({place}, {stored('v', FLOAT, problem.y.dtype)}{mask})")


_VALUES = {"softmax": "power / total", "log_softmax": "x - highest - tl.log(total)"}


def _short_row(text: Text, problem: Walk, tiling: Tiling) -> None:
    """Rows that a program holds."""
    text.group("c", "0", tiling.columns, tiling.block[1])
    _read(text, problem)
    text.add("highest = tl.max(x, axis=1, keep_dims=True)")
    text.add("power = tl.exp(x - highest)")
    text.add("total = tl.sum(power, axis=1, keep_dims=True)")
    if problem.op == "expect":
        text.add(f"product = tl.sum(power * {_weights(text)}, axis=1, keep_dims=True)")
        _expectation(text, problem)
    else:
        _write(text, problem, _VALUES[problem.op])


def _long_row(text: Text, problem: Walk, tiling: Tiling, blocks: int) -> None:
    """Rows that are read three times: for the highest element, for the sum, for the results."""
    shape = list(tiling.block)

    def turn() -> None:
        text.add(f"for turn in range(0, {blocks}):")
        text.indent = " " * 8
        text.group("c", "turn", tiling.columns, tiling.block[1])
        _read(text, problem)

    text.add(f'best = tl.full({shape}, float("-inf"), tl.float32)')
    turn()
    text.add("best = tl.maximum(best, x)")
    text.indent = "    "
    text.add("highest = tl.max(best, axis=1, keep_dims=True)")
    text.add(f"powers = tl.full({shape}, 0.0, tl.float32)")
    text.add(f"products = tl.full({shape}, 0.0, tl.float32)")
    turn()
    text.add("power = tl.exp(x - highest)")
    text.add("powers += power")
    if problem.op == "expect":
        text.add(f"products += power * {_weights(text)}")
    text.indent = "    "
    text.add("total = tl.sum(powers, axis=1, keep_dims=True)")
    text.add("product = tl.sum(products, axis=1, keep_dims=True)")
    if problem.op == "expect":
        _expectation(text, problem)
        return
    turn()
    text.add("power = tl.exp(x - highest)")
    _write(text, problem, _VALUES[problem.op])
