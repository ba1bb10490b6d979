"""Fused graph -> operators over tensors, each value in the arena or a plain array between steps.

A value is native if a kernel needs it channels-last in the arena, plain if it is an input or output
of the model or crosses to a fallback. Where it is both, a copy stands beside its producer or first
reader. Quantize and dequantize read and write plain arrays themselves, so the ends of a network
cost no extra pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.layout import Tensor
from twofour.compiler.memory import Life, plan
from twofour.compiler.native import ConvOp, MapOp, NativeOp, extent, shape, static_shape
from twofour.compiler.schedule import Schedule, Stretch, reads
from twofour.core.errors import UnsupportedError
from twofour.engine import DTYPES, Fill, TensorInfo

Place = Tensor | TensorInfo


@dataclass(frozen=True)
class Placed:
    """A native operator, with each operand's place: a tensor of the arena, or a plain array."""

    op: NativeOp
    x: Place
    y: Place
    r: Place | None = None

    @property
    def plain_reads(self) -> list[str]:
        """Names of the plain arrays it reads."""
        return [p.name for p in (self.x, self.r) if isinstance(p, TensorInfo)]

    @property
    def plain_writes(self) -> list[str]:
        """Names of the plain arrays it writes."""
        return [self.y.name] if isinstance(self.y, TensorInfo) else []


@dataclass(frozen=True)
class Section:
    """One step of the engine to be: placed operators, or the nodes of a fallback.

    Attributes:
        native: whether kernels run it.
        ops: the operators of a native step.
        nodes: the nodes of a fallback step.
        inputs: plain values it reads.
        outputs: plain values it writes.
    """

    native: bool
    ops: tuple[Placed, ...]
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """A graph ready for kernels.

    Attributes:
        sections: in order.
        plain: plain values by name.
        arena_bytes: activation memory.
        fills: halo regions of the arena.
    """

    sections: tuple[Section, ...]
    plain: Mapping[str, TensorInfo]
    arena_bytes: int
    fills: tuple[Fill, ...]


def lower(graph: ir.Graph, order: Schedule) -> Lowered:
    """Assigns places, layouts and memory.

    Args:
        graph: after the passes.
        order: its schedule.

    Raises:
        UnsupportedError: an output is a constant, a tensor is read with two zero points, or one
            that crosses between steps has no static shape or a type that engines do not hold.
    """
    if constants := [value.name for value in graph.outputs if value.is_initializer()]:
        raise UnsupportedError(
            f"output {constants[0]!r} is a constant of the model",
            ["expected outputs that are computed"],
            "remove it from the model's outputs",
        )
    forms = _Forms(graph, order)
    placed = [forms.place(stretch) for stretch in order.stretches]
    ops = [p for part in placed for p in part]
    _set_halos(ops)
    arena_bytes, fills = plan(forms.arena(), _lives(ops))
    sections = _sections(order.stretches, placed, graph)
    names = [n for s in sections for n in (*s.inputs, *s.outputs)]
    names += [value.name or "" for value in (*graph.inputs, *graph.outputs)]
    return Lowered(sections, {n: forms.info(n) for n in names}, arena_bytes, fills)


class _Forms:
    """Which values are native and which plain, decided for the whole graph before any is placed."""

    def __init__(self, graph: ir.Graph, order: Schedule) -> None:
        native = [order.ops[n] for s in order.stretches if s.native for n in s.nodes]
        outside = [n for s in order.stretches if not s.native for n in s.nodes]
        crossing = [
            v for n in outside for v in (*reads(n), *n.outputs) if v.const_value is None and v.name
        ]
        crossing += [*graph.inputs, *graph.outputs]
        self._order = order
        self._values = {v.name: v for n in graph for v in (*n.inputs, *n.outputs) if v is not None}
        self._plain = {v.name: v for v in crossing}
        self._values |= self._plain
        rigid = [op for op in native if not _flexible(op)]
        self._read_native = {name for op in rigid for name in (op.x, op.r) if name}
        self._read = {name for op in native for name in (op.x, op.r) if name}
        self._tensors: dict[str, Tensor] = {}

    def info(self, name: str) -> TensorInfo:
        """A plain value, where it is needed between steps."""
        return _info(self._plain[name])

    def arena(self) -> list[Tensor]:
        """Every tensor once; aliases share one."""
        return list({id(t): t for t in self._tensors.values()}.values())

    def place(self, stretch: Stretch) -> list[Placed]:
        """The operators of a stretch, with copies where a value changes form."""
        out: list[Placed] = []
        for node in stretch.nodes if stretch.native else ():
            op = self._order.ops[node]
            if _flexible(op):
                x: Place = self._tensors.get(op.x) or self.info(op.x)
                r = None
            else:
                x, r = self._enter(op.x, out), self._enter(op.r, out) if op.r else None
            if op.kind == "alias":
                assert isinstance(x, Tensor)
                self._tensors[op.y] = x
                y: Place = x
            else:
                y = self._destination(op)
                out.append(Placed(op, x, y, r))
            if isinstance(y, Tensor) and op.y in self._plain:
                copy = MapOp(f"{op.name}/plain", "Copy", "map", op.y, op.y)
                out.append(Placed(copy, y, self.info(op.y)))
        return out

    def _destination(self, op: NativeOp) -> Place:
        """Where an operator writes."""
        if op.y not in self._plain or op.y in self._read_native:
            return self._tensor(op.y)
        value = self._values[op.y]
        # A float vector per image lies the same way in both forms.
        vector = (
            value.shape is not None and len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT
        )
        if _flexible(op) or (vector and op.kind == "conv" and op.y not in self._read):
            return self.info(op.y)
        return self._tensor(op.y)

    def _enter(self, name: str, out: list[Placed]) -> Tensor:
        """The tensor of a value, copied into the arena where it so far is a plain array only."""
        if name not in self._tensors:
            tensor = self._tensor(name)
            copy = MapOp(f"{name}/native", "Copy", "map", name, name)
            out.append(Placed(copy, self.info(name), tensor))
        return self._tensors[name]

    def _tensor(self, name: str) -> Tensor:
        value = self._values[name]
        kind = "float32" if value.dtype == ir.DataType.FLOAT else "u8"
        batch, height, width, channels = extent(shape(value))
        self._tensors[name] = Tensor(name, batch, height, width, channels, kind)
        return self._tensors[name]


