"""What follows the sums of a layer, as a loop by itself: timed here, counted for other machines."""

from __future__ import annotations

from dataclasses import dataclass

from twofour.engine import Layer, Work
from twofour.kernels.cpu.epilogue import emit_epilogue
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.packing import header_bytes
from twofour.kernels.cpu.problem import ELEMENT_BYTES, LANES, ConvProblem, Strides
from twofour.kernels.cpu.vector import F32S, I32S, Vector

SPOTS, TURNS = 12, 16
"""Vectors of results in a tile, and tiles in a turn of the loop."""
_SUM_BYTES = 4 * LANES
_RANGES = (("i64", "t0"), ("i64", "t1"), ("i64", "p0"), ("i64", "p1"))


@dataclass(frozen=True)
class Results:
    """What follows the sums of a layer.

    Attributes:
        dtype: of the layer's inputs: integer sums are scaled, those of floats are not.
        out: type that is stored.
        add: type of the residual; "" without one.
        activation: see core/functions.py.
        bounded: whether all stay below 2**31.
        gate: the activation is done by a table.
        add_last: the residual is added behind the activation.
    """

    dtype: str
    out: str
    add: str
    activation: str
    bounded: bool
    gate: bool
    add_last: bool = False

    @staticmethod
    def of(layer: Layer) -> Results | None:
        """Of a layer; None where it has no sums."""
        work: Work = layer.work
        if not work.out:
            return None
        return Results(
            layer.precision,
            work.out,
            work.add,
            work.activation,
            work.bounded,
            work.gate,
            work.add_last,
        )


def result_loop(name: str, kind: Results, isa: str) -> Function:
    """Sums from the first-level cache become results there, t1 times `TURNS` tiles."""
    row = LANES * ELEMENT_BYTES["float32"]
    strides = Strides(row, row, row)
    problem = ConvProblem(
        1,
        SPOTS,
        1,
        LANES,
        LANES,
        kind.dtype,
        strides,
        strides,
        kind.out,
        r=strides if kind.add else None,
        add=kind.add,
        activation=kind.activation,
        bounded=kind.bounded,
        gate=kind.gate,
        add_last=kind.add_last,
    )
    f = Function(name, (("ptr", "x"), ("ptr", "h"), ("ptr", "y"), ("ptr", "r"), *_RANGES))
    v = Vector(isa, f)

    def tile(at: Value, _: list[Value]) -> list[Value]:
        x = f.at("%x", f.int_op("mul", at, SPOTS * _SUM_BYTES))
        vector = I32S if kind.dtype == "int8" else F32S
        sums = [f.load(vector, x, _SUM_BYTES * spot) for spot in range(SPOTS)]
        emit_epilogue(
            v, problem, [(s, 0) for s in range(SPOTS)], sums, f.at("%h", header_bytes(problem)), 1
        )
        return []

    f.loop("%t0", "%t1", [], lambda _, __: f.loop(0, TURNS, [], tile))
    return f
