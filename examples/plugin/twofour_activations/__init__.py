"""Two operators for twofour, in a package of its own.

`example.SquaredRelu`, max(x, 0)^2 (So et al., Primer, arXiv:2109.08668). Its meaning is an ONNX
function, so every ONNX runtime executes a file that has it; the kernel does it in one pass.

`example.Winner`, the index of the largest value of each row and by how much it leads. Its meaning
is numpy, and it has no kernel: it runs in Python.
"""

import math

import numpy as np

from twofour.plugins import (
    Code,
    CpuTactic,
    CudaTactic,
    Operator,
    Stage,
    float_bits,
    kernel,
    module_text,
    pointers,
)

PIECE = 4096  # elements that a thread takes at a time

SQUARED_RELU = """
<opset_import: ["" : 17], domain: "example">
SquaredRelu <scale: float = 1.0> (x) => (y) {
    positive = Relu (x)
    square = Mul (positive, positive)
    factor = Constant <value_float: float = @scale> ()
    y = Mul (square, factor)
}
"""


def refuse(problem, target):
    """Why there is no kernel for these operands; "" if there is one."""
    dtype = problem.inputs[0].dtype
    return "" if dtype == "float32" else f"it takes float32, not {dtype}"


def emit(problem, target, config):
    """A loop over the elements of a piece, which LLVM vectorises."""
    count = math.prod(problem.outputs[0].shape)
    scale = float_bits(problem.attributes["scale"])
    f = kernel()
    x, y, _ = pointers(f, problem)
    begin = f.int_op("mul", "%t0", PIECE)
    end = f.int_op("mul", "%t1", PIECE)
    last = f.call("i64", "llvm.smin.i64", ("i64", end), ("i64", str(count)))

    def square(index):
        at = f.int_op("mul", index, 4)
        value = f.load("float", x, at, 4)
        positive = f.call("float", "llvm.maximum.f32", ("float", value), ("float", "0.0"))
        squared = f.let(f"fmul float {positive}, {positive}")
        scaled = f.let(f"fmul float {squared}, {scale}")
        f.store("float", scaled, y, at, 4)

    f.repeat(begin, last, square)
    return Code((Stage(module_text([f]), pieces=-(-count // PIECE), vectorize=True),))


def winner(x):
    """The meaning of `Winner`: int64 [rows], float32 [rows]."""
    order = np.argsort(-x, axis=-1, kind="stable")
    first, second = (np.take_along_axis(x, order[:, i : i + 1], -1)[:, 0] for i in (0, 1))
    return order[:, 0].astype(np.int64), first - second


def winner_shapes(inputs, attributes):
    """Shapes and types of what `Winner` gives; raises where it takes no such input."""
    (rows, columns), dtype = inputs[0]
    if columns < 2:
        raise ValueError(f"expected at least 2 columns, got {columns}")
    return ((rows,), "int64"), ((rows,), dtype)


OPERATORS = (
    Operator(
        "example",
        "SquaredRelu",
        SQUARED_RELU,
        tactics={
            "cpu": [CpuTactic("loop", emit, refuse)],
            "cuda": [CudaTactic("squared relu", "twofour_activations.gpu")],
        },
    ),
    Operator("example", "Winner", winner, shapes=winner_shapes),
)
