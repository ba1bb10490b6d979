"""Operators as a plugin has them, and models with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from twofour.plugins import (
    Code,
    CpuTactic,
    Function,
    Operator,
    Problem,
    Stage,
    Target,
    Value,
    float_bits,
    kernel,
    module_text,
    pointers,
)

TRIPLE = """
<opset_import: ["" : 17], domain: "test">
Triple <add: float = 0.0> (x) => (y) {
    three = Constant <value_float: float = 3.0> ()
    plus = Constant <value_float: float = @add> ()
    product = Mul (x, three)
    y = Add (product, plus)
}
"""


def emit_triple(problem: Problem, target: Target, config: str) -> Code:
    """One loop over operands in C order; float32, or uint8 and int8 with their scales."""
    (x_operand,), (y_operand,) = problem.inputs, problem.outputs
    assert x_operand is not None
    f = kernel()
    x, y, _ = pointers(f, problem)
    add = float(problem.attributes.get("add", 0.0))

    def one(index: Value) -> None:
        value = _load(f, x, index, x_operand)
        tripled = f.let(f"fadd float {f.let(f'fmul float {value}, 3.0')}, {add!r}")
        _store(f, tripled, y, index, y_operand)

    count = math.prod(y_operand.shape)
    f.repeat("%t0", "%t1", one)
    return Code((Stage(module_text([f]), pieces=count),))


def _load(f: Function, x: Value, index: Value, operand: Any) -> Value:
    if operand.dtype == "float32":
        return f.load("float", x, f.int_op("mul", index, 4), 4)
    wide = "zext" if operand.dtype == "uint8" else "sext"
    byte = f.let(f"{wide} i8 {f.load('i8', x, index)} to i32")
    centred = f.int_op("sub", byte, operand.zero_point, "i32")
    real = f.let(f"sitofp i32 {centred} to float")
    return f.let(f"fmul float {real}, {_bits(operand.scale)}")


def _store(f: Function, value: Value, y: Value, index: Value, operand: Any) -> None:
    if operand.dtype == "float32":
        f.store("float", value, y, f.int_op("mul", index, 4), 4)
        return
    steps = f.let(f"fdiv float {value}, {_bits(operand.scale)}")
    rounded = f.call("float", "llvm.rint.f32", ("float", steps))
    number = f.int_op("add", f.let(f"fptosi float {rounded} to i32"), operand.zero_point, "i32")
    low, high = (0, 255) if operand.dtype == "uint8" else (-128, 127)
    number = f.call("i32", "llvm.smax.i32", ("i32", number), ("i32", str(low)))
    number = f.call("i32", "llvm.smin.i32", ("i32", number), ("i32", str(high)))
    f.store("i8", f.let(f"trunc i32 {number} to i8"), y, index)


def _bits(scale: NDArray[np.float32]) -> str:
    return float_bits(float(scale.reshape(-1)[0]))


LOOP = CpuTactic("loop", emit_triple)
Triple = Operator("test", "Triple", TRIPLE, tactics={"cpu": [LOOP]}, quantized=("x", "y"))


def emit_sum_in_stages(problem: Problem, target: Target, config: str) -> Code:
    """The sum of each row, by way of the workspace: rows times two, then half of their sums."""
    (x_operand,) = problem.inputs
    assert x_operand is not None
    rows, columns = x_operand.shape
    first = kernel()
    x, _, room = pointers(first, problem)

    def double(index: Value) -> None:
        at = first.int_op("mul", index, 4)
        value = first.load("float", x, at, 4)
        first.store("float", first.let(f"fadd float {value}, {value}"), room, at, 4)

    begin, end = (first.int_op("mul", t, columns) for t in ("%t0", "%t1"))
    first.repeat(begin, end, double)
    second = kernel()
    _, y, room2 = pointers(second, problem)

    def row(index: Value) -> None:
        start = second.int_op("mul", index, columns)

        def add(column: Value, sums: list[Value]) -> list[Value]:
            at = second.int_op("mul", second.int_op("add", start, column), 4)
            return [second.let(f"fadd float {sums[0]}, {second.load('float', room2, at, 4)}")]

        (total,) = second.loop(0, columns, [("float", "0.0")], add)
        half = second.load("float", "%w", 0, 4)
        y_at = second.int_op("mul", index, 4)
        second.store("float", second.let(f"fmul float {total}, {half}"), y, y_at, 4)

    second.repeat("%t0", "%t1", row)
    stages = (
        Stage(module_text([first]), rows, "double"),
        Stage(module_text([second]), rows),
    )
    half_bytes = np.array([0.5], np.float32).view(np.uint8)
    return Code(stages, half_bytes, rows * columns * 4)


ROW_SUM = """
<opset_import: ["" : 17], domain: "test">
RowSum (x) => (y) {
    axes = Constant <value_ints: ints = [1]> ()
    y = ReduceSum <keepdims = 0> (x, axes)
}
"""
RowSum = Operator(
    "test", "RowSum", ROW_SUM, tactics={"cpu": [CpuTactic("stages", emit_sum_in_stages)]}
)


def moments(x: NDArray[Any], weights: NDArray[Any] | None = None, power: int = 1) -> Any:
    """Weighted means of powers of each row, and how many numbers that are."""
    w = np.ones(x.shape[1], np.float32) if weights is None else weights
    means = (x**power * w).sum(-1) / w.sum()
    return means.astype(np.float32), np.full(x.shape[0], x.shape[1], np.int64)


def moments_shapes(inputs: Sequence[Any], attributes: Any) -> Any:
    (rows, _), _ = inputs[0]
    return ((rows,), "float32"), ((rows,), "int64")


Moments = Operator("test", "Moments", moments, shapes=moments_shapes, version=3)


def changed(operator: Operator, **values: Any) -> Operator:
    return replace(operator, **values)


def model(text: str, **constants: NDArray[Any]) -> ir.Model:
    """A model in ONNX's text form, whose initializers are these."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return ir.from_proto(proto)


HEAD = '<ir_version: 8, opset_import: ["" : 17, "test" : 1]>'
