"""Attention as one kernel: for each head softmax(q k^T * scale + mask) v, in three precisions.

    for each head of t0..t1:
        pack its keys, values and mask                          attention_pack.py
        for each tile of queries:
            scores = queries * keys, scaled and masked          attention_scores.py
            p = 2 ** (scores - maximum), and their sum          attention_powers.py, in int8
                                                                attention_bytes.py
            y = p / sum * values                                attention_results.py

Heads are channels of a token's row, so that the transposes and reshapes around an attention are
strides here. Same kernel signature as nest.py: x is q, y the output; t0..t1 counts heads of all
sequences, panels are not used. k, v and the mask lie at offsets from q that the header names. The
last tile of queries overlaps the one before it, so that all are of one size.

The scratch memory of a head (attention_plan.py) is on the stack, so that any number of threads has
its own. What does not fit there is refused.

Meaning: `core.attention`, bit for bit in int8. In float32, products are fused multiply-adds. A
result differs from the exact one by the rounding of the scores s, which enters e**s as it is, of
e**s itself, and of the sums; a masked key may count with a weight of 2**-125. With p the exact
weights,

    |y - exact| <= sum over keys of p |v| (E + sum(p E) + (k_len + 12) eps) + 2**-124 sum |v|
    E = (d + 4) eps scale * sum |q k| + 3 eps (|s| + |max s|)

to first order in E. In bfloat16 the probabilities are rounded, which adds 2**-8 p |v| for each key,
their powers are the short ones (2 * 1.2e-4 p |v|), and so is a result that is stored in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twofour.core.attention import AttentionScales
from twofour.core.numerics import MAX_K, Epilogue
from twofour.core.sizes import Count, most
from twofour.kernels.cpu.attention_bytes import emit_bytes
from twofour.kernels.cpu.attention_lengths import emit_lengths
from twofour.kernels.cpu.attention_pack import emit_key_mask, emit_keys, emit_values
from twofour.kernels.cpu.attention_plan import OWN_BYTES, TILES, Plan, whole_groups
from twofour.kernels.cpu.attention_powers import emit_powers
from twofour.kernels.cpu.attention_results import emit_results
from twofour.kernels.cpu.attention_scores import emit_scores
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.packing import header
from twofour.kernels.cpu.problem import ELEMENT_BYTES, Strides
from twofour.kernels.cpu.sizes import emit_size

_STACK_BYTES = 1 << 20  # threads have 8 MiB as a rule, and 2 at least


@dataclass(frozen=True)
class AttentionProblem:
    """One attention operator; head h is the channels h * d ... of a token's row.

    Of the strides `image` is that from one batch entry to the next and `pixel` that from one token
    to the next; `row` is not used.

    Attributes:
        batch: number of sequences.
        heads: heads of q and y.
        kv_heads: heads of k and v; head h of q uses h * kv_heads // heads.
        q_len: queries a sequence.
        k_len: keys a sequence.
        d: channels of a head of q and k.
        dv: channels of a head of v and y.
        dtype: of q, k and v: "int8" (stored as bytes, k and v with zero point 128), "bfloat16" or
            "float32".
        q: strides of q.
        k: strides of k.
        v: strides of v.
        y: strides of the output.
        out: dtype of the output, "int8", "bfloat16" or "float32".
        mask: what is added to the scores: "" nothing, "keys" float32 [batch, k_len], "full"
            float32 [q_len, k_len] for each batch entry and head.
        mask_batch: bytes from one batch entry's mask to the next, 0 where they share it.
        mask_head: bytes from one head's mask to the next, 0 where they share it ("full").
        mask_row: bytes from one query's mask to the next, 0 where they share it ("full").
        causal: query i sees the keys 0 ... i only.

    Where q_len or k_len is open, the header names the place of the symbols' values, and sequences
    lie one after the other: their `image` is not used.
    """

    batch: Count
    heads: int
    kv_heads: int
    q_len: Count
    k_len: Count
    d: int
    dv: int
    dtype: str
    q: Strides
    k: Strides
    v: Strides
    y: Strides
    out: str
    mask: str = ""
    mask_batch: Count = 0
    mask_head: int = 0
    mask_row: int = 0
    causal: bool = False

    def __post_init__(self) -> None:
        """Refuses heads that cannot be shared out, and what `why_not` refuses."""
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} of k and v evenly")
        if reason := why_not(self.dtype, most(self.k_len), self.d, self.dv):
            raise ValueError(reason)

    @property
    def pieces(self) -> Count:
        """Units of work that threads share: heads of all sequences."""
        return self.batch * self.heads

    def plan(self, isa: str) -> Plan:
        """One head's sizes."""
        opened = not isinstance(self.k_len, int)
        k_len = whole_groups(most(self.k_len)) if opened else most(self.k_len)
        plan = Plan.of(isa, self.dtype, k_len, self.d, self.dv)
        return replace(
            plan,
            tiles=-(-most(self.q_len) // plan.queries),
            queries=min(plan.queries, most(self.q_len)),
            mask=self.mask,
            causal=self.causal,
            out=self.out,
            open_keys=opened,
        )


def why_not(dtype: str, k_len: int, d: int, dv: int) -> str:
    """Why no kernel takes heads of this size; "" if one does.

    Args:
        dtype: of q, k and v: "int8", "bfloat16" or "float32".
        k_len: keys a sequence.
        d: channels of a head of q and k.
        dv: channels of a head of v.
    """
    if dtype == "int8" and max(k_len, d) > MAX_K:
        return (
            f"int8 attention over {k_len} keys of {d} channels: at most {MAX_K} products fit into"
            " an int32 sum"
        )
    if dtype == "bfloat16" and d % 2:
        return f"bfloat16 attention multiplies pairs of channels: heads have {d}, an odd number"
    plans = [Plan.of(isa, dtype, whole_groups(k_len), d, dv) for isa in TILES]
    needed = max(plan.scratch_bytes for plan in plans)
    if needed > _STACK_BYTES:
        return (
            f"{dtype} attention over {k_len} keys of {d} and values of {dv} channels needs"
            f" {needed} bytes of the stack, more than {_STACK_BYTES}"
        )
    return ""


@dataclass(frozen=True)
class Offsets:
    """Where the other operands and the symbols' values lie: bytes from q, the pointer `x`."""

    k: int
    v: int
    mask: int = 0
    symbols: int = 0


def pack_attention(scales: AttentionScales, offsets: Offsets) -> NDArray[np.uint8]:
    """The header, and after its 64 bytes that of packing.py, for the rounding of results.

        0 i64 k   8 i64 v   16 i64 mask   24 f32 score scale * log2(e)   28 f32 output scale
        32 i32 q_zero   40 i64 symbols

    Args:
        scales: of a float32 attention `score` is the factor of the scores, `y` and `y_zero` those
            of a quantized output, the rest is not used.
        offsets: of k, v and the mask from q.
    """
    out = np.zeros(OWN_BYTES // 4, np.int32)
    out[:6].view(np.int64)[:] = [offsets.k, offsets.v, offsets.mask]
    out[6:8].view(np.float32)[:] = [scales.score_log2, scales.out]
    out[8] = scales.q_zero
    out[10:12].view(np.int64)[0] = offsets.symbols
    none = np.zeros(1, np.float32)
    rounding = Epilogue(none, none, zero_point=scales.y_zero, unsigned=True)
    return np.concatenate([out.view(np.uint8), header(rounding)])


def emit_attention(name: str, problem: AttentionProblem, isa: str) -> str:
    """The kernel as an LLVM module.

    Args:
        name: its symbol.
        problem: what it computes.
        isa: instruction set.
    """
    f = Function(
        name, [("ptr", p) for p in "xwyr"] + [("i64", p) for p in ("t0", "t1", "p0", "p1")]
    )
    plan = problem.plan(isa)
    sizes = _Sizes.of(f, problem)
    tiles = _Heads(f, problem, plan, _parts(name, problem, plan), sizes)
    if isinstance(problem.q_len, int) or plan.queries == 1:
        tiles.emit()
        return module_text([*tiles.parts.values(), f])
    # Less than a tile of queries: one by one.
    one = replace(plan, queries=1)
    singles = _Heads(f, problem, one, _parts(f"{name}_one", problem, one), sizes)
    f.when(f.let(f"icmp uge i64 {sizes.q_len}, {plan.queries}"), tiles.emit, singles.emit)
    return module_text([*tiles.parts.values(), *singles.parts.values(), f])


def _parts(name: str, problem: AttentionProblem, plan: Plan) -> dict[str, Function]:
    """The functions that heads are made of."""
    q, y, m = problem.q.pixel, problem.y.pixel, problem.mask_row
    parts = {
        "keys": emit_keys(f"{name}_keys", plan, problem.k.pixel),
        "values": emit_values(f"{name}_values", plan, problem.v.pixel),
        "scores": emit_scores(f"{name}_scores", plan, q, m),
        "powers": (emit_bytes if plan.int8 else emit_powers)(f"{name}_powers", plan),
        "results": emit_results(f"{name}_results", plan, y),
    }
    if plan.overlaps:
        parts["both"] = emit_scores(f"{name}_both", plan, q, m, beside=True)
    return parts


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a problem, in the kernel where they are open.

    Attributes:
        q_len: queries a sequence.
        k_len: keys a sequence.
        images: bytes from one sequence to the next, of each operand.
    """

    q_len: int | Value
    k_len: int | Value
    images: dict[str, int | Value]

    @staticmethod
    def of(f: Function, problem: AttentionProblem) -> _Sizes:
        """As they are in the function `f`."""
        numbers = (problem.q_len, problem.k_len, problem.mask_batch)
        symbols = "%x"
        if not all(isinstance(n, int) for n in numbers):
            symbols = f.at("%x", f.load("i64", "%w", 40, 8))
        q_len, k_len, mask = (emit_size(f, symbols, n) for n in numbers)

        def image(strides: Strides, length: int | Value) -> int | Value:
            known = isinstance(length, int)
            return strides.image if known else f.int_op("mul", length, strides.pixel)

        images: dict[str, int | Value] = {"mask": mask}
        images |= {"q": image(problem.q, q_len), "y": image(problem.y, q_len)}
        images |= {"k": image(problem.k, k_len), "v": image(problem.v, k_len)}
        return _Sizes(q_len, k_len, images)


@dataclass(frozen=True)
class _Heads:
    """The loops of one kernel over heads and tiles.

    Attributes:
        f: the kernel.
        problem: what it computes.
        plan: one head's sizes.
        parts: the functions it calls.
        sizes: numbers that may be open.
    """

    f: Function
    problem: AttentionProblem
    plan: Plan
    parts: dict[str, Function]
    sizes: _Sizes

    def emit(self) -> None:
        """For each head of t0..t1: pack, then its tiles."""
        f, plan = self.f, self.plan
        offsets = {key: f.load("i64", "%w", 8 * i, 8) for i, key in enumerate(("k", "v", "mask"))}
        scratch = f.let(f"alloca [{plan.scratch_bytes} x i8], align 64")
        emit_lengths(f, plan, self.sizes.k_len, scratch)

        def head(t: Value) -> None:
            at = self._operands(t, offsets)
            self._call("keys", at["k"], scratch, "%w")
            self._call("values", at["v"], scratch)
            if plan.masks_keys:
                emit_key_mask(f, plan, at["mask"], scratch)
            (self._overlapping if plan.overlaps else self._one_by_one)(at, scratch)

        f.repeat("%t0", "%t1", head)

    def _call(self, part: str, *arguments: Value) -> None:
        function = self.parts[part]
        pairs = zip(function.args, arguments, strict=True)
        values = ", ".join(f"{kind} {value}" for (kind, _), value in pairs)
        self.f.do(f"call void @{function.name}({values})")

    def _one_by_one(self, at: dict[str, Value], scratch: Value) -> None:
        """Each tile from scores to results."""
        scores = self.f.at(scratch, self.plan.area("scores"))

        def tile(i: Value) -> None:
            q, y, m, first = self._tile(at, i)
            self._call("scores", q, scratch, scores, scores, m, "%w", first)
            self._call("powers", scratch, scores)
            self._call("results", scratch, scores, y, "%w")

        self.f.repeat(0, self._tiles(), tile)

    def _overlapping(self, at: dict[str, Value], scratch: Value) -> None:
        """The scores of each tile beside the exponentials of the one before."""
        f, plan = self.f, self.plan
        before = f.at(scratch, plan.area("scores"))
        after = f.at(before, plan.queries * plan.row_bytes)
        q, y, m, first = self._tile(at, "0")
        self._call("scores", q, scratch, before, before, m, "%w", first)

        def tile(i: Value, carried: list[Value]) -> list[Value]:
            here, there, results = carried
            q, y, m, first = self._tile(at, i)
            self._call("both", q, scratch, there, here, m, "%w", first)
            self._call("results", scratch, here, results, "%w")
            return [there, here, y]

        carried = [("ptr", before), ("ptr", after), ("ptr", y)]
        here, _, results = f.loop(1, self._tiles(), carried, tile)
        self._call("powers", scratch, here)
        self._call("results", scratch, here, results, "%w")

    def _tiles(self) -> int | Value:
        """How many tiles of queries there are."""
        count, each = self.sizes.q_len, self.plan.queries
        if isinstance(count, int):
            return self.plan.tiles
        return self.f.int_op("udiv", self.f.int_op("add", count, each - 1), each)

    def _tile(self, at: dict[str, Value], i: Value) -> tuple[Value, Value, Value, Value]:
        """Tile i's first query, result and mask, and the query's number."""
        f, problem = self.f, self.problem
        count, each = self.sizes.q_len, self.plan.queries
        last = str(count - each) if isinstance(count, int) else f.int_op("sub", count, each)
        first = f.int_op("mul", i, each)
        first = f.call("i64", "llvm.umin.i64", ("i64", first), ("i64", last))
        q, y, m = (
            f.at(at[key], f.int_op("mul", first, stride))
            for key, stride in (
                ("q", problem.q.pixel),
                ("y", problem.y.pixel),
                ("mask", problem.mask_row),
            )
        )
        return q, y, m, first

    def _operands(self, t: Value, offsets: dict[str, Value]) -> dict[str, Value]:
        """Pointers to piece t's first query, key, value, result and mask."""
        f, problem = self.f, self.problem
        batch, head = f.int_op("udiv", t, problem.heads), f.int_op("urem", t, problem.heads)
        shared = f.int_op("udiv", f.int_op("mul", head, problem.kv_heads), problem.heads)
        size, y_size = ELEMENT_BYTES[problem.dtype], ELEMENT_BYTES[problem.out]
        places = {
            "q": ("%x", head, problem.d * size),
            "k": (f.at("%x", offsets["k"]), shared, problem.d * size),
            "v": (f.at("%x", offsets["v"]), shared, problem.dv * size),
            "y": ("%y", head, problem.dv * y_size),
            "mask": (f.at("%x", offsets["mask"]), head, problem.mask_head),
        }
        return {
            key: f.at(
                f.at(base, f.int_op("mul", batch, self.sizes.images[key])),
                f.int_op("mul", which, stride),
            )
            for key, (base, which, stride) in places.items()
        }
