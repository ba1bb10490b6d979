"""Who computes what: the kernels around the products of routed experts.

    choose    each token's k highest logits, and their gates
    sort      slots by expert, then by token: counted, added up, given out        (one thread)
    route     both, where there are few tokens                                    (one thread)
    select    slots of the tokens whose mask is set                               (one thread)
    gather    rows of x, by slot: quantized, or as they are
    combine   y: each token's results times their gates, in the order of the choices

Meaning: core/experts.py. Each has the signature of a plugin's stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from twofour.core.plugins import Problem, Stage
from twofour.kernels.cpu.functions import emit_exp
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES
from twofour.kernels.cpu.quantize_rows import RowsProblem, emit_rows
from twofour.kernels.cpu.rows import first_lanes, load16, store16
from twofour.kernels.cpu.vector import F32S, float_bits
from twofour.operators.experts_plan import SHARES, Plan
from twofour.plugins import kernel, pointers

_NAN, _INFINITY = float_bits(float("nan")), float_bits(float("inf"))
_X, _CHOOSER = 0, 1
_FEW = 1024  # comparisons that take less time than threads need to meet


@dataclass(frozen=True)
class Parts:
    """Pointers that a kernel works with.

    Attributes:
        f: the kernel.
        plan: sizes.
        x: the input.
        chooser: logits or mask.
        y: the output.
        workspace: its begin.
    """

    f: Function
    plan: Plan
    x: Value
    chooser: Value
    y: Value
    workspace: Value

    @staticmethod
    def of(f: Function, problem: Problem, plan: Plan) -> Parts:
        """Emits the loads."""
        table = pointers(f, problem)
        return Parts(f, plan, table[_X], table[_CHOOSER], table[-2], table[-1])

    def at(self, part: str, index: Value | int = 0, size: int = 8) -> Value:
        """A place in a part of the workspace: entry `index` of so many bytes each."""
        begin = self.f.at(self.workspace, self.plan.offsets[part])
        return self.f.at(begin, self.f.int_op("mul", index, size)) if index != 0 else begin

    def load(self, part: str, index: Value | int) -> Value:
        """An i64 of a part."""
        return self.f.load("i64", self.at(part, index), 0, 8)

    def store(self, value: Value, part: str, index: Value | int) -> None:
        """Writes an i64 of a part."""
        self.f.store("i64", value, self.at(part, index), 0, 8)

    def share(self) -> tuple[Value, Value]:
        """The slots of a call that does t0..t1 of SHARES."""
        count = self.load("begins", self.plan.experts)
        begin, end = (
            self.f.int_op("udiv", self.f.int_op("mul", count, t), SHARES) for t in ("%t0", "%t1")
        )
        return begin, end


def joined(*texts: str) -> str:
    """Several modules as one; what more than one of them declares stands once."""
    declared: dict[str, None] = {}
    rest = []
    for line in "\n".join(texts).splitlines():
        if line.startswith(("declare ", "@")):
            declared[line] = None
        else:
            rest.append(line)
    return "\n".join([*declared, *rest])


def routing_stages(problem: Problem, plan: Plan) -> list[Stage]:
    """From logits or a mask to rows by slot."""
    if plan.routed and plan.slots * plan.experts <= _FEW:
        how = [Stage(_text(problem, plan, _route), 1, "route")]
    elif plan.routed:
        how = [
            Stage(_text(problem, plan, _choose), plan.tokens, "choose"),
            Stage(_text(problem, plan, _sort), 1, "sort"),
        ]
    else:
        how = [Stage(_text(problem, plan, _select), 1, "select")]
    body = _gather_bytes if plan.quantized else _gather_floats
    text = _text(problem, plan, body)
    if plan.quantized:
        rows = RowsProblem("row", plan.hidden, 4 * plan.hidden)
        text = joined(emit_rows("kernel_rows", rows), text)
    return [*how, Stage(text, SHARES, "gather")]


def combine_stage(problem: Problem, plan: Plan) -> Stage:
    """From the experts' results by slot to y."""
    body = _combine if plan.routed else _spread
    return Stage(_text(problem, plan, body), plan.tokens, "combine")


def _text(problem: Problem, plan: Plan, body: Callable[[Parts], None]) -> str:
    f = kernel()
    body(Parts.of(f, problem, plan))
    return module_text([f])


def _route(p: Parts) -> None:
    """All tokens chosen for and sorted, by the thread that has the only piece."""

    def all_of() -> None:
        _choose_for(p, 0, p.plan.tokens)
        _sort_all(p)

    p.f.when(p.f.let("icmp slt i64 %t0, %t1"), all_of)


