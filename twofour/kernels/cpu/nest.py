"""The loops around every convolution kernel, and what happens to its sums.

    for each panel of output channels, for each piece of rows, for each piece of columns:     (order: Config)
        sums = start                                     tile: rows x blocks accumulators, all in registers
        for each run of inputs, for each group of steps:
            sums = format.emit_group(...)                a kernel file's own part
        y = epilogue(sums)

A kernel has one signature, whatever it computes: `void kernel(x, w, y, r, t0, t1, p0, p1)`: row pieces t0..t1 and
panels p0..p1, so threads share a layer by ranges of either. Packed weights `w`:

    header 64 bytes: f32 residual scale, i32 residual zero point, f32 low, f32 high, i32 output zero point
    then per panel: the format's stream; then per block 16 x i32 start, 16 x f32 scale, 16 x f32 bias
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, Pieces, segments_of
from twofour.kernels.cpu.vector import BYTES16, F32S, I32S, Vector, every, float_bits

HEADER_BYTES = 64
CONSTANTS_BYTES = 3 * 4 * LANES
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds |v| < 2**22 half to even, leaving the integer in the low bits


class Format(Protocol):
    """A packed weight format and the inner loop that reads it."""

    name: str
    k_per_step: int
    steps_per_group: int

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of a group of `steps` steps for a panel of `blocks` blocks."""
        ...

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps, k_per_step] to uint8 [panels, group_bytes]."""
        ...

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """One group of steps: sums[row * blocks + block] += ...; `rows` are byte offsets from `x`."""
        ...


def panel_bytes(problem: ConvProblem, fmt: Format, blocks: int) -> int:
    """Bytes of one packed panel: stream and constants."""
    steps = -(-problem.segment_k // fmt.k_per_step)
    full, rest = divmod(steps, fmt.steps_per_group)
    run = full * fmt.group_bytes(blocks, fmt.steps_per_group) + (fmt.group_bytes(blocks, rest) if rest else 0)
    return problem.segments * run + blocks * CONSTANTS_BYTES


def pack(
    w: NDArray[Any], problem: ConvProblem, fmt: Format, blocks: int, epilogue: Epilogue, x_zero_point: int = 0
) -> NDArray[np.uint8]:
    """Weights and constants in the kernel's order.

    Args:
        w: [groups * n, c, KH, KW], int8 or float32.
        problem: the problem.
        fmt: the format.
        blocks: blocks of a panel.
        epilogue: its constants; zero points as stored, so a quantized y is unsigned.
        x_zero_point: of the input as stored (uint8).

    Returns:
        uint8 [HEADER_BYTES + panels * panel_bytes].
    """
    ordered = segments_of(w, problem, fmt.k_per_step)
    panels = ordered.shape[0] // blocks
    ordered = ordered.reshape(panels, blocks, *ordered.shape[1:])
    groups = []
    for segment in range(problem.segments):
        for first in range(0, ordered.shape[4], fmt.steps_per_group):
            groups.append(fmt.pack_group(ordered[:, :, :, segment, first : first + fmt.steps_per_group]))
    start = np.zeros(w.shape[0], np.int32)
    if problem.dtype == "int8":
        start = (-x_zero_point * w.reshape(w.shape[0], -1).astype(np.int64).sum(1)).astype(np.int32)
    constants = np.stack([_per_lane(c, problem).view(np.int32) for c in
                          (start, epilogue.scale.astype(np.float32), epilogue.bias.astype(np.float32))], axis=1)
    constants = constants.reshape(panels, -1).view(np.uint8)
    body = np.concatenate([*groups, constants], axis=1)
    return np.concatenate([header(epilogue, problem), body.reshape(-1)])


def _per_lane(values: NDArray[Any], problem: ConvProblem) -> NDArray[Any]:
    """[groups * n] to [groups * blocks, 16], zeros in the unused lanes."""
    grouped = values.reshape(problem.groups, problem.n)
    padded = np.pad(grouped, ((0, 0), (0, problem.blocks * LANES - problem.n)))
    return padded.reshape(problem.groups * problem.blocks, LANES)


def header(epilogue: Epilogue, problem: ConvProblem) -> NDArray[np.uint8]:
    """The 64 bytes before the panels."""
    low, high = epilogue.bounds()
    out = np.zeros(HEADER_BYTES // 4, np.int32)
    out[[0, 2, 3]] = np.array([epilogue.residual_scale, low, high], np.float32).view(np.int32)
    out[1] = epilogue.residual_zero_point
    if epilogue.zero_point is not None:
        out[4] = epilogue.zero_point
    return out.view(np.uint8)


def emit_kernel(name: str, problem: ConvProblem, fmt: Format, config: Config, isa: str) -> str:
    """The kernel as an LLVM module."""
    down = Pieces.of(problem.out_h, config.tile_h)
    across = Pieces.of(problem.out_w, config.tile_w)
    tiles = {
        (height, width): _tile(f"{name}_tile_{height}x{width}", problem, fmt, (height, width), config, isa)
        for height in down.sizes for width in across.sizes
    }
    f = Function(name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")])
    panel = panel_bytes(problem, fmt, config.blocks)
    per_group = problem.blocks // config.blocks
    y_bytes = 1 if problem.out == "int8" else 4
    r_bytes = 4 if problem.add == "float32" else 1
    r_strides = problem.r or problem.y

    def tile(at: dict[str, Value], p: Value, size: tuple[int, int]) -> None:
        """Calls the tile function of `size` on panel `p`."""
        w = f.at("%w", f.int_op("add", f.int_op("mul", p, panel), HEADER_BYTES))
        first = f.int_op("mul", p, config.blocks * LANES)
        x = at["x"]
        if problem.groups > 1:
            group = f.int_op("udiv", p, per_group)
            x = f.at(x, f.int_op("mul", group, problem.c * problem.x_bytes))
        y = f.at(at["y"], f.int_op("mul", first, y_bytes))
        r = f.at(at["r"], f.int_op("mul", first, r_bytes))
        left = f.int_op("sub", problem.n * problem.groups, first)
        callee = tiles[size]
        f.do(f"call void @{callee.name}(ptr {x}, ptr {w}, ptr {y}, ptr {r}, ptr %w, i64 {left})")

    def row_piece(t: Value, visit: Any) -> None:
        """Calls visit(pointers, size) for every tile of row piece t."""
        image, piece = f.int_op("udiv", t, down.count), f.int_op("urem", t, down.count)
        short = f.int_op("mul", piece, down.size if len(down.sizes) == 1 else down.size - 1)
        row = short
        if len(down.sizes) == 2:
            more = f.call("i64", "llvm.umin.i64", ("i64", piece), ("i64", str(down.big_count)))
            row = f.int_op("add", short, more)
        at = {}
        for key, strides, step in (("x", problem.x, problem.stride[0]), ("y", problem.y, 1), ("r", r_strides, 1)):
            moved = f.int_op("mul", image, strides.image)
            moved = f.int_op("add", moved, f.int_op("mul", row, strides.row * step))
            at[key] = f.at(f"%{key}", moved)
        if len(down.sizes) == 1:
            columns(at, down.size, visit)
        else:
            f.when(f.let(f"icmp ult i64 {piece}, {down.big_count}"),
                   lambda: columns(at, down.size, visit), lambda: columns(at, down.size - 1, visit))

    def columns(at: dict[str, Value], height: int, visit: Any) -> None:
        """The tiles of one row piece: first the wide ones, then the narrow ones."""
        strides = {"x": problem.x.pixel * problem.stride[1], "y": problem.y.pixel, "r": r_strides.pixel}
        counts = ((across.big_count, across.size), (across.count - across.big_count, across.size - 1))
        begin = 0
        for count, width in counts:
            if count == 0:
                continue
            start = {key: f.at(p, begin * strides[key]) for key, p in at.items()}

            def turn(j: Value, _: list[Value], start: dict[str, Value] = start, width: int = width) -> list[Value]:
                here = {k: f.at(p, f.int_op("mul", j, width * strides[k])) for k, p in start.items()}
                visit(here, (height, width))
                return []

            f.loop(0, count, [], turn)
            begin += count * width

    def panels(visit: Any) -> None:
        f.loop("%p0", "%p1", [], lambda p, _: visit(p) or [])

    def pieces(visit: Any) -> None:
        f.loop("%t0", "%t1", [], lambda t, _: visit(t) or [])

    if config.panels_outside:
        panels(lambda p: pieces(lambda t: row_piece(t, lambda at, size: tile(at, p, size))))
    else:
        pieces(lambda t: row_piece(t, lambda at, size: panels(lambda p: tile(at, p, size))))
    return module_text([*tiles.values(), f])


def _tile(
    name: str, problem: ConvProblem, fmt: Format, size: tuple[int, int], config: Config, isa: str
) -> Function:
    """One tile: every sum of `size` positions x `config.blocks` blocks, from start to store."""
    f = Function(name, [("ptr", p) for p in "xwyrh"] + [("i64", "left")], linkage="internal")
    v = Vector(isa, f)
    spots = [(i, j) for i in range(size[0]) for j in range(size[1])]
    stride_h, stride_w = problem.stride
    rows = [i * stride_h * problem.x.row + j * stride_w * problem.x.pixel for i, j in spots]
    stream = panel_bytes(problem, fmt, config.blocks) - config.blocks * CONSTANTS_BYTES
    constants = f.at("%w", stream)
    if problem.dtype == "int8":
        starts = [f.load(I32S, constants, b * CONSTANTS_BYTES, 4) for b in range(config.blocks)]
    else:
        starts = ["zeroinitializer"] * config.blocks
    sums = _runs(v, problem, fmt, rows, starts * len(rows), config)
    _epilogue(v, problem, spots, sums, constants, config.blocks)
    return f


def _runs(
    v: Vector, problem: ConvProblem, fmt: Format, rows: list[int], sums: list[Value], config: Config
) -> list[Value]:
    """The loops over a window: filter rows, taps where they are apart, groups of steps."""
    f, (dil_h, dil_w) = v.f, problem.dilation
    levels = [(problem.kernel[0], dil_h * problem.x.row)]
    if not problem.taps_joined:
        levels.append((problem.kernel[1], dil_w * problem.x.pixel))
    levels = [level for level in levels if level[0] > 1]
    kind = I32S if problem.dtype == "int8" else F32S
    steps = -(-problem.segment_k // fmt.k_per_step)
    full, rest = divmod(steps, fmt.steps_per_group)
    group_x = fmt.steps_per_group * fmt.k_per_step * problem.x_bytes
    blocks = config.blocks

    def group(x: Value, w: Value, sums: list[Value], count: int) -> tuple[Value, Value, list[Value]]:
        if config.prefetch_bytes:
            for line in range(0, fmt.group_bytes(blocks, count), 64):
                f.call("void", "llvm.prefetch.p0", ("ptr", f.at(w, config.prefetch_bytes + line)),
                       ("i32", "0"), ("i32", "3"), ("i32", "1"))
        sums = fmt.emit_group(v, rows, x, w, sums, count)
        return f.at(x, group_x), f.at(w, fmt.group_bytes(blocks, count)), sums

    def run(x: Value, w: Value, sums: list[Value]) -> tuple[Value, list[Value]]:
        if full > 1:
            def turn(_: Value, carried: list[Value]) -> list[Value]:
                x, w, after = group(carried[0], carried[1], carried[2:], fmt.steps_per_group)
                return [x, w, *after]
            x, w, *sums = f.loop(0, full, [("ptr", x), ("ptr", w), *((kind, s) for s in sums)], turn)
        elif full == 1:
            x, w, sums = group(x, w, sums, fmt.steps_per_group)
        if rest:
            x, w, sums = group(x, w, sums, rest)
        return w, sums

    def level(depth: int, x: Value, w: Value, sums: list[Value]) -> tuple[Value, list[Value]]:
        if depth == len(levels):
            return run(x, w, sums)
        count, stride = levels[depth]

        def turn(_: Value, carried: list[Value]) -> list[Value]:
            w, after = level(depth + 1, carried[0], carried[1], carried[2:])
            return [f.at(carried[0], stride), w, *after]

        x, w, *sums = f.loop(0, count, [("ptr", x), ("ptr", w), *((kind, s) for s in sums)], turn)
        return w, sums

    return level(0, "%x", "%w", sums)[1]


def _epilogue(
    v: Vector, problem: ConvProblem, spots: list[tuple[int, int]], sums: list[Value], constants: Value, blocks: int
) -> None:
    """`core.numerics.requantize`, operation by operation, and the store."""
    f = v.f
    scalar = {key: f.splat(kind, f.load(kind, "%h", offset, 4)) for key, kind, offset in
              (("r_scale", "float", 0), ("r_zero", "i32", 4), ("low", "float", 8), ("high", "float", 12))}
    zero_byte = f.splat("i8", f.load("i8", "%h", 16))
    for block in range(blocks):
        at = block * CONSTANTS_BYTES
        scale, bias = (f.load(F32S, constants, at + 64 * part, 4) for part in (1, 2))
        mask = _tail_mask(f, block) if problem.n % LANES else ""
        for row, (i, j) in enumerate(spots):
            value = sums[row * blocks + block]
            if problem.dtype == "int8":
                value = f.let(f"sitofp {I32S} {value} to {F32S}")
                value = f.let(f"fmul {F32S} {value}, {scale}")
            value = f.let(f"fadd {F32S} {value}, {bias}")
            if problem.add and problem.r is not None:
                where = i * problem.r.row + j * problem.r.pixel
                value = f.let(f"fadd {F32S} {value}, {_residual(f, problem, where, block, scalar, mask)}")
            where = i * problem.y.row + j * problem.y.pixel
            _store(f, problem, value, where, block, (scalar["low"], scalar["high"], zero_byte, mask))


def _tail_mask(f: Function, block: int) -> Value:
    """Which lanes of the panel's block `block` are real channels."""
    left = f.int_op("sub", "%left", block * LANES)
    lanes = "<" + ", ".join(f"i64 {lane}" for lane in range(LANES)) + ">"
    return f.let(f"icmp slt <16 x i64> {lanes}, {f.splat('i64', left)}")


