"""Session: an engine ready to run.

    session = Session(Engine.load("model.engine"))
    outputs = session.run({"x": x})

Each step of the plan is one call: a native program over the arena, or ONNX Runtime on a fallback
subgraph. Between steps lie plain C-contiguous arrays.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.abi import BINDINGS, SLACK_BYTES, SYMBOL_BYTES
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.memory import address, allocate, with_slack
from twofour.core.target import check_runs_here
from twofour.engine import Engine, Profile, Step, TensorInfo
from twofour.runtime.cpu import Code, Workers
from twofour.runtime.shapes import Bound, bind

Array = NDArray[Any]
Key = tuple[tuple[int, ...], ...]
_MOST_BOUND = 1024  # shapes remembered


class Session:
    """Runs one engine; holds its own activation memory and threads.

    `run` may be called from several Python threads; calls on one session take turns, and the GIL is
    free while one computes. Close it, or use it in a `with` statement, to end its threads at once.

    Args:
        engine: the engine.
        threads: how many to use; by default as many as the engine was tuned for.

    Raises:
        UnsupportedError: this machine cannot run the engine's code, or has not that many threads.
        EngineError: the code cannot be loaded.
    """

    def __init__(self, engine: Engine, threads: int | None = None) -> None:
        """Maps code and weights, plans nothing: that was done at build."""
        check_runs_here(engine.plan.target)
        self.engine = engine
        self.inputs: tuple[TensorInfo, ...] = engine.plan.inputs
        self.outputs: tuple[TensorInfo, ...] = engine.plan.outputs
        self._lock = threading.Lock()
        self._closed = False
        plan = engine.plan
        self._expected = [(t.name, np.dtype(t.dtype)) for t in self.inputs]
        self._bounds: dict[Key, Bound] = {}
        self._current: Bound | None = None
        self._weights = with_slack(engine.weights, SLACK_BYTES)
        self._arena = allocate(plan.arena_bytes + SLACK_BYTES, huge=True)
        self._code = Code([engine.code[name].tobytes() for name in plan.code])
        self.threads = plan.threads if threads is None else threads
        self._workers = Workers(self._code, self.threads)
        self._steps = [[self._step(step, p) for step in p.steps] for p in plan.profiles]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the outputs.

        Args:
            inputs: one array for each input of the model, exactly its dtype, and shapes that
                fit one of the engine's profiles.

        Returns:
            One new array for each output.

        Raises:
            InputError: a missing or unknown name, a wrong dtype or shape, or the session is closed.
        """
        tensors, bound = self._checked(inputs)
        with self._lock:
            self._require_open()
            if bound is not self._current:
                self._enter(bound)
            for step in self._steps[bound.profile]:
                step.run(tensors, bound)
        return {t.name: tensors[t.name] for t in self.outputs}

    def step_times_us(self, inputs: Mapping[str, Array], rounds: int) -> list[float]:
        """Median time of each step in microseconds, over `rounds` whole runs after one more.

        Args:
            inputs: as for `run`.
            rounds: how many runs are measured.

        Returns:
            A time for each step of the profile that the inputs fit.
        """
        given, bound = self._checked(inputs)
        steps = self._steps[bound.profile]
        samples: list[list[float]] = [[] for _ in steps]
        with self._lock:
            self._require_open()
            self._enter(bound)
            for _ in range(rounds + 1):
                tensors = dict(given)
                for step, times in zip(steps, samples, strict=True):
                    start = time.perf_counter_ns()
                    step.run(tensors, bound)
                    times.append((time.perf_counter_ns() - start) / 1e3)
        return [float(np.median(times[1:])) for times in samples]

    def close(self) -> None:
        """Ends the threads; further runs are errors. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._workers.close()

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _checked(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Bound]:
        """The inputs by name, C-contiguous, and what they fit, if they are as the engine wants."""
        if not isinstance(inputs, Mapping):
            raise InputError(
                "the inputs are no dict",
                [f"expected {{name: array}}, got {type(inputs).__name__}"],
                f"pass {{{self.inputs[0].name if self.inputs else 'name'!r}: array}}",
            )
        tensors = {}
        for name, dtype in self._expected:
            array = inputs.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise self._refusal(name, inputs)
            tensors[name] = array if array.flags.c_contiguous else array.copy()
        if len(inputs) != len(tensors):
            raise self._refusal("", inputs)
        key = tuple([array.shape for array in tensors.values()])
        bound = self._bounds.get(key)
        if bound is None:
            if len(self._bounds) >= _MOST_BOUND:
                self._bounds.clear()
            shapes = {name: array.shape for name, array in tensors.items()}
            bound = self._bounds[key] = bind(self.engine.plan, shapes)
        return tensors, bound

    def _step(self, step: Step, profile: Profile) -> _NativeStep | _FallbackStep:
        """A step of a profile, ready to run."""
        if step.kind == "native":
            return _NativeStep(step, profile, self)
        return _FallbackStep(step, self)

    def _enter(self, bound: Bound) -> None:
        """Writes what the profile keeps in the arena: its halos, and the values of its symbols."""
        before, self._current = self._current, bound
        if before is None or before.profile != bound.profile:
            for fill in self.engine.plan.profiles[bound.profile].fills:
                self._arena[fill.offset : fill.offset + fill.size_bytes] = fill.value
        size = len(bound.values) * SYMBOL_BYTES
        self._arena[:size].view(np.int64)[:] = bound.values

    def _require_open(self) -> None:
        if self._closed:
            raise InputError("this session is closed", [], "open a new Session")

    def _refusal(self, name: str, inputs: Mapping[str, Array]) -> InputError:
        """What is wrong with the inputs.

        Args:
            name: the first that does not fit, or "" where there are too many.
            inputs: as given.
        """
        if name not in inputs:
            return InputError(
                "the inputs given are not those of the engine",
                [
                    f"expected {', '.join(t.name for t in self.inputs)}",
                    f"got {', '.join(map(str, inputs)) or 'none'}",
                ],
                "name each array as the model names its input",
            )
        info = next(info for info in self.inputs if info.name == name)
        array: object = inputs[name]
        if not isinstance(array, np.ndarray):
            found, fix = type(array).__name__, "pass a numpy array"
        else:
            found, fix = array.dtype.name, f"convert it with .astype({info.dtype!r})"
        what = f"input {name!r} does not fit the engine"
        return InputError(what, [f"expected {info.dtype}", f"got {found}"], fix)


class _NativeStep:
    """A generated program with its table of pointers."""

    def __init__(self, step: Step, profile: Profile, session: Session) -> None:
        dtypes = {info.name: np.dtype(info.dtype) for info in profile.tensors}
        self._inputs = step.inputs
        self._outputs = [(name, dtypes[name]) for name in step.outputs]
        self._program = session._code.address(step.symbol)
        self._workers = session._workers
        self._args = (ctypes.c_int64 * (BINDINGS + len(step.inputs) + len(step.outputs)))()
        self._args_address = ctypes.addressof(self._args)
        for index, block in enumerate((session._arena, session._weights, session._workers.sync)):
            self._args[index] = address(block)

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Binds the plain tensors and calls the program."""
        at = BINDINGS
        for name in self._inputs:
            self._args[at] = address(tensors[name])
            at += 1
        for name, dtype in self._outputs:
            array = tensors[name] = np.empty(bound.shapes[name], dtype)
            self._args[at] = address(array)
            at += 1
        self._workers.run(self._program, self._args_address)


