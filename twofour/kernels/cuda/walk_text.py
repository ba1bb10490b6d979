"""The text of a walk's kernel: where its elements lie, what is computed of them.

    def walk(in0, in1, y):
        pid = tl.program_id(0)
        c = pid % 3 * 256 + tl.arange(0, 256)[None, :]          columns of the block
        r = pid // 3 % 9 * 4 + tl.arange(0, 4)[:, None]         rows
        o = pid // 27                                           what is one place a program
        a0 = tl.load(in0 + o * 9216 + r * 256 + c, mask=...)
        ...
        tl.store(y + ..., v1, mask=...)

Every number is written out, so the compiler sees what is a run of memory and what is even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from twofour.kernels.cuda.problem import Ref, Walk
from twofour.kernels.cuda.walk_axes import Axis, Tiling, size
from twofour.kernels.cuda.walk_ops import (
    BOOL,
    FLOAT8,
    TYPES,
    element,
    kind_of,
    loaded,
    number,
    operation,
    stored,
)

_FAR = 2**31
GROUPS = ("o", "r", "c")


class Text:
    """A kernel's text while it is written.

    Attributes:
        lines: so far, each with its indent.
        wide: offsets are int64.
    """

    def __init__(self, name: str, roles: Sequence[str], *, wide: bool) -> None:
        """Begins with the head of the function."""
        self.lines = [f"def {name}({', '.join(roles)}):"]
        self.wide = wide
        self.indent = "    "
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.masks: dict[str, str] = {}

    def add(self, line: str) -> None:
        """One more line."""
        self.lines.append(self.indent + line)

    def program(self) -> None:
        """The number of this program."""
        self.add(f"pid = tl.program_id(0){'.to(tl.int64)' if self.wide else ''}")

    def group(self, name: str, index: str, axes: Sequence[Axis], block: int) -> None:
        """A group of axes, one after the other counted by `name`.

        Args:
            name: "r" for rows, "c" for columns, "o" for one place a program.
            index: the block's number, or the place.
            axes: of the group.
            block: elements of a block.
        """
        self.axes[name] = tuple(axes)
        if name == "o":
            self.add(f"o = {index}")
        else:
            slot = "[:, None]" if name == "r" else "[None, :]"
            start = "" if index == "0" else f"{index} * {block} + "
            self.add(f"{name} = {start}tl.arange(0, {block}){slot}")
            if size(axes) % block:
                self.masks[name] = f"{name} < {size(axes)}"
        self.split(name)

    def split(self, name: str) -> None:
        """The index along each axis of a group of several."""
        axes, rest = self.axes[name], name
        for place in range(len(axes) - 1, 0, -1):
            self.add(f"{name}{place} = {rest} % {axes[place].count}")
            self.add(f"{name}_{place} = {rest} // {axes[place].count}")
            rest = f"{name}_{place}"
        if len(axes) > 1:
            self.add(f"{name}0 = {rest}")

    def at(self, role: str, which: int, offset: int, more: str = "") -> tuple[str, str]:
        """Where elements lie, and the mask of a load or store: ", mask=..." or "".

        Args:
            role: the pointer.
            which: the operand's number among the steps of the axes.
            offset: of its first element.
            more: a further term of the offset.
        """
        terms, masks = [str(offset)] if offset else [], []
        for name in GROUPS:
            axes = self.axes.get(name, ())
            if len(axes) == 1 or _is_run(axes, which):
                steps = [(name, axes[-1].steps[which])] if axes else []
            else:
                steps = [(f"{name}{i}", axis.steps[which]) for i, axis in enumerate(axes)]
            own = [_times(index, step) for index, step in steps if step]
            terms += own
            if own and name in self.masks:
                masks.append(self.masks[name])
        if more:
            terms.append(more)
        where = f"{role} + ({' + '.join(terms)})" if terms else role
        return where, f", mask={both(masks)}" if masks else ""

    @property
    def whole(self) -> str:
        """The kernel."""
        return "\n".join([*self.lines, ""])


def _is_run(axes: Sequence[Axis], which: int) -> bool:
    """Whether an operand's elements lie at even steps along a whole group."""
    return all(
        outer.steps[which] == inner.steps[which] * inner.count for outer, inner in pairwise(axes)
    )


def _times(name: str, step: int) -> str:
    return name if step == 1 else f"{name} * {step}"


def both(masks: Sequence[str]) -> str:
    """All of the conditions."""
    return masks[0] if len(masks) == 1 else " & ".join(f"({mask})" for mask in masks)


def is_wide(dims: Sequence[int], refs: Sequence[Ref], rows: tuple[int, int] = (0, 0)) -> bool:
    """Whether an offset can leave int32."""
    spans = [
        abs(ref.offset)
        + sum((n - 1) * abs(step) for n, step in zip(dims, ref.strides, strict=True))
        for ref in refs
    ]
    return max(*spans, math.prod(dims), spans[0] + rows[0] * abs(rows[1])) >= _FAR // 2