def _residual(
    f: Function, problem: ConvProblem, where: int, block: int, scalar: dict[str, Value], mask: Value
) -> Value:
    """The residual of one position and block, times its scale, <16 x float>."""
    kind, width = (BYTES16, 1) if problem.add == "int8" else (F32S, 4)
    pointer = f.at("%r", where + block * LANES * width)
    if mask:
        stem = f"llvm.masked.load.v16{'i8' if width == 1 else 'f32'}.p0"
        raw = f.call(kind, stem, ("ptr", pointer), ("<16 x i1>", mask), (kind, "zeroinitializer"))
    else:
        raw = f.load(kind, pointer)
    if problem.add == "float32":
        return f.let(f"fmul {F32S} {raw}, {scalar['r_scale']}")
    wide = f.let(f"zext {BYTES16} {raw} to {I32S}")
    centred = f.let(f"sub {I32S} {wide}, {scalar['r_zero']}")
    return f.let(f"fmul {F32S} {f.let(f'sitofp {I32S} {centred} to {F32S}')}, {scalar['r_scale']}")


def _store(
    f: Function, problem: ConvProblem, value: Value, where: int, block: int, extra: tuple[Value, Value, Value, Value]
) -> None:
    """Clamps, rounds and narrows one position's block, and stores it."""
    low, high, zero_byte, mask = extra
    if problem.out == "float32":
        kind, width, name = F32S, 4, "v16f32"
        if problem.relu:
            value = f.call(F32S, "llvm.maxnum.v16f32", (F32S, value), (F32S, "zeroinitializer"))
    else:
        kind, width, name = BYTES16, 1, "v16i8"
        above = f.let(f"fcmp ogt {F32S} {value}, {low}")  # as maxps: a NaN becomes the bound
        value = f.let(f"select <16 x i1> {above}, {F32S} {value}, {F32S} {low}")
        below = f.let(f"fcmp olt {F32S} {value}, {high}")
        value = f.let(f"select <16 x i1> {below}, {F32S} {value}, {F32S} {high}")
        shifted = f.let(f"fadd {F32S} {value}, {every('float', float_bits(_ROUND))}")
        bits = f.let(f"bitcast {F32S} {shifted} to {I32S}")
        value = f.let(f"add {BYTES16} {f.let(f'trunc {I32S} {bits} to {BYTES16}')}, {zero_byte}")
    pointer = f.at("%y", where + block * LANES * width)
    if mask:
        f.call("void", f"llvm.masked.store.{name}.p0", (kind, value), ("ptr", pointer), ("<16 x i1>", mask))
    else:
        f.store(kind, value, pointer)
