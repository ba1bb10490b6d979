"""Sparse attention for CPUs: from a problem to code of two stages, packing and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from twofour.core.attention import AttentionScales
from twofour.core.numerics import MAX_K
from twofour.core.plugins import Array, Attributes, Code, Problem, Stage
from twofour.core.plugins import Operand as Tensor
from twofour.core.sparse_attention import Pattern
from twofour.core.target import Target
from twofour.kernels.cpu.attention import Offsets, pack_attention
from twofour.kernels.cpu.llvm import Function, module_text
from twofour.kernels.cpu.problem import ELEMENT_BYTES
from twofour.operators.sparse_attention_kernel import Tables, emit_tiles
from twofour.operators.sparse_attention_lists import Lists
from twofour.operators.sparse_attention_pack import emit_pack
from twofour.operators.sparse_attention_plan import GROUP, STACK_BYTES, Operand, Plan, Tile
from twofour.plugins import kernel, pointers

STORED = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "uint8": "int8"}
"""Types of tensors, and how kernels call them."""
TILES = {
    "avx512vnni": ("8x3x2", "6x4x4", "4x4x4", "2x4x4", "1x4x4"),
    "dotprod": ("2x2x2", "4x1x1", "1x2x2"),
    "avx2": ("2x2x2", "4x1x1", "1x2x2"),
    "vector": ("2x1x1", "1x1x1"),
}
"""Of an instruction set, best guess first; few rows are for lists that are long."""
_TRIED = 3  # tiles, of those whose scores fit into a thread's stack
TILES_INT8 = {
    "avx512vnni": ("4x4x4", "8x2x2", "1x4x4"),
    "dotprod": ("2x2x2", "1x2x2"),
    "avx2": ("2x2x2", "1x2x2"),
    "vector": ("2x1x1", "1x1x1"),
}
"""The same in int8, where lists are whole groups of blocks."""
MIDDLE_BYTE = 128
"""Zero point of symmetric int8, as stored."""


@dataclass(frozen=True)
class Numbers:
    """The attributes of a node."""

    heads: int
    window: int
    global_tokens: int
    causal: int
    block: int
    scale: float

    @staticmethod
    def of(attributes: Attributes) -> Numbers:
        """Reads them.

        Raises:
            ValueError: one is no number.
        """
        found = {}
        for name in ("heads", "window", "global_tokens", "causal", "block", "scale"):
            value = attributes[name]
            if not isinstance(value, (int, float)):
                raise ValueError(f"expected a number for {name}, got {value!r}")
            found[name] = value
        scale = float(found.pop("scale"))
        return Numbers(**{name: int(value) for name, value in found.items()}, scale=scale)

    def pattern(self, length: int, blocks: Array) -> Pattern:
        """Which keys the queries of a sequence see.

        Raises:
            ValueError: the numbers make no sense.
        """
        shown = self.window, self.global_tokens, bool(self.causal), self.block
        return Pattern(length, *shown, np.asarray(blocks, np.int32))


def pattern_of(problem: Problem) -> Pattern:
    """Which keys a problem's queries see.

    Raises:
        ValueError: the attributes make no sense.
    """
    table = np.asarray(_present(problem, 4).constant)
    return Numbers.of(problem.attributes).pattern(_present(problem, 0).shape[1], table)


def _present(problem: Problem, index: int) -> Tensor:
    found = problem.inputs[index]
    if found is None:
        raise ValueError(f"{problem.operator} lacks input {index}")
    return found


def why_not(problem: Problem, target: Target, *, rounds: bool = False) -> str:
    """Why no kernel takes a problem; "" if one does.

    Args:
        problem: what a node asks.
        target: to build for.
        rounds: float32 is to be multiplied in bfloat16.
    """
    q, k, v, keep, table = (_present(problem, i) for i in range(5))
    y, heads = problem.outputs[0], problem.attributes["heads"]
    if table.constant is None:
        return "the table of blocks is computed while running: expected a constant"
    if not q.shape == k.shape == v.shape == y.shape or len(q.shape) != 3:
        return f"expected q, k, v [batch, length, channels], got {q.shape}, {k.shape}, {v.shape}"
    if not isinstance(heads, int) or heads < 1 or q.shape[2] % heads:
        return f"{q.shape[2]} channels are not {heads} heads"
    if keep.dtype != "bool":
        return f"expected a mask of keys of bool, got {keep.dtype}"
    if reason := _why_not_types(problem, target, q.shape[2] // heads, rounds):
        return reason
    for each, name in ((q, "q"), (k, "k"), (v, "v"), (y, "y")):
        if each.strides[2] != ELEMENT_BYTES[STORED[each.dtype]]:
            return f"the channels of {name} are not neighbours"
    fits = _fitting(problem, target, rounds)
    return "" if fits else "no tile's scores fit into a thread's stack"


def _why_not_types(problem: Problem, target: Target, d: int, rounds: bool) -> str:
    """The same as far as types and channels of a head go."""
    q, k, v = (_present(problem, i) for i in range(3))
    y = problem.outputs[0]
    kinds = {STORED.get(each.dtype, each.dtype) for each in (q, k, v)}
    if len(kinds) > 1 or not kinds <= set(STORED) or y.dtype not in STORED:
        return f"no kernel for q, k, v of {sorted(kinds)} and y of {y.dtype}"
    (kind,) = kinds
    if rounds and kind != "float32":
        return f"q, k and v are {kind}: only float32 is rounded to bfloat16"
    kind = "bfloat16" if rounds else kind
    if d * ELEMENT_BYTES[kind] % 4:
        return f"heads of {d} channels of {kind}: expected whole units of 4 bytes"
    if kind == "bfloat16" and not target.bf16:
        return f"nothing is multiplied in bfloat16 on {target}"
    return _why_not_int8(problem, d) if kind == "int8" else ""


def _why_not_int8(problem: Problem, d: int) -> str:
    """The same for bytes."""
    q, k, v = (_present(problem, i) for i in range(3))
    if max(q.shape[1], d) > MAX_K:
        return f"{q.shape[1]} keys of {d} channels: at most {MAX_K} products fit into an int32 sum"
    if any(stored_zero(each) != MIDDLE_BYTE for each in (k, v)):
        return "expected symmetric k and v, of zero point 0 in int8"
    if any(each.scale is None or np.size(each.scale) != 1 for each in (q, k, v)):
        return "expected one scale a tensor"
    return ""


def configs(problem: Problem, target: Target, *, rounds: bool = False) -> Sequence[str]:
    """Tiles to try, of a problem that is taken."""
    return _fitting(problem, target, rounds)[:_TRIED]


def _fitting(problem: Problem, target: Target, rounds: bool) -> list[str]:
    """Tiles whose scratch memory fits."""
    int8 = STORED[_present(problem, 0).dtype] == "int8"
    found = []
    for text in (TILES_INT8 if int8 else TILES)[target.isa]:
        plan = plan_of(problem, target, Tile.parse(text), _most(problem), rounds)
        if plan.scratch_bytes <= STACK_BYTES:
            found.append(text)
    return found


def _most(problem: Problem) -> int:
    """A bound of the blocks of a list: all of them where there are global tokens, else a scan."""
    pattern = pattern_of(problem)
    every = -(-pattern.length // 16)
    if pattern.global_tokens or pattern.window * 2 >= pattern.length:
        return every + GROUP * 3
    firsts = range(0, pattern.length, pattern.block)
    most = max(len(pattern.candidates(i, min(i + 16, pattern.length), 16)) for i in firsts)
    return min(most, every) + GROUP * 3


def plan_of(problem: Problem, target: Target, tile: Tile, longest: int, rounds: bool) -> Plan:
    """The sizes of a problem.

    Args:
        problem: what a node asks.
        target: to build for.
        tile: of the products.
        longest: blocks of the longest list.
        rounds: see `why_not`.
    """
    q, k, v, keep = (_present(problem, i) for i in range(4))
    y = problem.outputs[0]
    heads = Numbers.of(problem.attributes).heads
    batch, length, channels = q.shape
    tile = replace(tile, rows=min(tile.rows, length))
    steps = [s if n > 1 else 0 for s, n in zip(keep.strides, keep.shape, strict=True)]
    return Plan(
        target.isa,
        "bfloat16" if rounds else STORED[q.dtype],
        STORED[q.dtype],
        STORED[y.dtype],
        batch,
        length,
        heads,
        channels // heads,
        tile,
        longest,
        not (keep.constant is not None and bool(np.all(keep.constant))),
        _place(q),
        _place(k),
        _place(v),
        _place(y),
        Operand(steps[0], steps[1]),
    )


def _place(operand: Tensor) -> Operand:
    """Where it lies; bytes of uint8 are read as they are."""
    batch, token, _ = operand.strides
    return Operand(batch, token, operand.biased or operand.dtype != "int8")


def emit(problem: Problem, target: Target, config: str, *, rounds: bool = False) -> Code:
    """The code of a problem with one tile; see `why_not`."""
    tile = Tile.parse(config)
    pattern = pattern_of(problem)
    int8 = STORED[_present(problem, 0).dtype] == "int8"
    lists = Lists.of(pattern, tile.rows, tile.keys, GROUP if int8 else 1)
    plan = plan_of(problem, target, tile, lists.longest, rounds)
    constants, tables = _constants(problem, lists)
    pack, tiles = kernel(), kernel()
    emit_pack(pack, plan, _pointers(pack, problem))
    parts = emit_tiles(tiles, plan, _pointers(tiles, problem), tables)
    return Code(
        (
            Stage(module_text([pack]), plan.batch * plan.blocks * plan.heads, "pack"),
            Stage(module_text([*parts, tiles]), plan.batch * plan.heads * lists.pieces, "products"),
        ),
        constants,
        plan.workspace_bytes,
        precision=plan.dtype,
    )


def _pointers(f: Function, problem: Problem) -> dict[str, str]:
    """Of the operands by name, and of the workspace."""
    names = [("q", "k", "v", "keep", "blocks")[i] for i, x in enumerate(problem.inputs) if x]
    return dict(zip([*names, "y", "workspace"], pointers(f, problem), strict=True))


def scales_of(problem: Problem) -> AttentionScales:
    """Scales and zero points; of a float problem only those of the scores and of y count."""
    q, k, v = (_present(problem, i) for i in range(3))
    y, numbers = problem.outputs[0], Numbers.of(problem.attributes)
    score = numbers.scale or (q.shape[2] // numbers.heads) ** -0.5
    if q.scale is not None and k.scale is not None and v.scale is not None:
        score *= float(np.float64(_one(q.scale)) * _one(k.scale))
    quantized = y.scale is not None
    return AttentionScales(
        score,
        stored_zero(q),
        _one(v.scale) if v.scale is not None else 1.0,
        _one(y.scale) if y.scale is not None else 1.0,
        stored_zero(y) if quantized else None,
    )


def stored_zero(operand: Tensor) -> int:
    """The zero point of bytes; int8 are stored plus 128."""
    return operand.zero_point + (MIDDLE_BYTE if operand.dtype == "int8" else 0)


def _one(scale: Array) -> float:
    return float(np.asarray(scale).reshape(-1)[0])


def _constants(problem: Problem, lists: Lists) -> tuple[Array, Tables]:
    """The header of dense attention, then the tables."""
    header = pack_attention(scales_of(problem), Offsets(0, 0))
    at, places, out = 0, [], []
    for part in (header, lists.tiles, lists.entries, lists.masks, lists.bounds):
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        data = np.pad(data, (0, -data.size % 64))
        places.append(at)
        out.append(data)
        at += data.size
    _, tiles, entries, masks, bounds = places
    return np.concatenate(out), Tables(tiles, entries, masks, bounds, lists.pieces)
