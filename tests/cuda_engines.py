"""A small engine for a GPU: y = (2 x + w) twice over, by kernels that a fake driver knows.

Its objects are no machine code: tests/fake_cuda.py reads the name of a function of numpy in them.
"""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import onnx
from onnx import parser

from twofour.core.cuda import Cuda
from twofour.core.cuda_program import ARENA, WEIGHTS, CudaProgram, Launch, Place, Transfer
from twofour.core.target import Target
from twofour.engine import Engine, Layer, Plan, Profile, Step, TensorInfo, Write

COUNT = 64  # float32
SIZE = 4 * COUNT
W = np.arange(COUNT, dtype=np.float32)
X, MIDDLE, Y = (Place(ARENA, 256 * index, SIZE) for index in range(3))
KEPT = Place(WEIGHTS, 0, SIZE)


def launch(code: str, layer: int, *places: Place, shared_bytes: int = 0, nulls: int = 2) -> Launch:
    return Launch(code, f"{code}_kernel", (2, 1, 1), 32, shared_bytes, places, layer, nulls)


def sample_program() -> CudaProgram:
    """double: x -> middle; add: middle, w -> y."""
    turns = [
        launch("double", 0, X, MIDDLE, shared_bytes=100_000),
        launch("add", 1, MIDDLE, KEPT, Y),
    ]
    return CudaProgram.of(turns, (Transfer("x", X),), (Transfer("y", Y),))


def cuda_engine(
    program: CudaProgram | None = None, gpu: str = "sm90", shape: tuple[int, ...] = (COUNT,)
) -> Engine:
    """x [64] -> y = 2 x + w."""
    ends = [TensorInfo(name, "float32", shape) for name in "xy"]
    step = Step("cuda", "net", ("x",), ("y",), (0, 1))
    profile = Profile((ends[0],), (ends[1],), (), (step,), 768, ())
    target = Target("cuda", platform.machine(), "A GPU", cuda=Cuda(gpu))
    layers = (Layer("first", "Mul", "walk"), Layer("second", "Add", "walk"))
    plan = Plan(target, "0.1.0", "", (profile,), layers, 1, ("double", "add"))
    code = {name: np.frombuffer(name.encode(), np.uint8) for name in plan.code}
    content = (program or sample_program()).to_bytes()
    held = {"net": np.frombuffer(content, np.uint8)}
    return Engine(plan, W.view(np.uint8).copy(), code, held)


def with_program(change: dict[str, object]) -> Engine:
    """The engine with a program that differs so."""
    return cuda_engine(replace(sample_program(), **change))  # type: ignore[arg-type]


def mixed_engine() -> Engine:
    """x -> a on the GPU, a -> b = -a on ONNX Runtime, b -> y on the GPU."""
    names = {name: TensorInfo(name, "float32", (COUNT,)) for name in "xaby"}
    one, two = (
        CudaProgram.of([launch("double", layer, X, Y)], (Transfer(read, X),), (Transfer(wrote, Y),))
        for layer, read, wrote in ((0, "x", "a"), (2, "b", "y"))
    )
    steps = (
        Step("cuda", "one", ("x",), ("a",), (0,)),
        Step("onnxruntime", "tail", ("a",), ("b",), (1,)),
        Step("cuda", "two", ("b",), ("y",), (2,)),
    )
    text = f'<ir_version: 10, opset_import: ["" : 17]> g (float[{COUNT}] a) => (float[{COUNT}] b)'
    model: onnx.ModelProto = parser.parse_model(f"{text} {{ b = Neg(a) }}")
    given = cuda_engine()
    profile = Profile((names["x"],), (names["y"],), (names["a"], names["b"]), steps, 768, ())
    write = Write(TensorInfo("b", "float32", (COUNT,)))
    layers = (
        Layer("first", "Mul", "walk"),
        Layer("neg", "Neg", "onnxruntime", writes=(write,)),
        Layer("last", "Mul", "walk"),
    )
    plan = replace(given.plan, profiles=(profile,), layers=layers)
    held = {
        "one": np.frombuffer(one.to_bytes(), np.uint8),
        "two": np.frombuffer(two.to_bytes(), np.uint8),
        "tail": np.frombuffer(model.SerializeToString(), np.uint8),
    }
    return Engine(plan, given.weights, given.code, held)