def _choose(p: Parts) -> None:
    """A call's tokens."""
    _choose_for(p, "%t0", "%t1")


def _choose_for(p: Parts, begin: Value | int, end: Value | int) -> None:
    """The k highest of each row of logits, in order; of equal ones the first."""
    f, plan = p.f, p.plan

    def token(t: Value) -> None:
        logits = f.at(p.chooser, f.int_op("mul", t, 4 * plan.experts))
        first = f.int_op("mul", t, plan.k)
        before = [("float", _INFINITY), ("i64", "-1")]

        def choice(j: Value, last: list[Value]) -> list[Value]:
            best, value = _next_highest(f, plan, logits, last)
            slot = f.int_op("add", first, j)
            p.store(best, "chosen", slot)
            f.store("float", value, p.at("gates", slot, 4), 0, 4)
            return [value, best]

        f.loop(0, plan.k, before, choice)
        _gates(p, logits, p.at("gates", first, 4))

    f.repeat(begin, end, token)


def _next_highest(
    f: Function, plan: Plan, logits: Value, last: Sequence[Value]
) -> tuple[Value, Value]:
    """The highest of the logits that come after (value, expert); with NaN, maybe expert 0."""

    def look(e: Value, best: list[Value]) -> list[Value]:
        value = f.load("float", logits, f.int_op("mul", e, 4), 4)
        below = f.let(f"fcmp olt float {value}, {last[0]}")
        equal = f.let(f"fcmp oeq float {value}, {last[0]}")
        later = f.let(f"and i1 {equal}, {f.let(f'icmp sgt i64 {e}, {last[1]}')}")
        open_ = f.let(f"or i1 {below}, {later}")
        better = f.let(f"fcmp ogt float {value}, {best[0]}")
        none = f.let(f"icmp slt i64 {best[1]}, 0")
        take = f.let(f"and i1 {open_}, {f.let(f'or i1 {better}, {none}')}")
        return [
            f.let(f"select i1 {take}, float {value}, float {best[0]}"),
            f.let(f"select i1 {take}, i64 {e}, i64 {best[1]}"),
        ]

    value, best = f.loop(0, plan.experts, [("float", _NAN), ("i64", "-1")], look)
    # Where only NaN is left there is no best one: a valid expert, with a gate of NaN.
    found = f.let(f"icmp sge i64 {best}, 0")
    return f.let(f"select i1 {found}, i64 {best}, i64 0"), value


def _gates(p: Parts, logits: Value, gates: Value) -> None:
    """Chosen logits to gates, in place: softmax of them, or their part of that of all."""
    f, plan = p.f, p.plan
    highest = f.load("float", gates, 0, 4)

    def power(pointer: Value, i: Value) -> tuple[Value, Value]:
        at = f.at(pointer, f.int_op("mul", i, 4))
        return emit_exp(f, f.let(f"fsub float {f.load('float', at, 0, 4)}, {highest}"), 1), at

    def add(pointer: Value, i: Value, total: list[Value]) -> list[Value]:
        return [f.let(f"fadd float {total[0]}, {power(pointer, i)[0]}")]

    source, count = (gates, plan.k) if plan.normalize else (logits, plan.experts)
    total = f.loop(0, count, [("float", "0.0")], partial(add, source))[0]

    def divide(i: Value) -> None:
        value, at = power(gates, i)
        f.store("float", f.let(f"fdiv float {value}, {total}"), at, 0, 4)

    f.repeat(0, plan.k, divide)


def _sort(p: Parts) -> None:
    """The choices sorted by the thread that has the only piece."""
    p.f.when(p.f.let("icmp slt i64 %t0, %t1"), lambda: _sort_all(p))


def _sort_all(p: Parts) -> None:
    """A counting sort of the choices by expert."""
    f, plan = p.f, p.plan

    f.repeat(0, plan.experts, lambda e: p.store("0", "cursors", e))

    def count(s: Value) -> None:
        expert = p.load("chosen", s)
        p.store(f.int_op("add", p.load("cursors", expert), 1), "cursors", expert)

    f.repeat(0, plan.slots, count)

    def begin(e: Value, at: list[Value]) -> list[Value]:
        count = p.load("cursors", e)
        p.store(at[0], "begins", e)
        p.store(at[0], "cursors", e)
        return [f.int_op("add", at[0], count)]

    total = f.loop(0, plan.experts, [("i64", "0")], begin)[0]
    p.store(total, "begins", plan.experts)

    def give(s: Value) -> None:
        expert = p.load("chosen", s)
        slot = p.load("cursors", expert)
        p.store(f.int_op("add", slot, 1), "cursors", expert)
        p.store(slot, "places", s)
        p.store(f.int_op("udiv", s, plan.k), "owners", slot)

    f.repeat(0, plan.slots, give)


