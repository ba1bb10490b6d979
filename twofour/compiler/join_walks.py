"""Walks that follow each other as one: y = f(a, b), z = g(y, c)   =>   z = g(f(a, b), c).

What a detector does with its maps (chances to distances, distances to corners, corners to boxes,
steps to pixels) are a dozen operators of a few instructions each. Each alone reads and writes
memory. A walk takes any expression of its inputs (`Part.steps`), so a chain of them, and of the
moves between them, is one pass from the maps to the result.

A producer is taken into what reads it where

1. it is walks that copy or compute element by element, and so is what reads it; a softmax, or the
   expectation of one, may read through copies only;
2. all its readers are such walks, and its value is no output of the model;
3. functions that take long (exponentials, roots) are computed once for each element, as before;
4. it is no Concat that costs nothing, because what it joins is written in place (parts.py);
5. all dimensions are fixed, and the walk can be cut so that each input moves at even steps.

A softmax over an axis and the 1x1 convolution behind it that has one result are the expectation of
a distribution: that is one walk as well.

A MapOp, which has a kernel of its own, becomes a walk only where it is joined with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import POINT, ConvOp, MapOp, NativeOp, NotNative
from twofour.compiler.native_nd import BROADCAST, READERS, NdOp, NdValue, Part
from twofour.compiler.parts import is_join
from twofour.compiler.schedule import Schedule
from twofour.compiler.walk_inputs import TAKING, with_parts, without
from twofour.compiler.walks import without_unread
from twofour.core.functions import NO_ACTIVATION
from twofour.core.sizes import most
from twofour.kernels.cpu.nd_scalar import CHEAP


def join_walks(order: Schedule, graph: ir.Graph) -> Schedule:
    """The schedule with each chain of walks as one, where it can be.

    Args:
        order: of the graph, with moves joined.
        graph: static, after the passes.
    """
    joined = _Joined.of(order, graph)
    nodes = [node for stretch in order.stretches if stretch.native for node in stretch.nodes]
    for node in nodes:
        joined.take(node)
    ops = joined.ops
    if all(ops[node] is order.ops[node] for node in ops):
        return order
    return without_unread(replace(order, ops=ops), graph)


@dataclass
class _Joined:
    """The operators as far as they are joined.

    Attributes:
        order: as given.
        readers: of each value: how often each operator reads it.
        outputs: values that have to be written.
        ops: so far.
        written: value -> the walk that writes it.
    """

    order: Schedule
    readers: Mapping[str, Sequence[ir.Node]]
    outputs: frozenset[str]
    ops: dict[ir.Node, NativeOp]
    written: dict[str, NdOp] = field(default_factory=dict)

    @staticmethod
    def of(order: Schedule, graph: ir.Graph) -> _Joined:
        """Nothing is joined yet."""
        readers: dict[str, list[ir.Node]] = {}
        for node, op in order.ops.items():
            for name in dict.fromkeys(op.reads):
                readers.setdefault(name, []).append(node)
        kept = {value.name or "" for value in graph.outputs}
        native = set(order.ops)
        for node in graph:
            if node not in native:
                kept |= {value.name or "" for value in node.inputs if value is not None}
        return _Joined(order, readers, frozenset(kept), dict(order.ops))

    def take(self, node: ir.Node) -> None:
        """The next operator, joined with those before it that it can take in."""
        op = self.ops[node]
        expected = self._expected(op)
        if expected is not None:
            op = expected
        else:
            op = _as_walk(node, op)
        if not isinstance(op, NdOp):
            return
        before = op
        if not self._in_place(op):
            op = self._with_all_taken(op)
        if op is not before or expected is not None:
            self.ops[node] = op
        self.written |= dict.fromkeys(op.writes, op)

    def _with_all_taken(self, op: NdOp) -> NdOp:
        """`op` with all taken in that can be, and what these read in turn."""
        waiting, seen = list(op.reads), set(op.reads)
        while waiting:
            found = self._taken(op, waiting.pop(0))
            if found is not None:
                op = found
                fresh = [name for name in op.reads if name not in seen]
                waiting += fresh
                seen.update(fresh)
        return op

    def _taken(self, op: NdOp, name: str) -> NdOp | None:
        """`op` computing what `name` is by itself; None where it cannot."""
        before = self.written.get(name)
        if before is None or name in self.outputs or not self._worth(before, name):
            return None
        writing = [part for part in before.parts if before.values[part.y.value].name == name]
        parts: list[Part] = []
        values = list(op.values)
        for part in op.parts:
            found = without(part, name, values, before, writing)
            if found is None:
                return None
            parts += found
        return with_parts(op, values, parts, name)

    def _worth(self, before: NdOp, name: str) -> bool:
        """Whether its readers can all take it in, and nothing that takes long is done twice."""
        if self._in_place(before):
            return False
        readers = list(self._readers_of(name))
        if not all(_takes(reader) and not self._in_place(reader) for reader in readers):
            return False
        writing = [part for part in before.parts if before.values[part.y.value].name == name]
        if all(_cheap(part) for part in writing):
            return True
        value = next(value for value in before.values if value.name == name)
        turns = sum(
            math.prod(most(dim) for dim in part.dims)
            for reader in readers
            if isinstance(reader, NdOp)
            for part in reader.parts
            for look in part.inputs
            if reader.values[look.value].name == name
        )
        return turns <= math.prod(value.shape)

    def _readers_of(self, name: str) -> Iterator[NativeOp]:
        """Who reads a value, in the place of a Concat that costs something who reads that."""
        for node in self.readers.get(name, []):
            op = _as_walk(node, self.ops[node])
            if is_join(op) and not self._in_place(op) and op.y not in self.outputs:
                yield from self._readers_of(op.y)
            else:
                yield op

    def _in_place(self, op: NativeOp) -> bool:
        """Whether an operator is a Concat that may cost nothing.

        One does where it is written outside the arena, or joins what walks move there.
        """
        if not isinstance(op, NdOp) or not is_join(op) or op.y in self.outputs:
            return False
        names = [op.values[part.inputs[0].value].name for part in op.parts]
        return not all(name in self.written for name in names)

    def _expected(self, op: NativeOp) -> NdOp | None:
        """The expectation of a softmax, where `op` is the convolution that computes it."""
        if not isinstance(op, ConvOp) or not _is_sum(op):
            return None
        softmax = self.written.get(op.x)
        if softmax is None or len(self.readers.get(op.x, [])) != 1 or op.x in self.outputs:
            return None
        y = softmax.values[-1]
        along = [part.op == "softmax" and part.y.axes[-1][0] == 1 for part in softmax.parts]
        if len(y.shape) != 4 or y.kind != "float32" or not all(along):
            return None
        result = NdValue(op.y, (y.dims[0], 1, *y.dims[2:]), y.kind)
        weights = tuple(float(w) for w in (op.w.reshape(-1) * op.epilogue.scale[0]))
        scalars = (*weights, float(op.epilogue.bias[0]))
        parts = [
            replace(
                part,
                op="expect",
                y=replace(part.y, axes=(*part.y.axes[:-1], BROADCAST)),
                scalars=scalars,
            )
            for part in softmax.parts
        ]
        return replace(
            softmax,
            name=op.name,
            op_type="Expectation",
            y=op.y,
            values=(*softmax.values[:-1], result),
            parts=tuple(parts),
        )


def _as_walk(node: ir.Node, op: NativeOp) -> NativeOp:
    """The operator as a walk, if there is one for it."""
    reader = READERS.get(node.op_type) if isinstance(op, MapOp) and node.domain == "" else None
    if reader is None:
        return op
    try:
        return reader(node)
    except NotNative:
        return op


def _takes(op: NativeOp) -> bool:
    """Whether an operator may compute what it reads."""
    return isinstance(op, NdOp) and bool(op.parts) and all(p.op in TAKING for p in op.parts)


def _is_sum(op: ConvOp) -> bool:
    """Whether a convolution is a weighted sum of the channels, one number for each pixel."""
    e = op.epilogue
    return (
        op.w.dtype == np.float32
        and op.w.shape[0] == 1
        and op.w.shape[2:] == (1, 1)
        and op.window == POINT
        and op.groups == 1
        and not op.r
        and not op.dynamic
        and e.activation == NO_ACTIVATION
        and e.zero_point is None
        and not e.bfloat16
    )


def _cheap(part: Part) -> bool:
    """Whether a walk computes little for each element."""
    if part.op == "chain":
        return all(step.op in CHEAP for step in part.steps)
    return part.op in CHEAP
