"""Concat without copies: which values are written as channels of a wider one.

    Concat(a, b) along channels   ->   a is channels 0.. of the result, b those behind it

What computes a and b then writes into the wide tensor, pixel by pixel with its step, and the Concat
is nothing. A value that is itself made of views (halves of a Split that meet again) counts as what
they are views of, if all of it lies there in its own order.

A value stays beside the wide tensor, and is copied, where

1. no kernel computes it (an input of the model, a constant, the result of a fallback), or one
   writes it as a plain array alone;
2. it is part of another Concat already, or stands at two places of this one: the first one has it;
3. only some of its channels, or of its images, are joined;
4. convolutions read it with another zero point than other parts: they share one halo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twofour.compiler.native import ConvOp, NativeOp, ViewOp, extent
from twofour.compiler.native_nd import NdOp
from twofour.core.sizes import most

Ints = tuple[int, ...]

_KINDS = ("float32", "bfloat16", "int8", "uint8")


@dataclass(frozen=True)
class Where:
    """Channels of a value.

    Attributes:
        of: the value.
        first: channel of it.
    """

    of: str
    first: int


def is_join(op: NativeOp) -> bool:
    """Whether the operator is a Concat of channels."""
    if not isinstance(op, NdOp) or op.op_type != "Concat":
        return False
    y = op.values[-1]
    rank = len(y.shape)
    if rank < 2 or rank > 4 or y.kind not in _KINDS:
        return False
    axis = channel_axis(rank)
    if not all(isinstance(part.y.start[axis], int) for part in op.parts):
        return False  # where a part starts is known only when running
    others = [part.y.start[:axis] + part.y.start[axis + 1 :] for part in op.parts]
    return all(start == 0 for starts in others for start in starts)


def channel_axis(rank: int) -> int:
    """The axis of [N, C, H, W] or [..., C] that counts channels."""
    return 1 if rank == 4 else rank - 1


def first_channels(op: NdOp) -> list[int]:
    """Where each operand of a join starts in the result."""
    axis = channel_axis(len(op.values[-1].shape))
    return [most(part.y.start[axis]) for part in op.parts]


@dataclass(frozen=True)
class Parts:
    """Which values are parts of which.

    Attributes:
        part_of: value -> its place in a wider one.
        views: value that is another name for channels of another one -> these; `first` is -1 where
            it is more than that, as one image of several.
    """

    part_of: dict[str, Where]
    views: Mapping[str, Where]

    @staticmethod
    def of(
        ops: Sequence[NativeOp], shapes: Callable[[str], Ints], held: Callable[[str], bool]
    ) -> Parts:
        """Decides for all native operators.

        Args:
            ops: in the order of execution.
            shapes: of each value.
            held: whether a value that a kernel computes is written into the arena.
        """
        found = Parts({}, _views(ops))
        zeros = found.zero_points(ops)
        computed = {name for op in ops if op.kind != "alias" for name in op.writes}
        for op in ops:
            if not isinstance(op, NdOp) or not is_join(op) or not held(op.y):
                continue
            for name, first in found.whole_operands(op, shapes).items():
                if name not in computed or not held(name) or name in found.part_of:
                    continue
                wide = found.root(op.y)
                both = zeros.get(wide, set()) | zeros.get(name, set())
                if len(both) <= 1:
                    found.part_of[name] = Where(op.y, first)
                    zeros[wide] = both
        return found

    def root(self, name: str) -> str:
        """The value that the bytes of a value are allocated for."""
        further = self.views.get(name) or self.part_of.get(name)
        return name if further is None else self.root(further.of)

    def origin(self, name: str) -> Where:
        """The value that is computed, and the channels of it that a value is another name for."""
        view = self.views.get(name)
        if view is None:
            return Where(name, 0)
        further = self.origin(view.of)
        return Where(further.of, -1 if view.first < 0 else further.first + view.first)

    def zero_points(self, ops: Sequence[NativeOp]) -> dict[str, set[int]]:
        """Value -> the zero points that convolutions read its bytes with."""
        found: dict[str, set[int]] = {}
        for op in ops:
            if isinstance(op, ConvOp) and op.w.dtype == np.int8:
                found.setdefault(self.root(op.x), set()).add(op.x_zero)
        return found

    def whole_operands(self, op: NdOp, shapes: Callable[[str], Ints]) -> dict[str, int]:
        """The values of which all channels are joined, and where the first one goes."""
        begins: dict[str, int] = {}
        runs: dict[str, list[tuple[int, int]]] = {}
        y = op.values[-1].shape
        for part, first in zip(op.parts, first_channels(op), strict=True):
            value = op.values[part.inputs[0].value]
            origin = self.origin(value.name)
            if not value.name or origin.first < 0:
                continue
            begin = begins.setdefault(origin.of, first - origin.first)
            if begin == first - origin.first:
                run = origin.first, origin.first + value.shape[channel_axis(len(value.shape))]
                runs.setdefault(origin.of, []).append(run)
        size = {name: extent(shapes(name)) for name in begins}
        return {
            name: begin
            for name, begin in begins.items()
            if size[name][:3] == extent(y)[:3] and _covers(runs[name], size[name][3])
        }


def _views(ops: Sequence[NativeOp]) -> dict[str, Where]:
    """What views and aliases are other names for."""
    found: dict[str, Where] = {}
    for op in ops:
        if isinstance(op, ViewOp):
            some = op.pixels or op.image or op.image_step != 1
            firsts = [-1 if some else first for first in op.channels]
            found |= {n: Where(op.x, f) for n, f in zip(op.writes, firsts, strict=True)}
        elif op.kind == "alias":
            found[op.y] = Where(op.x, 0)
    return found


def _covers(runs: list[tuple[int, int]], channels: int) -> bool:
    """Whether runs of channels, begin to end, are all channels."""
    done = 0
    for begin, end in sorted(runs):
        done = max(done, end) if begin <= done else done
    return done == channels
