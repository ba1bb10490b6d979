"""Fused graph -> operators over tensors, each value in the arena or a plain array between steps.

A value is native if a kernel needs it channels-last in the arena, plain if it is an input or output
of the model or crosses to a fallback. Where it is both, a copy stands beside its producer or first
reader. Quantize and dequantize read and write plain arrays themselves, so the ends of a network
cost no extra pass. What a Concat joins is written into its result where it can be (parts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from twofour.compiler.halos import padded, set_halos
from twofour.compiler.layout import ALIGNMENT, Tensor
from twofour.compiler.memory import Life, plan
from twofour.compiler.native import (
    QUANTIZED,
    ConvOp,
    MapOp,
    NativeOp,
    RowsOp,
    ViewOp,
    extent,
    images,
    plain_kind,
    shape,
    static_shape,
)
from twofour.compiler.native_nd import NdOp, copy_op
from twofour.compiler.native_nms import NmsOp, counted
from twofour.compiler.native_plugin import PluginOp, runs_in_python
from twofour.compiler.parts import Parts, first_channels, is_join
from twofour.compiler.schedule import Schedule, Stretch, apart
from twofour.compiler.waves import Span, Use, waves
from twofour.core.sizes import Count, most, open_size
from twofour.engine import Fill, TensorInfo
from twofour.kernels.cpu.quantize_rows import STEPS_OF
from twofour.onnx_tools.edit import reads

Place = Tensor | TensorInfo
Dims = Mapping[str, tuple[Count, ...]]


def images_of(place: Place) -> Count:
    """Its images, or rows of channels."""
    return place.count if isinstance(place, Tensor) else images(place.dims)


@dataclass(frozen=True)
class Placed:
    """A native operator, with each operand's place: a tensor of the arena, or a plain array.

    Attributes:
        op: the operator.
        x: of what it reads first.
        y: of what it writes first.
        r: of the second value it reads, or None.
        more: of the further values it reads.
        also: of the further values it writes.
        wave: operators of a network with the same number do not wait for each other.
    """

    op: NativeOp
    x: Place
    y: Place
    r: Place | None = None
    more: tuple[Place, ...] = ()
    also: tuple[Place, ...] = ()
    wave: int = 0

    @property
    def reads(self) -> list[Place]:
        """Every place it reads."""
        return [self.x, *([self.r] if self.r is not None else []), *self.more]

    @property
    def writes(self) -> list[Place]:
        """Every place it writes."""
        return [self.y, *self.also]

    @property
    def plain_reads(self) -> list[str]:
        """Names of the plain arrays it reads."""
        return [p.name for p in self.reads if isinstance(p, TensorInfo)]

    @property
    def plain_writes(self) -> list[str]:
        """Names of the plain arrays it writes."""
        return [p.name for p in self.writes if isinstance(p, TensorInfo)]


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

    @property
    def waves(self) -> int:
        """How often the threads of a native step meet."""
        return len({placed.wave for placed in self.ops})

    @property
    def kind(self) -> str:
        """Of the step that it becomes."""
        if self.native:
            return "native"
        return "python" if runs_in_python(self.nodes[0]) else "onnxruntime"


@dataclass(frozen=True)
class Lowered:
    """A graph ready for kernels.

    Attributes:
        sections: in order.
        plain: plain values by name.
        arena_bytes: activation memory.
        fills: halo regions of the arena.
        tensors: of each native value by name; open_dims: likewise the shapes where some are open.
    """

    sections: tuple[Section, ...]
    plain: Mapping[str, TensorInfo]
    arena_bytes: int
    fills: tuple[Fill, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    open_dims: Dims = field(default_factory=dict)


def lower(graph: ir.Graph, order: Schedule, open_dims: Dims | None = None) -> Lowered:
    """Assigns places, layouts and memory.

    Args:
        graph: after the passes; where dimensions are open, of the largest shapes.
        order: its schedule.
        open_dims: the shapes of all values by name if some are open.

    Raises:
        UnsupportedError: a tensor is read with two zero points, or one that crosses between steps
            has a type that engines do not hold.
    """
    forms = _Forms(graph, order, open_dims or {})
    stretches = tuple(part for stretch in order.stretches for part in apart(stretch))
    placed = _in_waves([forms.place(stretch) for stretch in stretches])
    ops = [p for part in placed for p in part]
    set_halos([(p.op, p.x) for p in ops])
    arena_bytes, fills = plan(forms.arena(), _lives(ops), ALIGNMENT if open_dims else 0)
    sections = _sections(stretches, placed, graph)
    names = [n for s in sections for n in (*s.inputs, *s.outputs)]
    names += [value.name or "" for value in (*graph.inputs, *graph.outputs)]
    infos = {n: forms.info(n) for n in names}
    return Lowered(sections, infos, arena_bytes, fills, forms.tensors, open_dims or {})


class _Forms:
    """Which values are native and which plain, decided for the whole graph before any is placed."""

    def __init__(self, graph: ir.Graph, order: Schedule, open_dims: Dims) -> None:
        native = [order.ops[n] for s in order.stretches if s.native for n in s.nodes]
        outside = [n for s in order.stretches if not s.native for n in s.nodes]
        crossing = [
            v for n in outside for v in (*reads(n), *n.outputs) if v.const_value is None and v.name
        ]
        crossing += [*graph.inputs, *graph.outputs]
        self._order, self._open_dims = order, open_dims
        self._values = {v.name: v for n in graph for v in (*n.inputs, *n.outputs) if v is not None}
        self._plain = {v.name: v for v in crossing}
        self._values |= self._plain
        self._counted = counted(native)
        rigid = [op for op in native if not _flexible(op)]
        self._read_native = {name for op in rigid for name in op.reads}
        self._read = {name for op in native for name in op.reads}
        self._parts = Parts.of(native, lambda n: shape(self._values[n]), self._is_held)
        self._padded = padded(native, self._parts)
        self.tensors: dict[str, Tensor] = {}

    def info(self, name: str) -> TensorInfo:
        """A plain value, where it is needed between steps."""
        if name in self._counted:
            return self._counted[name]
        value = self._plain[name]
        if static_shape(value) is None:
            return TensorInfo(name, plain_kind(value), (), known=False)
        return TensorInfo.of(name, plain_kind(value), self._dims(name))

    def _dims(self, name: str) -> tuple[Count, ...]:
        """The shape of a value."""
        return self._open_dims.get(name) or static_shape(self._values[name]) or ()

    def arena(self) -> list[Tensor]:
        """Every tensor that holds bytes, once; aliases share one, views are part of one."""
        return list({id(t.root): t.root for t in self.tensors.values()}.values())

    def place(self, stretch: Stretch) -> list[Placed]:
        """The operators of a stretch, with copies where a value changes form."""
        out: list[Placed] = []
        for node in stretch.nodes if stretch.native else ():
            op = self._order.ops[node]
            if op.kind == "alias":
                self._alias(op, out)
            elif (left := self._unjoined(op)) is not None:
                out.append(self._placed(left, out))
            for name in op.writes:
                tensor = self.tensors.get(name)
                if tensor is not None and name in self._plain:
                    copy = self._copy(f"{op.name}/plain", name)
                    out.append(Placed(copy, tensor, self.info(name)))
        return out

    def _placed(self, op: NativeOp, out: list[Placed]) -> Placed:
        """An operator with its operands' places; copies of those that have to move come first."""
        reads = [self._source(op, name, out) for name in op.reads]
        if isinstance(op, ConvOp) and op.dynamic:
            reads[0] = self._rows(op, out)
        x, r, more = reads[0], reads[1] if op.r else None, tuple(reads[1 + bool(op.r) :])
        y, *also = [self._destination(op, name) for name in op.writes]
        return Placed(op, x, y, r, more, tuple(also))

    def _rows(self, op: ConvOp, out: list[Placed]) -> Tensor:
        """What a product reads that quantizes its input at run time; several may read the same."""
        x, name = self.tensors[op.x], f"{op.x}/{op.dynamic}"
        while name in self._values:
            name += "_"
        if name not in self.tensors:
            self.tensors[name] = rows = x.in_rows(name)
            for step in STEPS_OF[op.dynamic]:
                layer = (f"{op.name}/{step}", "Quantize", "rows", op.x, name)
                out.append(Placed(RowsOp(*layer, step=step), x, rows))
        return self.tensors[name]

    def _alias(self, op: NativeOp, out: list[Placed]) -> None:
        """Other names for a tensor or for parts of it."""
        x = self._enter(op.x, out)
        if not isinstance(op, ViewOp):
            self.tensors[op.y] = x
            return
        if op.pixels:
            if x.root.name in self._padded:  # pixels beside a halo do not lie at even distances
                x, source = replace(x, name=f"{op.y}/dense", parent=None), x
                out.append(Placed(MapOp(op.name, "Copy", "map", op.x, op.y), source, x))
            self.tensors[op.y] = x.column(op.y)
            return
        for name, first in zip(op.writes, op.channels, strict=True):
            dims = extent(shape(self._values[name]))
            step = most(op.image_step)
            chosen = range(op.image, op.image + dims[0] * step, step)
            self.tensors[name] = view = x.part(name, first, dims[3], chosen)
            view.open_batch = open_size(images(self._dims(name)))

    def _unjoined(self, op: NativeOp) -> NativeOp | None:
        """What is left to do of an operator: a Concat copies what does not lie in place."""
        if not isinstance(op, NdOp) or not is_join(op) or not self._is_held(op.y):
            return op
        wide = self._tensor(op.y)
        parts = [
            part
            for part, first in zip(op.parts, first_channels(op), strict=True)
            if (x := self.tensors.get(op.values[part.inputs[0].value].name)) is None
            or x.channel_in(wide) != first
        ]
        return replace(op, parts=tuple(parts)) if parts else None

    def _is_held(self, name: str) -> bool:
        """Whether a value that a kernel computes surely is a tensor."""
        return name not in self._plain or name in self._read_native

    def _source(self, op: NativeOp, name: str, out: list[Placed]) -> Place:
        """Where an operator reads one of its operands."""
        if _flexible(op):
            return self.tensors.get(name) or self.info(name)
        return self._enter(name, out)

    def _destination(self, op: NativeOp, name: str) -> Place:
        """Where an operator writes one of its results."""
        if isinstance(op, NmsOp):
            known = self._counted.get(name)
            return known or self.tensors.setdefault(name, op.scratch(name))
        if self._is_held(name):
            return self._tensor(name)
        value = self._values[name]
        # Rows of float channels lie the same way in both forms.
        rows = len(shape(value)) != 4 and value.dtype == ir.DataType.FLOAT
        direct = op.kind in ("conv", "norm", "attention") and name not in self._read
        if _flexible(op) or (rows and direct):
            return self.info(name)
        return self._tensor(name)

    def _enter(self, name: str, out: list[Placed]) -> Tensor:
        """The tensor of a value, copied into the arena where it so far is a plain array only."""
        if name not in self.tensors:
            tensor = self._tensor(name)
            out.append(Placed(self._copy(f"{name}/native", name), self.info(name), tensor))
        return self.tensors[name]

    def _copy(self, layer: str, name: str) -> NativeOp:
        """A value from one form to the other."""
        dims = self._dims(name)
        inner = dims[1:] if len(dims) == 4 else dims[-1:]
        if all(isinstance(dim, int) for dim in inner):
            return MapOp(layer, "Copy", "map", name, name)
        return copy_op(layer, self._values[name], dims)

    def _tensor(self, name: str) -> Tensor:
        """The tensor of a value: its own, or a part of a wider one."""
        if name in self.tensors:
            return self.tensors[name]
        dtype = self._values[name].dtype
        kind = "u8" if dtype is None or dtype in QUANTIZED else dtype.numpy().name
        batch, height, width, channels = extent(shape(self._values[name]))
        tensor = Tensor(name, batch, height, width, channels, kind)
        if (part := self._parts.part_of.get(name)) is not None:
            tensor = self._tensor(part.of).part(name, part.first, channels, range(batch))
        tensor.open_batch = open_size(images(self._dims(name)))
        self.tensors[name] = tensor
        return tensor