def _flexible(op: NativeOp) -> bool:
    """Whether an operator reads and writes plain arrays as well as tensors."""
    return isinstance(op, MapOp) and op.op == "convert"


def _info(value: ir.Value) -> TensorInfo:
    """A plain value's name, dtype and shape."""
    dims, dtype = static_shape(value), value.dtype
    if dims is None:
        raise UnsupportedError(
            f"the shape of {value.name!r} is not known before running",
            [f"found {value.shape}: it depends on the data"],
            "cut the model so that this tensor is neither an output nor between two steps",
        )
    kind = dtype.numpy().name if dtype is not None else ""
    if kind not in DTYPES:
        raise UnsupportedError(
            f"tensor {value.name!r} has a type that an engine does not pass on",
            [f"expected one of {', '.join(sorted(DTYPES))}", f"found {dtype}"],
            "cast it within the model",
        )
    return TensorInfo(value.name or "", kind, dims)


def _set_halos(ops: list[Placed]) -> None:
    """Widens what convolutions read, and fixes what the halo holds."""
    zero: dict[int, int] = {}
    for placed in ops:
        op, x = placed.op, placed.x
        if not isinstance(op, ConvOp) or not isinstance(x, Tensor):
            continue
        x.widen(op.window)
        if zero.setdefault(id(x), op.x_zero) != op.x_zero:
            raise UnsupportedError(
                f"tensor {x.name!r} is read with two zero points",
                [
                    f"{op.name} reads it with {op.x_zero}, another layer with {zero[id(x)]}"
                    " (as stored)"
                ],
                "quantize the tensor once",
            )
        x.fill = op.x_zero


def _lives(ops: list[Placed]) -> dict[str, Life]:
    """When each tensor is first written and last read, by tensor name."""
    lives: dict[str, Life] = {}
    for index, placed in enumerate(ops):
        for place in (placed.x, placed.r, placed.y):
            if isinstance(place, Tensor):
                first = lives[place.name].first if place.name in lives else index
                replaces = lives[place.name].replaces if place.name in lives else ""
                lives[place.name] = Life(first, index, replaces)
        if (
            isinstance(placed.op, ConvOp)
            and isinstance(placed.r, Tensor)
            and isinstance(placed.y, Tensor)
            and placed.r is not placed.x  # which later tiles still read
        ):
            life = lives[placed.y.name]
            lives[placed.y.name] = Life(life.first, life.last, placed.r.name)
    return lives


def _sections(
    stretches: tuple[Stretch, ...], placed: list[list[Placed]], graph: ir.Graph
) -> tuple[Section, ...]:
    """The steps, with the plain values each reads and writes."""
    read = [
        [n for p in part for n in p.plain_reads]
        if stretch.native
        else [
            v.name or ""
            for n in stretch.nodes
            for v in reads(n)
            if v.const_value is None and v.name
        ]
        for stretch, part in zip(stretches, placed, strict=True)
    ]
    finals = {v.name for v in graph.outputs}
    sections = []
    for index, (stretch, part) in enumerate(zip(stretches, placed, strict=True)):
        later = {name for names in read[index + 1 :] for name in names} | finals
        if stretch.native:
            writes = [n for p in part for n in p.plain_writes]
        else:
            writes = [v.name or "" for n in stretch.nodes for v in n.outputs]
        inputs = dict.fromkeys(name for name in read[index] if name not in writes)
        outputs = dict.fromkeys(name for name in writes if name in later or stretch.native)
        nodes = () if stretch.native else stretch.nodes
        sections.append(Section(stretch.native, tuple(part), nodes, tuple(inputs), tuple(outputs)))
    return tuple(s for s in sections if s.ops or s.nodes)