class _FallbackStep:
    """A subgraph on ONNX Runtime."""

    def __init__(self, step: Step, session: Session) -> None:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError as e:
            raise UnsupportedError(
                f"step {step.symbol!r} of the engine runs on ONNX Runtime, which is not installed",
                [f"it computes {', '.join(step.outputs)}"],
                "pip install onnxruntime",
            ) from e
        state = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        raised = [c for c in state if isinstance(c, type) and issubclass(c, Exception)]
        # Its own classes have no common parent.
        self._errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, *raised)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = session.threads
        options.inter_op_num_threads = 1
        # It would drop a DQ -> Q pair between two scales, and move values by a whole step.
        options.add_session_config_entry("session.disable_double_qdq_remover", "1")
        options.log_severity_level = 4  # what goes wrong is raised, not printed as well
        model = session.engine.subgraphs[step.symbol].tobytes()
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except self._errors as e:
            raise EngineError(
                f"ONNX Runtime refuses step {step.symbol!r}", [str(e)], "rebuild the engine"
            ) from e
        self._inputs, self._outputs, self._symbol = step.inputs, step.outputs, step.symbol

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Feeds and runs the subgraph."""
        feeds = {name: tensors[name] for name in self._inputs}
        try:
            results = self._session.run(list(self._outputs), feeds)
        except self._errors as e:
            raise InputError(f"ONNX Runtime failed in step {self._symbol!r}", [str(e)]) from e
        for name, value in zip(self._outputs, results, strict=True):
            array = tensors[name] = np.asarray(value, order="C")  # keeps a scalar a scalar
            expected = bound.shapes.get(name, array.shape)
            if array.shape != expected:  # a program that reads it relies on this
                raise EngineError(
                    f"step {self._symbol!r} gives {name!r} another shape than the plan says",
                    [f"expected {list(expected)}", f"got {list(array.shape)}"],
                    "build for fixed shapes, as several profiles",
                )


def load(path: str | Path, threads: int | None = None) -> Session:
    """A session on an engine file.

    Args:
        path: the `.engine` file.
        threads: as for `Session`.

    Raises:
        InputError: there is no such file.
        EngineError: the file is damaged or altered.
        UnsupportedError: the engine was built for a CPU with more features.
    """
    return Session(Engine.load(path), threads)
