"""The products of routed experts: each expert's rows, counted at run time, by its weights.

The inner kernel is that of any matrix product with an open number of rows (kernels/cpu/nest.py).
Around it: an expert's rows are cut into chunks that stay in L2 while all its weights pass by once;
a chunk costs its rows, and a few more for the weights, times the panels of output channels. Threads
share the sum of all costs evenly, wherever the router sent the tokens:

    for expert in experts: for chunk in chunks of its rows:
        for panel in panels: whose cost begins in this call's share of all:    product(chunk, panel)

Constants: the packed weights of each expert's first product, then of each one's second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twofour.core.dynamic import ROW_ZERO
from twofour.core.functions import Activation
from twofour.core.numerics import Epilogue
from twofour.core.plugins import Array, Problem, Stage
from twofour.kernels.cpu.functions import emit_silu
from twofour.kernels.cpu.llvm import Function, Value, module_text
from twofour.kernels.cpu.problem import Config, ConvProblem, Strides
from twofour.kernels.cpu.quantize_rows import RowsProblem, emit_rows
from twofour.kernels.cpu.rows import load16, store16
from twofour.kernels.cpu.tactic import Tactic
from twofour.kernels.cpu.vector import F32S
from twofour.operators.experts_plan import SHARES, Plan, Product, weights
from twofour.operators.experts_route import Parts, blocks, joined
from twofour.plugins import kernel

_STREAM_ROWS = 4  # to read a panel's weights takes as long as to compute so many rows
_ALIGNED_BYTES = 64


@dataclass(frozen=True)
class Layer:
    """One of the two products, as the kernels of a tactic do it for every expert.

    Attributes:
        number: 1 or 2.
        plan: sizes of all.
        tactic: the kernel and its packed weights.
        config: of the kernel.
        isa: the instruction set.
    """

    number: int
    plan: Plan
    tactic: Tactic
    config: Config
    isa: str

    @property
    def product(self) -> Product:
        """Its sizes."""
        return self.plan.first if self.number == 1 else self.plan.second

    @property
    def problem(self) -> ConvProblem:
        """What the kernel is asked."""
        return product_problem(self.plan, self.number, self.plan.usual_rows)

    @property
    def panels(self) -> int:
        """Of the kernel."""
        return self.tactic.kernel.work(self.problem, self.config)[1]

    def packed(self, problem: Problem) -> list[NDArray[np.uint8]]:
        """The weights of each expert as the kernel reads them, of whole lines."""
        name = str(self.number)
        w, bias = weights(problem, f"w{name}"), weights(problem, f"b{name}")
        scale = weights(problem, f"w{name}_scale") if self.plan.quantized else np.ones_like(bias)
        activation = Activation(self.problem.activation)
        found = []
        for expert in range(self.plan.experts):
            epilogue = Epilogue(scale[expert], bias[expert], activation=activation)
            zero = ROW_ZERO if self.plan.quantized else 0
            packed = self.tactic.kernel.pack(
                as_filters(w[expert]), self.problem, self.config, epilogue, zero
            )
            found.append(np.pad(packed, (0, -packed.size % _ALIGNED_BYTES)))
        return found


def as_filters(w: Array) -> Array:
    """[N, K] as the [N, K, 1, 1] of a convolution."""
    return w.reshape(*w.shape, 1, 1)


def product_problem(plan: Plan, number: int, rows: int) -> ConvProblem:
    """A product of one expert.

    Args:
        plan: sizes.
        number: of the product, 1 or 2.
        rows: that are usual.
    """
    product = plan.first if number == 1 else plan.second
    x, y = (Strides(plan.slots * p, p, p) for p in (product.x_pixel, product.y_pixel))
    return ConvProblem(
        1,
        rows,
        1,
        product.k,
        product.n,
        "int8" if plan.quantized else "float32",
        x,
        y,
        "float32",
        activation=plan.activation if number == 1 and not plan.gated else "",
        open_rows=True,
        dynamic="row" if plan.quantized else "",
    )


def product_stages(
    problem: Problem, plan: Plan, layers: Sequence[Layer]
) -> tuple[list[Stage], NDArray[np.uint8]]:
    """The two products, with what lies between them, and their constants."""
    first, second = layers
    packed = [layer.packed(problem) for layer in layers]
    sizes = [each[0].size for each in packed]
    stages = [Stage(_product_text(problem, first, (0, sizes[0])), SHARES, "first product")]
    if plan.quantized or plan.gated:
        name = "gate" if plan.gated else "quantize"
        stages.append(Stage(_between_text(problem, plan), SHARES, name))
    begin = sizes[0] * plan.experts
    text = _product_text(problem, second, (begin, sizes[1]))
    stages.append(Stage(text, SHARES, "second product"))
    return stages, np.concatenate([part for each in packed for part in each])


def _between_text(problem: Problem, plan: Plan) -> str:
    """What the first product gave: gated, if it has two halves, and quantized, if it is to be."""
    f = kernel()
    p = Parts.of(f, problem, plan)
    begin, end = p.share()
    if plan.gated:
        f.repeat(begin, end, lambda s: _gate(p, p.at("inner", s, plan.first.y_pixel)))
    if not plan.quantized:
        return module_text([f])
    x, y = p.at("inner"), p.at("halves")
    f.do(
        f"call void @kernel_rows(ptr {x}, ptr {x}, ptr {y}, ptr {y},"
        f" i64 {begin}, i64 {end}, i64 0, i64 1)"
    )
    rows = RowsProblem("row", plan.inner, plan.first.y_pixel)
    return joined(emit_rows("kernel_rows", rows), module_text([f]))


def _gate(p: Parts, row: Value) -> None:
    """silu(a) * b over a, the first half of a row."""
    f, half = p.f, 4 * p.plan.inner

    def block(at: int | Value, mask: str) -> None:
        a = load16(f, F32S, row, at, mask)
        b = load16(f, F32S, f.at(row, half), at, mask)
        store16(f, F32S, f.let(f"fmul {F32S} {emit_silu(f, a)}, {b}"), row, at, mask)

    blocks(f, p.plan.inner, block)


def _product_text(problem: Problem, layer: Layer, place: tuple[int, int]) -> str:
    """One product of every expert.

    Args:
        problem: of the operator.
        layer: the product.
        place: where the weights of the first expert lie in the constants, and how far it is to
            those of the next.
    """
    f = kernel()
    _Loops(f, Parts.of(f, problem, layer.plan), layer, place).emit()
    # Weights outside: a chunk of rows meets each panel once.
    config = replace(layer.config, panels_outside=True)
    product = layer.tactic.kernel.emit("kernel_product", layer.problem, config, layer.isa)
    return joined(product, module_text([f]))


@dataclass(frozen=True)
class _Loops:
    """The loops of a product over experts and chunks of their rows.

    Attributes:
        f: the kernel.
        parts: its pointers.
        layer: the product.
        place: of the weights, see `_product_text`.
    """

    f: Function
    parts: Parts
    layer: Layer
    place: tuple[int, int]

    def emit(self) -> None:
        """All of them."""
        f, experts = self.f, self.layer.plan.experts

        def add(e: Value, total: list[Value]) -> list[Value]:
            rows, chunks = self._rows(e)
            cost = f.int_op("add", rows, f.int_op("mul", chunks, _STREAM_ROWS))
            return [f.int_op("add", total[0], f.int_op("mul", cost, self.layer.panels))]

        total = f.loop(0, experts, [("i64", "0")], add)[0]
        share = tuple(f.int_op("udiv", f.int_op("mul", total, t), SHARES) for t in ("%t0", "%t1"))
        f.loop(0, experts, [("i64", "0")], lambda e, at: self._expert(e, at[0], share))

    def _rows(self, e: Value) -> tuple[Value, Value]:
        """How many an expert has, and in how many chunks."""
        f, chunk = self.f, self.layer.product.chunk
        begin, end = self.parts.load("begins", e), self.parts.load("begins", f.int_op("add", e, 1))
        rows = f.int_op("sub", end, begin)
        return rows, f.int_op("udiv", f.int_op("add", rows, chunk - 1), chunk)

    def _expert(self, e: Value, at: Value, share: tuple[Value, ...]) -> list[Value]:
        """One expert; returns the costs up to its end."""
        f, begin = self.f, self.parts.load("begins", e)
        rows, chunks = self._rows(e)
        # Even ones. There is no row to divide where there is no chunk.
        parts = f.call("i64", "llvm.umax.i64", ("i64", chunks), ("i64", "1"))
        height = f.int_op("udiv", f.int_op("sub", f.int_op("add", rows, parts), 1), parts)
        w = f.at("%w", f.int_op("add", f.int_op("mul", e, self.place[1]), self.place[0]))

        def chunk(c: Value, at: list[Value]) -> list[Value]:
            first = f.int_op("mul", c, height)
            left = f.int_op("sub", rows, first)
            count = f.call("i64", "llvm.umin.i64", ("i64", left), ("i64", height))
            cost = f.int_op("add", count, _STREAM_ROWS)
            mine = [self._panel(at[0], end, cost) for end in share]
            some = f.let(f"icmp slt i64 {mine[0]}, {mine[1]}")
            f.when(some, lambda: self._product(w, f.int_op("add", begin, first), count, mine))
            return [f.int_op("add", at[0], f.int_op("mul", cost, self.layer.panels))]

        return f.loop(0, chunks, [("i64", at)], chunk)

    def _panel(self, at: Value, end: Value, cost: Value) -> Value:
        """The first panel of a chunk whose cost begins at `end` or later."""
        f = self.f
        ahead = f.int_op("sub", end, at)
        ahead = f.call("i64", "llvm.smax.i64", ("i64", ahead), ("i64", "0"))
        panel = f.int_op("udiv", f.int_op("sub", f.int_op("add", ahead, cost), 1), cost)
        last = str(self.layer.panels)
        return f.call("i64", "llvm.umin.i64", ("i64", panel), ("i64", last))

    def _product(self, w: Value, slot: Value, rows: Value, panels: Sequence[Value]) -> None:
        """Some panels of a chunk that begins at a slot."""
        product, second = self.layer.product, self.layer.number == 2
        x = self.parts.at("halves" if second else "rows", slot, product.x_pixel)
        y = self.parts.at("results" if second else "inner", slot, product.y_pixel)
        self.f.do(
            f"call void @kernel_product(ptr {x}, ptr {w}, ptr {y}, ptr {y},"
            f" i64 0, i64 {rows}, i64 {panels[0]}, i64 {panels[1]})"
        )
