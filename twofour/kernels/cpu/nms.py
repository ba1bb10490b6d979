"""Suppression of overlapping boxes (core/suppression.py), one image and class after the other.

    scores of a class --compare, 32 at a time--> keys of the candidates --heap--> highest first
    candidate --16 boxes taken before at a time--> taken, or not

A key is one 64-bit number: the score's bits such that they order like numbers, then the complement
of the place, so the largest key is the highest score and of equal scores the first place. The keys
are a heap in place: of thousands of candidates mostly few are ever looked at. The boxes taken lie
as five arrays (low x, high x, low y, high y, area), so one candidate meets 16 of them with a few
vector instructions and stops at the first overlap.

Everything is read where it lies, by byte strides. The results are rows of three int64; how many
there are is written beside them. One thread does it all: a list in order of scores cannot be
shared.

The kernel's x points to a table: boxes, scores, results, their count, scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from twofour.core.suppression import Suppression
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.vector import F32S, LANES, every, float_bits

_BLOCK, _BITS = 32, "i32"
_FLAGS = f"<{LANES} x i1>"
_SIDES = ("low_x", "high_x", "low_y", "high_y")
_FIELDS = (*_SIDES, "area")


@dataclass(frozen=True)
class NmsProblem:
    """Sizes, and where the operands lie.

    Attributes:
        images: of boxes and scores.
        classes: of the scores.
        places: boxes of an image.
        boxes: bytes from image to image, from place to place and from number to number.
        scores: bytes from image to image, from class to class and from place to place.
        how: thresholds.
    """

    images: int
    classes: int
    places: int
    boxes: tuple[int, int, int]
    scores: tuple[int, int, int]
    how: Suppression

    @property
    def most(self) -> int:
        """Boxes of an image and class that may be left."""
        return max(0, min(self.how.most, self.places))

    @property
    def scratch_bytes(self) -> int:
        """Memory for keys and taken boxes."""
        return self._taken_at + len(_FIELDS) * self.field_bytes

    @property
    def _taken_at(self) -> int:
        return -(-8 * self.places // 64) * 64

    @property
    def field_bytes(self) -> int:
        """Of one array of the boxes taken."""
        return max(1, -(-self.most // LANES)) * LANES * 4

    def field_at(self, name: str) -> int:
        """Offset of such an array in the scratch memory."""
        return self._taken_at + _FIELDS.index(name) * self.field_bytes


def emit_nms(name: str, problem: NmsProblem) -> str:
    """The kernel as an LLVM module; compile it with `vectorize`.

    Args:
        name: its symbol.
        problem: what it computes.
    """
    kernel = Function(
        name, [*(("ptr", p) for p in "xwyr"), *(("i64", p) for p in ("t0", "t1", "p0", "p1"))]
    )
    sift, gather = _sift(f"{name}_sift"), _gather(f"{name}_gather", problem)
    meets = _meets(f"{name}_meets", problem)
    kernel.when(
        kernel.let("icmp slt i64 %t0, %t1"), partial(_walk, kernel, problem, sift, gather, meets)
    )
    return module_text([sift, gather, meets, kernel])


def _while(f: Function, condition: Callable[[], Value], body: Callable[[], None]) -> None:
    """While condition(): body(); what changes lies in memory."""
    head, inside, done = f.label("head"), f.label("body"), f.label("done")
    f.do(f"br label %{head}")
    f.block(head)
    f.do(f"br i1 {condition()}, label %{inside}, label %{done}")
    f.block(inside)
    body()
    f.do(f"br label %{head}")
    f.block(done)


def _variable(f: Function, kind: str, start: Value | int) -> Value:
    """A local variable."""
    place = f.let(f"alloca {kind}")
    f.do(f"store {kind} {start}, ptr {place}")
    return place


def _element(f: Function, base: Value, index: Value) -> Value:
    """The address of one of several 64-bit numbers."""
    return f.let(f"getelementptr i64, ptr {base}, i64 {index}")


def _sift(name: str) -> Function:
    """sift(keys, count, at): keys[at] goes down until no child is larger."""
    f = Function(name, [("ptr", "keys"), ("i64", "count"), ("i64", "start")], linkage="internal")
    key = f.load("i64", _element(f, "%keys", "%start"), 0, 8)
    at, going = _variable(f, "i64", "%start"), _variable(f, "i1", "true")

    def child() -> Value:
        return f.int_op("add", f.int_op("shl", f.load("i64", at, 0, 8), 1), 1)

    def condition() -> Value:
        inside = f.let(f"icmp slt i64 {child()}, %count")
        return f.let(f"and i1 {inside}, {f.load('i1', going)}")

    def down() -> None:
        first = child()
        second = f.int_op("add", first, 1)
        last = f.let(f"icmp slt i64 {second}, %count")
        other = f.let(f"select i1 {last}, i64 {second}, i64 {first}")
        one, two = (f.load("i64", _element(f, "%keys", i), 0, 8) for i in (first, other))
        right = f.let(f"icmp ugt i64 {two}, {one}")
        larger = f.let(f"select i1 {right}, i64 {two}, i64 {one}")
        index = f.let(f"select i1 {right}, i64 {other}, i64 {first}")

        def move() -> None:
            f.store("i64", larger, _element(f, "%keys", f.load("i64", at, 0, 8)), 0, 8)
            f.store("i64", index, at, 0, 8)

        f.when(f.let(f"icmp ugt i64 {larger}, {key}"), move, lambda: f.store("i1", "false", going))

    _while(f, condition, down)
    f.store("i64", key, _element(f, "%keys", f.load("i64", at, 0, 8)), 0, 8)
    return f


def _gather(name: str, problem: NmsProblem) -> Function:
    """gather(scores, keys) -> how many places have a score above the threshold; their keys."""
    f = Function(name, [("ptr", "scores"), ("ptr", "keys")], linkage="internal", returns="i64")
    count, bits = _variable(f, "i64", 0), _variable(f, _BITS, 0)
    step, limit = problem.scores[2], problem.how.score

    def append(place: Value) -> None:
        score = f.load("float", f.at("%scores", f.int_op("mul", place, step)))
        bits = f.let(f"bitcast float {f.let(f'fadd float {score}, 0.0')} to i32")  # -0.0 is 0.0
        negative = f.let(f"ashr i32 {bits}, 31")
        flip = f.let(f"or i32 {negative}, -2147483648")
        ordered = f.let(f"zext i32 {f.let(f'xor i32 {bits}, {flip}')} to i64")
        after = f.int_op("xor", place, 0xFFFFFFFF)
        key = f.int_op("or", f.int_op("shl", ordered, 32), after)
        here = f.load("i64", count, 0, 8)
        f.store("i64", key, _element(f, "%keys", here), 0, 8)
        f.store("i64", f.int_op("add", here, 1), count, 0, 8)

    def one(place: Value) -> None:
        if limit is None:
            append(place)
            return
        score = f.load("float", f.at("%scores", f.int_op("mul", place, step)))
        above = f.let(f"fcmp ogt float {score}, {float_bits(limit)}")
        f.when(above, lambda: append(place))

    def block(index: Value, limit: float) -> None:
        first = f.int_op("mul", index, _BLOCK)
        scores = f.load(f"<{_BLOCK} x float>", f.at("%scores", f.int_op("mul", first, step)), 0, 4)
        bound = every("float", float_bits(limit), _BLOCK)
        above = f.let(f"fcmp ogt <{_BLOCK} x float> {scores}, {bound}")
        f.store(_BITS, f.let(f"bitcast <{_BLOCK} x i1> {above} to {_BITS}"), bits, 0, 4)

        def left() -> Value:
            return f.let(f"icmp ne {_BITS} {f.load(_BITS, bits, 0, 4)}, 0")

        def next_one() -> None:
            now = f.load(_BITS, bits, 0, 4)
            lane = f.call(_BITS, f"llvm.cttz.{_BITS}", (_BITS, now), ("i1", "true"))
            append(f.int_op("add", first, f.let(f"zext {_BITS} {lane} to i64")))
            rest = f.int_op("and", now, f.int_op("sub", now, 1, _BITS), _BITS)
            f.store(_BITS, rest, bits, 0, 4)

        _while(f, left, next_one)

    whole = 0
    if limit is not None and step == 4:
        whole = problem.places // _BLOCK
        f.repeat(0, whole, partial(block, limit=limit))
    f.repeat(whole * _BLOCK, problem.places, one)
    f.do(f"ret i64 {f.load('i64', count, 0, 8)}")
    return f


def _meets(name: str, problem: NmsProblem) -> Function:
    """meets(scratch, count, low x, high x, low y, high y, area) -> overlaps one of those taken."""
    args = [("ptr", "scratch"), ("i64", "count"), *(("float", name) for name in _FIELDS)]
    f = Function(name, args, linkage="internal", returns="i1")
    mine = {name: f.splat("float", f"%{name}") for name in _FIELDS}
    found, at = _variable(f, "i1", "false"), _variable(f, "i64", 0)

    def condition() -> Value:
        more = f.let(f"icmp slt i64 {f.load('i64', at, 0, 8)}, %count")
        alone = f.let(f"xor i1 {f.load('i1', found)}, true")
        return f.let(f"and i1 {more}, {alone}")

    def some() -> None:
        here = f.load("i64", at, 0, 8)
        byte = f.int_op("shl", here, 2)
        them = {
            name: f.load(F32S, f.at(f.at("%scratch", problem.field_at(name)), byte), 0, 64)
            for name in _FIELDS
        }
        flags = _overlap(f, mine, them, problem.how.overlap)
        bits = f.let(f"bitcast {_FLAGS} {flags} to i{LANES}")
        f.store("i1", f.let(f"icmp ne i{LANES} {bits}, 0"), found)
        f.store("i64", f.int_op("add", here, LANES), at, 0, 8)

    _while(f, condition, some)
    f.do(f"ret i1 {f.load('i1', found)}")
    return f


def _overlap(f: Function, a: dict[str, Value], b: dict[str, Value], limit: float) -> Value:
    """Where two boxes overlap by more than `limit`: `_overlaps` of the definition."""
    zero = "zeroinitializer"

    def compared(code: str, one: Value, two: Value) -> Value:
        return f.let(f"fcmp {code} {F32S} {one}, {two}")

    def chosen(code: str, key: str) -> Value:
        first = compared(code, a[key], b[key])
        return f.let(f"select {_FLAGS} {first}, {F32S} {a[key]}, {F32S} {b[key]}")

    sides = []
    for axis in "xy":
        high, low = chosen("olt", f"high_{axis}"), chosen("ogt", f"low_{axis}")
        sides.append(f.let(f"fsub {F32S} {high}, {low}"))
    both = f.let(f"fmul {F32S} {sides[0]}, {sides[1]}")
    areas = f.let(f"fadd {F32S} {a['area']}, {b['area']}")
    union = f.let(f"fsub {F32S} {areas}, {both}")
    share = f.let(f"fdiv {F32S} {both}, {union}")
    flags = compared("ogt", share, every("float", float_bits(limit)))
    for value in (*sides, both, a["area"], b["area"], union):
        flags = f.let(f"and {_FLAGS} {flags}, {compared('ogt', value, zero)}")
    return flags


def _walk(
    f: Function, problem: NmsProblem, sift: Function, gather: Function, meets: Function
) -> None:
    """All images and classes."""
    boxes, scores, results, count, scratch = (f.load("ptr", "%x", 8 * i, 8) for i in range(5))
    total = _variable(f, "i64", 0)
    cells = {key: f.let("alloca i64") for key in ("keys", "taken")}

    def one_class(image: Value, kind: Value) -> None:
        row = f.int_op("mul", image, problem.scores[0])
        row = f.int_op("add", row, f.int_op("mul", kind, problem.scores[1]))
        own = f.at(scores, row)
        found = f.let(f"call i64 @{gather.name}(ptr {own}, ptr {scratch})")
        half = f.int_op("lshr", found, 1)

        def heapify(i: Value) -> None:
            at = f.int_op("sub", f.int_op("sub", half, 1), i)
            f.do(f"call void @{sift.name}(ptr {scratch}, i64 {found}, i64 {at})")

        f.repeat(0, half, heapify)
        f.store("i64", found, cells["keys"], 0, 8)
        f.store("i64", "0", cells["taken"], 0, 8)
        inside = f.at(boxes, f.int_op("mul", image, problem.boxes[0]))
        _while(
            f,
            partial(_wanted, f, problem, cells),
            lambda: _candidate(
                f, problem, (sift, meets), (inside, results, scratch), cells, (image, kind), total
            ),
        )

    def one_image(image: Value) -> None:
        f.repeat(0, problem.classes, lambda kind: one_class(image, kind))

    f.repeat(0, problem.images if problem.most else 0, one_image)
    f.store("i64", f.load("i64", total, 0, 8), count, 0, 8)


def _wanted(f: Function, problem: NmsProblem, cells: dict[str, Value]) -> Value:
    """Whether candidates are left, and room."""
    some = f.let(f"icmp sgt i64 {f.load('i64', cells['keys'], 0, 8)}, 0")
    room = f.let(f"icmp slt i64 {f.load('i64', cells['taken'], 0, 8)}, {problem.most}")
    return f.let(f"and i1 {some}, {room}")


def _candidate(
    f: Function,
    problem: NmsProblem,
    called: tuple[Function, Function],
    memory: tuple[Value, Value, Value],
    cells: dict[str, Value],
    own: tuple[Value, Value],
    total: Value,
) -> None:
    """The highest key leaves the heap; its box is taken if it meets none."""
    (sift, meets), (boxes, results, scratch) = called, memory
    key = f.load("i64", scratch, 0, 8)
    left = f.int_op("sub", f.load("i64", cells["keys"], 0, 8), 1)
    f.store("i64", left, cells["keys"], 0, 8)
    f.store("i64", f.load("i64", _element(f, scratch, left), 0, 8), scratch, 0, 8)
    f.do(f"call void @{sift.name}(ptr {scratch}, i64 {left}, i64 0)")
    place = f.int_op("xor", f.int_op("and", key, 0xFFFFFFFF), 0xFFFFFFFF)
    box = _corners(f, f.at(boxes, f.int_op("mul", place, problem.boxes[1])), problem)
    taken = f.load("i64", cells["taken"], 0, 8)
    values = ", ".join(f"float {box[name]}" for name in _FIELDS)
    met = f.let(f"call i1 @{meets.name}(ptr {scratch}, i64 {taken}, {values})")

    def take() -> None:
        number = f.load("i64", total, 0, 8)
        row = f.at(results, f.int_op("mul", number, 24))
        for column, value in enumerate((*own, place)):
            f.store("i64", value, row, 8 * column, 8)
        f.store("i64", f.int_op("add", number, 1), total, 0, 8)
        byte = f.int_op("shl", taken, 2)
        fresh = f.let(f"icmp eq i64 {f.int_op('and', taken, LANES - 1)}, 0")
        fields = {name: f.at(f.at(scratch, problem.field_at(name)), byte) for name in _FIELDS}

        def clear() -> None:  # no box has the area 0, so the lanes behind the last one meet none
            f.store(F32S, "zeroinitializer", fields["area"], 0, 64)

        f.when(fresh, clear)
        for name, field in fields.items():
            f.store("float", box[name], field, 0, 4)
        f.store("i64", f.int_op("add", taken, 1), cells["taken"], 0, 8)

    f.when(met, lambda: None, take)


def _corners(f: Function, at: Value, problem: NmsProblem) -> dict[str, Value]:
    """The sides of a box and its area."""
    one, two, three, four = (f.load("float", at, i * problem.boxes[2], 4) for i in range(4))
    sides = []
    if problem.how.centred:
        for middle, size in ((one, three), (two, four)):
            half = f.let(f"fmul float {size}, {float_bits(0.5)}")
            sides += [f.let(f"fsub float {middle}, {half}"), f.let(f"fadd float {middle}, {half}")]
    else:
        for a, b in ((two, four), (one, three)):
            turned = f.let(f"fcmp oge float {a}, {b}")
            sides += [
                f.let(f"select i1 {turned}, float {b}, float {a}"),
                f.let(f"select i1 {turned}, float {a}, float {b}"),
            ]
    box = dict(zip(_SIDES, sides, strict=True))
    width, height = (f.let(f"fsub float {box[f'high_{a}']}, {box[f'low_{a}']}") for a in "xy")
    return {**box, "area": f.let(f"fmul float {width}, {height}")}