def _select(p: Parts) -> None:
    """Slots for the tokens whose mask is set."""
    f, plan = p.f, p.plan

    def token(t: Value, slot: list[Value]) -> list[Value]:
        flag = f.let(f"icmp ne i8 {f.load('i8', p.chooser, t)}, 0")
        p.store(t, "owners", slot[0])  # overwritten by the next one, where this one has no slot
        p.store(f.let(f"select i1 {flag}, i64 {slot[0]}, i64 -1"), "places", t)
        return [f.int_op("add", slot[0], f.let(f"zext i1 {flag} to i64"))]

    def all_of() -> None:
        count = f.loop(0, plan.tokens, [("i64", "0")], token)[0]
        p.store("0", "begins", 0)
        p.store(count, "begins", 1)

    f.when(f.let("icmp slt i64 %t0, %t1"), all_of)


def _gather_bytes(p: Parts) -> None:
    """Rows of x, quantized, to their slots."""
    f, plan = p.f, p.plan

    def slot(s: Value) -> None:
        x = f.at(p.x, f.int_op("mul", p.load("owners", s), 4 * plan.hidden))
        row = p.at("rows", s, plan.first.x_pixel)
        f.do(
            f"call void @kernel_rows(ptr {x}, ptr {x}, ptr {row}, ptr {row},"
            " i64 0, i64 1, i64 0, i64 1)"
        )

    f.repeat(*p.share(), slot)


def _gather_floats(p: Parts) -> None:
    """Rows of x to their slots."""
    f, plan = p.f, p.plan

    def slot(s: Value) -> None:
        x = f.at(p.x, f.int_op("mul", p.load("owners", s), 4 * plan.hidden))
        row = p.at("rows", s, plan.first.x_pixel)

        def block(at: int | Value, mask: str) -> None:
            store16(f, F32S, load16(f, F32S, x, at, mask), row, at, mask)

        blocks(f, plan.hidden, block)

    f.repeat(*p.share(), slot)


def _combine(p: Parts) -> None:
    """Y: the sum of gate * result over a token's choices."""
    f, plan = p.f, p.plan

    def token(t: Value) -> None:
        y = f.at(p.y, f.int_op("mul", t, 4 * plan.hidden))
        first = f.int_op("mul", t, plan.k)

        def part(choice: int | Value, at: int | Value, mask: str) -> Value:
            index = f.int_op("add", first, choice)
            gate = f.splat("float", f.load("float", p.at("gates", index, 4), 0, 4))
            result = p.at("results", p.load("places", index), plan.second.y_pixel)
            return f.let(f"fmul {F32S} {load16(f, F32S, result, at, mask)}, {gate}")

        def block(at: int | Value, mask: str) -> None:
            def more(j: Value, total: list[Value]) -> list[Value]:
                return [f.let(f"fadd {F32S} {total[0]}, {part(j, at, mask)}")]

            total = f.loop(1, plan.k, [(F32S, part(0, at, mask))], more)[0]
            store16(f, F32S, total, y, at, mask)

        blocks(f, plan.hidden, block)

    f.repeat("%t0", "%t1", token)


def _spread(p: Parts) -> None:
    """Y: the result of a token, or zeros where it has none."""
    f, plan = p.f, p.plan

    def token(t: Value) -> None:
        y = f.at(p.y, f.int_op("mul", t, 4 * plan.hidden))
        place = p.load("places", t)

        def copy() -> None:
            result = p.at("results", place, plan.second.y_pixel)
            blocks(
                f,
                plan.hidden,
                lambda at, mask: store16(f, F32S, load16(f, F32S, result, at, mask), y, at, mask),
            )

        def clear() -> None:
            blocks(
                f, plan.hidden, lambda at, mask: store16(f, F32S, "zeroinitializer", y, at, mask)
            )

        f.when(f.let(f"icmp sge i64 {place}, 0"), copy, clear)

    f.repeat("%t0", "%t1", token)


def blocks(f: Function, channels: int, visit: Callable[[int | Value, str], None]) -> None:
    """Calls visit(offset in bytes, mask) for every 16 floats of a row."""
    full, rest = divmod(channels, LANES)
    f.repeat(0, full, lambda i: visit(f.int_op("mul", i, 4 * LANES), ""))
    if rest:
        visit(4 * LANES * full, first_lanes(rest))
