"""Small operators (native_nd.py) with their operands placed: elements become bytes."""

from __future__ import annotations

from collections.abc import Callable

from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import Array
from twofour.compiler.native_nd import Look, NdOp, NdValue
from twofour.compiler.native_nms import NmsOp
from twofour.compiler.native_plugin import PluginOp
from twofour.core.abi import ARENA, WEIGHTS
from twofour.core.sizes import Count, most, usual
from twofour.kernels.cpu.nd import Nest, Ref, contiguous, emit_nd, nd_pieces
from twofour.kernels.cpu.nms import emit_nms
from twofour.kernels.cpu.program import Operand

Strides = tuple[Count, ...]


def places_of(op: NdOp | PluginOp, placed: Placed) -> list[Place | None]:
    """The place of each operand; None for constants."""
    places = dict(zip(op.reads, placed.reads, strict=True))
    places |= dict(zip(op.writes, placed.writes, strict=True))
    return [places[value.name] if value.name else None for value in op.values]


def nd_nests(op: NdOp, placed: Placed) -> tuple[Nest, ...]:
    """The walks of a placed operator over bytes; operand i is entry i of the table."""
    places = places_of(op, placed)
    strides = [_strides(v, p) for v, p in zip(op.values, places, strict=True)]
    kinds = [_kind(v, p) for v, p in zip(op.values, places, strict=True)]

    def ref(look: Look) -> Ref:
        own = strides[look.value]
        steps = tuple(own[axis] * step if step else 0 for axis, step in look.axes)
        offset: Count = sum(start * step for start, step in zip(look.start, own, strict=True))
        return Ref(look.value, kinds[look.value], steps, offset)

    nests = []
    for part in op.parts:
        rows: tuple[Count, Count] = (0, 0)
        if part.op == "gather":
            table = part.inputs[0].value
            rows = (op.values[table].dims[part.rows_axis], strides[table][part.rows_axis])
        inputs = tuple(ref(look) for look in part.inputs)
        nests.append(Nest(part.op, part.dims, ref(part.y), inputs, part.scalars, rows, part.steps))
    return tuple(nests)


def nd_text(op: NdOp, placed: Placed) -> tuple[str, Count]:
    """The kernel of a placed operator, named `kernel`, and the pieces that threads share."""
    if isinstance(op, NmsOp):
        places = places_of(op, placed)[:2]
        steps = [_strides(v, p) for v, p in zip(op.values, places, strict=False)]
        boxes, scores = ((most(a), most(b), most(c)) for a, b, c in steps)
        return emit_nms("kernel", op.problem(boxes, scores)), 1
    nests = nd_nests(op, placed)
    return emit_nd("kernel", nests, len(op.values)), nd_pieces(nests)


def nd_table(
    op: NdOp | PluginOp, placed: Placed, bindings: dict[str, int], keep: Callable[[Array], int]
) -> tuple[Operand, ...]:
    """Where each operand lies (arena, plain array or beside the weights), and the arena.

    Args:
        op: the operator.
        placed: its places.
        bindings: plain tensor -> its index in the step's table of pointers.
        keep: puts a constant beside the weights, and returns its offset.
    """
    table = []
    for value, place in zip(op.values, places_of(op, placed), strict=True):
        if value.constant is not None:
            table.append(Operand(WEIGHTS, keep(value.constant)))
        elif isinstance(place, Tensor):
            table.append(Operand(ARENA, place.at()))
        else:
            table.append(Operand(bindings[value.name]))
    return (*table, Operand(ARENA))  # where the values of open sizes lie


def nd_shape(op: NdOp | PluginOp) -> str:
    """First input and first output, for people."""
    first = next(value for value in op.values if value.name == op.x)
    last = next(value for value in op.values if value.name == op.y)
    return f"{_text(first)} -> {_text(last)}"


def _text(value: NdValue) -> str:
    return "x".join(str(usual(dim)) for dim in value.dims) or "1"


def _kind(value: NdValue, place: Place | None) -> str:
    """How the elements are stored: int8 in the arena is uint8, plus 128."""
    return "s8" if value.kind == "int8" and isinstance(place, Tensor) else value.kind


def _strides(value: NdValue, place: Place | None) -> Strides:
    """Bytes of a step along each axis of the value."""
    if value.constant is not None:
        return contiguous(value.kind, value.constant.shape)
    if not isinstance(place, Tensor):
        return contiguous(value.kind, value.dims)
    return strides_of(value.dims, place)


def strides_of(dims: tuple[Count, ...], place: Tensor) -> Strides:
    """Bytes of a step along each axis of a value that a tensor holds."""
    lie = place.strides
    if len(dims) == 4:
        return lie.image, place.element_bytes, lie.row, lie.pixel
    rows = contiguous("uint8", dims[:-1])  # counted in rows, which are images
    return (*(lie.image * row for row in rows), place.element_bytes) if dims else ()