def _flexible(op: NativeOp) -> bool:
    """Whether an operator reads and writes plain arrays as well as tensors."""
    return isinstance(op, (NdOp, PluginOp)) or (isinstance(op, MapOp) and op.op == "convert")


def _in_waves(steps: list[list[Placed]]) -> list[list[Placed]]:
    """The operators of each step, those of a wave beside each other, waves in order."""
    found, first = [], 0
    for ops in steps:
        numbers = waves([_use(placed) for placed in ops])
        pairs = zip(ops, numbers, strict=True)
        numbered = [replace(placed, wave=first + number) for placed, number in pairs]
        found.append(sorted(numbered, key=lambda placed: placed.wave))
        first += max(numbers, default=-1) + 1
    return found


def _use(placed: Placed) -> Use:
    """What an operator touches."""
    reads, writes = (tuple(map(_span, places)) for places in (placed.reads, placed.writes))
    return Use(reads, writes, isinstance(placed.op, PluginOp))


def _span(place: Place) -> Span:
    """A place as bytes that others may touch too."""
    if not isinstance(place, Tensor):
        return Span(f"plain {place.name}")
    first = place.channel_in(place.root)
    if first is None:
        return Span(place.root.name)
    return Span(place.root.name, first, first + place.channels)


def _lives(ops: list[Placed]) -> dict[str, Life]:
    """The waves in which each tensor that holds bytes is first and last used, by its name."""
    lives: dict[str, Life] = {}
    users: dict[tuple[str, int], int] = {}
    for placed in ops:
        for name in {p.root.name for p in (*placed.reads, *placed.writes) if isinstance(p, Tensor)}:
            first = lives[name].first if name in lives else placed.wave
            lives[name] = Life(first, placed.wave)
            users[name, placed.wave] = users.get((name, placed.wave), 0) + 1
    for placed in ops:
        if (
            isinstance(placed.op, ConvOp)
            and isinstance(placed.x, Tensor)
            and isinstance(placed.r, Tensor)
            and isinstance(placed.y, Tensor)
            and placed.r.parent is None
            and placed.y.parent is None
            and placed.r is not placed.x.root  # which later tiles still read
            and users[placed.r.name, placed.wave] == 1  # or others of the wave
        ):
            lives[placed.y.name] = replace(lives[placed.y.name], replaces=placed.r.name)
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
