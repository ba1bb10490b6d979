"""Sessions: what they accept and refuse, that runs are independent, and that they end cleanly."""

from __future__ import annotations

import gc
import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import graph
from tests.sample_models import conv_model
from twofour.compiler.build import build
from twofour.core.abi import MAX_THREADS
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.target import Target
from twofour.engine import Engine, TensorInfo
from twofour.runtime.session import Session, load

RANDOM = np.random.default_rng(0)
AT = np.array([[0, 3], [0, 5]])
X = RANDOM.normal(size=(2, 8, 6, 6)).astype(np.float32)
LOOSE = {
    "strided": np.repeat(X, 2, axis=3)[..., ::2],
    "reversed": X[:, :, ::-1].copy()[:, :, ::-1],
    "fortran": np.asfortranarray(X),
    "transposed": np.ascontiguousarray(X.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """x -> Conv, Relu, Conv -> y, quantized inside; one native step."""
    k = RANDOM.integers(-127, 128, (16, 8, 3, 3)).astype(np.int8)
    model = graph(
        "(float[2,8,6,6] x) => (float[2,16,6,6] y) <float s = {0.05}, uint8 z = {100}>"
        "{ q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (k, ks) a = Conv <pads = [1,1,1,1]> (f, w)"
        " b = Relu (a) r = QuantizeLinear (b, s, z) g = DequantizeLinear (r, s, z)"
        " v = DequantizeLinear <axis = 0> (l, ks) y = Conv <pads = [1,1,1,1]> (g, v) }",
        k=k,
        ks=np.full(16, 0.001, np.float32),
        l=RANDOM.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
    )
    return build(model, sparsity="disable")


@pytest.fixture(scope="module")
def mixed() -> Engine:
    """Two inputs; a native step, then one on ONNX Runtime that fails on a wrong index."""
    model = graph(
        "(float[1,8] x, int64[2,2] at) => (float[2] y){ a = MatMul (x, k) y = GatherND (a, at) }",
        k=RANDOM.normal(size=(8, 8)).astype(np.float32),
    )
    return build(model)


@pytest.fixture(scope="module")
def expected(engine) -> np.ndarray:
    with Session(engine) as session:
        return session.run({"x": X})["y"]


def test_inputs_and_outputs_as_the_model_declares_them(engine, mixed) -> None:
    with Session(engine) as session:
        assert session.inputs == (TensorInfo("x", "float32", (2, 8, 6, 6)),)
        assert session.outputs == (TensorInfo("y", "float32", (2, 16, 6, 6)),)
        assert session.threads == 1
    with Session(mixed) as session:
        assert [t.name for t in session.inputs] == ["x", "at"]


REFUSED = {
    "wrong name": ({"z": X}, ["expected x", "got z"]),
    "none": ({}, ["expected x", "got none"]),
    "too many": ({"x": X, "z": X}, ["expected x", "got x, z"]),
    "shape": ({"x": X[:1]}, ["float32 [2, 8, 6, 6]", "[1, 8, 6, 6]", "--shapes x:1x8x6x6"]),
    "rank": ({"x": X.reshape(-1)}, ["float32 [2, 8, 6, 6]", "[576]"]),
    "dtype": ({"x": X.astype(np.float64)}, ["float64", ".astype('float32')"]),
    "integers": ({"x": X.astype(np.uint8)}, ["uint8", ".astype('float32')"]),
    "byte order": ({"x": X.astype(">f4")}, ["expected float32"]),
    "list": ({"x": X.tolist()}, ["got list", "numpy array"]),
    "nothing": ({"x": None}, ["got NoneType"]),
    "no dict": ([X], ["got list", "'x': array"]),
    "an array": (X, ["got ndarray"]),
}


@pytest.mark.parametrize(("inputs", "parts"), REFUSED.values(), ids=REFUSED)
def test_bad_inputs_are_refused_with_what_was_expected(engine, inputs, parts) -> None:
    with Session(engine) as session:
        with pytest.raises(InputError) as caught:
            session.run(inputs)
        for part in parts:
            assert part in str(caught.value)
        assert caught.value.fix
        session.run({"x": X})


@pytest.mark.parametrize("x", LOOSE.values(), ids=LOOSE)
def test_any_memory_layout_is_accepted(engine, expected, x) -> None:
    assert (x == X).all()
    assert not x.flags.c_contiguous
    with Session(engine) as session:
        assert (session.run({"x": x})["y"] == expected).all()


def test_read_only_and_unaligned_arrays_are_accepted(engine, expected) -> None:
    fixed = X.copy()
    fixed.flags.writeable = False
    raw = np.zeros(X.nbytes + 1, np.uint8)
    raw[1:] = X.view(np.uint8).reshape(-1)
    odd = raw[1:].view(np.float32).reshape(X.shape)
    assert not odd.flags.aligned
    with Session(engine) as session:
        for x in (fixed, odd):
            assert (session.run({"x": x})["y"] == expected).all()


def test_runs_do_not_share_memory(engine, expected) -> None:
    x = X.copy()
    with Session(engine) as session:
        first = session.run({"x": x})["y"]
        assert (x == X).all(), "the input was changed"
        first[:] = 7
        second = session.run({"x": x})["y"]
        assert (second == expected).all()
        assert (first == 7).all()
        session.run({"x": 2 * x})
        assert (second == expected).all()


def test_outputs_that_are_inputs_are_new_arrays() -> None:
    model = graph(
        "(float[1,8] x) => (float[1,8] y, float[1,8] z) { y = MatMul (x, k) z = Identity (x) }",
        k=np.eye(8, dtype=np.float32),
    )
    x = RANDOM.normal(size=(1, 8)).astype(np.float32)
    with Session(build(model)) as session:
        outputs = session.run({"x": x})
    for value in outputs.values():
        assert (value == x).all()
        assert not np.shares_memory(value, x)


def test_nan_and_infinity_do_no_harm(engine, expected) -> None:
    x = np.full_like(X, np.nan)
    x[1] = np.inf
    with Session(engine) as session:
        assert np.isfinite(session.run({"x": x})["y"]).all()  # quantized inside: clamped
        assert (session.run({"x": X})["y"] == expected).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_thread_counts_do_not_change_a_bit(engine, expected, threads) -> None:
    with Session(engine, threads) as session:
        assert session.threads == threads
        for pause_s in (0, 1e-4, 1e-3, 0.02):
            time.sleep(pause_s)
            assert (session.run({"x": X})["y"] == expected).all()


@pytest.mark.parametrize("threads", [0, -2, MAX_THREADS + 1])
def test_thread_counts_that_cannot_be(engine, threads) -> None:
    with pytest.raises(UnsupportedError, match=f"{threads} threads"):
        Session(engine, threads)


def test_a_closed_session_refuses(engine) -> None:
    session = Session(engine, 2)
    session.run({"x": X})
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run({"x": X})
    with pytest.raises(ZeroDivisionError), Session(engine) as inner:
        raise ZeroDivisionError
    with pytest.raises(InputError, match="closed"):
        inner.run({"x": X})


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_sessions_end_and_leave_no_threads_and_no_memory(engine, expected) -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return len(file.readlines())

    def use(index: int) -> None:
        session = Session(engine, 1 + index % 3)
        if index % 10 == 0:
            assert (session.run({"x": X})["y"] == expected).all()
        if index % 2:
            session.close()  # the others are only forgotten

    for index in range(20):
        use(index)
    gc.collect()
    threads, before = len(os.listdir("/proc/self/task")), mappings()
    for index in range(200):
        use(index)
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == threads
    assert mappings() < before + 20


def test_sessions_share_the_weights_of_a_loaded_engine(engine, expected, tmp_path: Path) -> None:
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    assert not loaded.weights.flags.writeable
    with Session(loaded) as one, Session(loaded) as two:
        assert np.shares_memory(one._machine.weights, loaded.weights)
        assert np.shares_memory(one._machine.weights, two._machine.weights)
        for session in (one, two):
            np.testing.assert_array_equal(session.run({"x": X})["y"], expected)


def test_many_python_threads_on_one_session_and_on_several(engine) -> None:
    inputs = [RANDOM.normal(size=X.shape).astype(np.float32) for _ in range(4)]
    with Session(engine) as one, Session(engine, 2) as two:
        wants = [one.run({"x": x})["y"] for x in inputs]

        def work(index: int) -> bool:
            session = (one, two)[index % 2]
            results = [session.run({"x": inputs[(index + i) % 4]})["y"] for i in range(20)]
            return all((r == wants[(index + i) % 4]).all() for i, r in enumerate(results))

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(12)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_session_works_on_in_a_forked_process(engine, expected) -> None:
    with Session(engine, 2) as session:
        session.run({"x": X})
        child = os.fork()
        if child == 0:
            equal = False
            try:
                session.run({"x": 3 * X})
                equal = bool((session.run({"x": X})["y"] == expected).all())
            finally:
                os._exit(0 if equal else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert (session.run({"x": X})["y"] == expected).all()


def test_steps_on_onnxruntime(mixed) -> None:
    x = RANDOM.normal(size=(1, 8)).astype(np.float32)
    with Session(mixed) as session:
        both = session.run({"x": x, "at": AT})["y"]
        assert both.shape == (2,)
        # The model's own check fails while running: the user's input, not a fault.
        with pytest.raises(InputError, match="ONNX Runtime failed in step") as caught:
            session.run({"x": x, "at": np.array([[0, 3], [0, 99]])})
        assert "99" in str(caught.value)
        assert (session.run({"x": x, "at": AT})["y"] == both).all()
        times = session.step_times_us({"x": x, "at": AT}, 3)
        assert len(times) == 2
        assert min(times) > 0


def test_onnxruntime_is_asked_for_where_it_is_missing(mixed, engine, monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        Session(mixed)
    assert "pip install onnxruntime" in caught.value.fix
    Session(engine).close()


def test_engines_that_cannot_run_here_are_refused(engine) -> None:
    foreign = replace(engine, plan=replace(engine.plan, target=Target("vector", "z80", "other")))
    with pytest.raises(UnsupportedError, match="z80"):
        Session(foreign)


def test_code_that_does_not_fit_the_plan_is_refused(engine, mixed) -> None:
    (name,) = engine.plan.code
    garbage = np.zeros(5000, np.uint8)
    with pytest.raises(EngineError, match="cannot be loaded"):
        Session(replace(engine, code={name: garbage}))
    (step,) = engine.plan.steps
    profile = replace(engine.plan.profiles[0], steps=(replace(step, symbol="program7"),))
    renamed = replace(engine.plan, profiles=(profile,))
    with pytest.raises(EngineError, match="no function 'program7'"):
        Session(replace(engine, plan=renamed))
    (fallback,) = mixed.subgraphs
    with pytest.raises(EngineError, match=f"refuses step '{fallback}'"):
        Session(replace(mixed, subgraphs={fallback: garbage}))


def test_load_opens_a_file(engine, expected, tmp_path) -> None:
    path = engine.save(tmp_path / "net.engine")
    for given in (path, str(path)):
        with load(given, threads=2) as session:
            assert session.threads == 2
            assert (session.run({"x": X})["y"] == expected).all()
    with pytest.raises(InputError, match="no engine at"):
        load(tmp_path / "missing.engine")


def test_a_view_that_does_not_fit_is_not_copied(tmp_path):
    """Of 2**50 floats, all of them one."""
    engine = build(conv_model(tmp_path / "m.onnx", batch=1), tuning_effort=0)
    view = np.broadcast_to(np.float32(1), (1 << 50, 4, 8, 8))
    with Session(engine) as session, pytest.raises(InputError, match="do not fit the engine"):
        session.run({"x": view})
