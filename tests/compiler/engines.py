"""Models built, run, and run on ONNX Runtime; memory that belongs to nobody holds garbage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from twofour.compiler.build import build
from twofour.compiler.importer import import_graph
from twofour.compiler.passes.pipeline import run_passes
from twofour.engine import Engine
from twofour.runtime.session import Session

Arrays = Mapping[str, np.ndarray]


def reference(model: ir.Model, inputs: Arrays) -> dict[str, np.ndarray]:
    """The outputs on ONNX Runtime, each node by itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def fused(model: ir.Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ir.Model:
    """What the kernels are to compute: the graph after the passes."""
    return run_passes(import_graph(model, shapes)).model


def run_twice(engine: Engine, inputs: Arrays, threads: int | None = None) -> dict[str, np.ndarray]:
    """The outputs; a second run on an arena full of garbage must not differ."""
    with Session(engine, threads) as session:
        first = session.run(inputs)
        arena = session._machine.arena
        free = np.ones(arena.size, bool)
        profile = engine.plan.profiles[session._current.profile]
        free[: 8 * len(profile.symbols)] = False
        for fill in profile.fills:
            free[fill.offset : fill.offset + fill.size_bytes] = False
        for garbage in (0xFF, 0x7F):  # NaN as floats; 255 and 127 as integers
            arena[free] = garbage
            again = session.run(inputs)
            for name, value in first.items():
                same = np.array_equal(value, again[name], equal_nan=value.dtype.kind == "f")
                assert same, f"{name} depends on memory that nobody wrote"
    return first


def steps(engine: Engine) -> list[tuple[str, list[str]]]:
    """Kind and operators of each step, without copies."""
    layers = engine.plan.layers
    found = [(s.kind, [layers[i].op for i in s.layers]) for s in engine.plan.steps]
    return [(kind, [op for op in ops if op != "Copy"]) for kind, ops in found]


def native_operators(model: ir.Model, inputs: Arrays) -> list[str]:
    """Those of the engine, all native; its outputs are those of ONNX Runtime."""
    engine = build(model, tuning_effort=0)
    outputs = run_twice(engine, inputs)
    for name, array in reference(model, inputs).items():
        np.testing.assert_allclose(outputs[name], array, rtol=1e-5, atol=1e-5)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    return found


def random_inputs(model: ir.Model, seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Seeded inputs as the model declares them."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        assert value.dtype is not None
        name, dtype = value.name or "", value.dtype.numpy()
        shape = shapes.get(name) or tuple(d if isinstance(d, int) else 1 for d in value.shape or ())
        if dtype.kind == "f":
            feeds[name] = random.normal(size=shape).astype(dtype)
        elif dtype.kind == "b":
            feeds[name] = np.ones(shape, bool)
        else:
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            feeds[name] = random.integers(low, high, shape, endpoint=True).astype(dtype)
    return feeds


def built_and_run(model: ir.Model, inputs: Arrays, **options: Any) -> dict[str, np.ndarray]:
    """The outputs of the engine; dtypes and shapes must be those of the model."""
    engine = build(model, **options)
    got = run_twice(engine, inputs)
    assert list(got) == [value.name for value in model.graph.outputs]
    for info in engine.plan.outputs:
        shape = got[info.name].shape
        assert (got[info.name].dtype.name, shape) == (
            info.dtype,
            info.shape if info.known else shape,
        )
    return got