def elements_text(problem: Walk, tiling: Tiling) -> str:
    """The kernel `walk` of a problem that computes each element by itself.

    Args:
        problem: no reduction and no operation on rows.
        tiling: how it is cut.
    """
    refs, roles = (*problem.inputs, problem.y), roles_of(problem)
    text = Text("walk", roles, wide=is_wide(problem.dims, refs, problem.rows))
    text.program()
    rows, columns, _ = tiling.pieces
    text.group("c", _part(1, columns), tiling.columns, tiling.block[1])
    if tiling.rows:
        text.group("r", _part(columns, rows), tiling.rows, tiling.block[0])
    if tiling.outer:
        text.group("o", f"pid // {columns * rows}", tiling.outer, 1)
    place, mask = text.at("y", len(refs) - 1, problem.y.offset)
    value = _filled(problem, tiling) if problem.op == "fill" else _result(text, problem)
    text.add(f"tl.store({place}, {value}{mask})")
    return text.whole


def _part(before: int, count: int) -> str:
    """The number of a program along one side of the grid."""
    if count == 1:
        return "0"
    return f"pid % {count}" if before == 1 else f"pid // {before} % {count}"


def roles_of(problem: Walk) -> list[str]:
    """Of its operands, in order."""
    return [*(f"in{i}" for i in range(len(problem.inputs))), "y"]


def is_plain(problem: Walk) -> bool:
    """Whether elements are moved as they are."""
    same = bool(problem.inputs) and problem.inputs[0].dtype == problem.y.dtype
    moves = problem.op in ("copy", "gather") and not problem.steps
    return moves and same and problem.y.dtype != BOOL


def _result(text: Text, problem: Walk) -> str:
    """What is stored."""
    y = problem.y
    if problem.op == "gather":
        _picked(text, problem)
        values = [("a0", kind_of(problem.inputs[0].dtype))]
    else:
        values = [_value(text, problem, i) for i in range(len(problem.inputs))]
    if is_plain(problem):
        return "a0"
    if problem.op == "chain" or problem.steps:
        for step in problem.steps:
            op, scalars = operation(step.op, step.scalars)
            kind = step.kind if step.kind == FLOAT8 else kind_of(step.kind)
            name = f"v{len(values)}"
            given = [values[i] for i in step.args]
            text.add(f"{name} = {element(op, given, kind, scalars)}")
            values.append((name, kind))
        return stored(*values[-1], y.dtype)
    op = "copy" if problem.op == "gather" else problem.op
    op, scalars = operation(op, problem.scalars)
    direct = op in ("cast", "quantize")  # they say how to reach bytes
    kind = FLOAT8 if direct and y.dtype == FLOAT8 else kind_of(y.dtype)
    text.add(f"v = {element(op, values, kind, scalars)}")
    return stored("v", kind, y.dtype)


def _filled(problem: Walk, tiling: Tiling) -> str:
    """A block of one number."""
    kind = kind_of(problem.y.dtype)
    wide = TYPES[kind] if kind in ("float32", "int64") else "tl.int32"
    value = number(problem.scalars[0], kind)
    return f"tl.full({list(tiling.block)}, {value}, {wide}).to({TYPES[problem.y.dtype]})"


def _value(text: Text, problem: Walk, which: int) -> tuple[str, str]:
    """The name of an operand's elements, and their kind."""
    ref = problem.inputs[which]
    place, mask = text.at(f"in{which}", which, ref.offset)
    load = f"tl.load({place}{mask})"
    text.add(f"a{which} = {load if is_plain(problem) else loaded(load, ref.dtype)}")
    return f"a{which}", kind_of(ref.dtype)


def _picked(text: Text, problem: Walk) -> None:
    """The elements of the rows that in1 names: from -n to n - 1, clamped to that."""
    table, index = problem.inputs
    (count, step), wide = problem.rows, "tl.int64" if text.wide else "tl.int32"
    place, mask = text.at("in1", 1, index.offset)
    text.add(f"i = tl.load({place}{mask})")
    text.add(f"i = tl.where(i < 0, i + {count}, i)")
    text.add(f"i = tl.minimum(tl.maximum(i, 0), {count - 1}).to({wide})")
    shared = [mask.removeprefix(", mask=")] if mask else []
    place, own = text.at("in0", 0, table.offset, _times("i", step))
    masks = list(dict.fromkeys([*shared, *([own.removeprefix(", mask=")] if own else [])]))
    tail = f", mask={both(masks)}" if masks else ""
    load = f"tl.load({place}{tail})"
    text.add(f"a0 = {load if is_plain(problem) else loaded(load, table.dtype)}")
