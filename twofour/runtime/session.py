"""Session: an engine ready to run.

    session = Session(Engine.load("model.engine"))
    outputs = session.run({"x": x})

Each step of the plan is one call: a native program over the arena, a graph on a GPU, or ONNX
Runtime on a fallback subgraph. Between steps lie plain C-contiguous arrays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.abi import SLACK_BYTES
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.memory import allocate, with_slack
from twofour.core.target import CUDA, check_runs_here
from twofour.engine import Engine, Profile, Step, TensorInfo
from twofour.runtime.cpu import Code, Workers
from twofour.runtime.cuda import layers as cuda_layers
from twofour.runtime.cuda.network import CudaNetwork, CudaStep
from twofour.runtime.python_step import PythonStep
from twofour.runtime.shapes import Bound, bind, refusal
from twofour.runtime.steps import FallbackStep, Machine, NativeStep
from twofour.runtime.taps import Tap, read
from twofour.runtime.tensorrt import TensorRTStep, network_of
from twofour.runtime.timeline import Timeline, now_ns, timeline

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
        gpu: of an engine for CUDA: which it runs on, by index or UUID; by default the first that
            it fits.
        most_gpu_bytes: likewise: what weights and arena may take of its memory.

    Raises:
        UnsupportedError: this machine cannot run the engine's code, or has not that many threads,
            or not the GPU or the TensorRT that it was built for, or too little memory there.
        EngineError: the code cannot be loaded.
        InputError: there is no such GPU.
    """

    def __init__(
        self,
        engine: Engine,
        threads: int | None = None,
        *,
        gpu: int | str | None = None,
        most_gpu_bytes: int | None = None,
    ) -> None:
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
        self.threads = plan.threads if threads is None else threads
        self._network = network_of(engine)
        self._gpu: CudaNetwork | None = None
        if plan.target.cuda is not None:
            self._gpu = CudaNetwork(engine, gpu, most_gpu_bytes)
        elif gpu is not None or most_gpu_bytes is not None:
            raise InputError(
                f"the engine runs on {plan.target}, and is told a GPU",
                [f"expected an engine for cuda, got GPU {gpu!r}"],
                "leave the GPU out, or build with --target cuda",
            )
        self._machine = None if plan.target.on_gpu else self._made_ready()
        try:
            self._steps = [
                [self._step(step, index, p) for step in p.steps]
                for index, p in enumerate(plan.profiles)
            ]
        except BaseException:
            self.close()
            raise

    def _made_ready(self) -> Machine:
        """Memory, code and threads of the CPU."""
        plan = self.engine.plan
        weights = with_slack(self.engine.weights, SLACK_BYTES)
        arena = allocate(plan.arena_bytes + SLACK_BYTES, huge=True)
        code = Code([self.engine.code[name].tobytes() for name in plan.code])
        return Machine(code, Workers(code, self.threads), arena, weights)

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

    @contextmanager
    def within(self, most_s: float) -> Iterator[None]:
        """Runs inside that go on for longer are errors, and so are all that come after them.

        A step on ONNX Runtime ends after the operator it is at; generated code always ends.

        Args:
            most_s: seconds, of all runs together.
        """
        watch = threading.Timer(most_s, self._stop)
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def _stop(self) -> None:
        for step in (step for steps in self._steps for step in steps):
            if isinstance(step, FallbackStep):
                step.stop()

    def walk(self, inputs: Mapping[str, Array]) -> Iterator[Tap]:
        """Runs layer by layer, and gives what each wrote before anything takes its place.

        The fusion stays as it is: these are the kernels of `run`, on memory of the walk's own, so
        the session may be used for other runs in between.

        Args:
            inputs: as for `run`.

        Yields:
            For each layer in order, each value that it wrote.

        Raises:
            InputError: as `run`.
        """
        tensors, bound = self._checked(inputs)
        profile = self.engine.plan.profiles[bound.profile]
        if self._gpu is not None:
            yield from self._walk_on_gpu(self._gpu, tensors, bound)
            return
        arena = allocate(self.engine.plan.arena_bytes + SLACK_BYTES)
        machine = replace(self._on_cpu("layer by layer"), arena=arena)
        machine.fill(profile)
        machine.tell(bound)
        for step, usual in zip(profile.steps, self._steps[bound.profile], strict=True):
            if not isinstance(usual, NativeStep):
                with self._lock:
                    self._require_open()
                    usual.run(tensors, bound)
                yield from self._taps(step.layers, machine, tensors, bound)
                continue
            native = NativeStep(step, profile, machine)
            native.bind(tensors, bound)
            for call, layer in enumerate(step.layers):
                with self._lock:
                    self._require_open()
                    native.run_calls(range(call, call + 1))
                seen = {**tensors, **native.counted(tensors)}
                yield from self._taps((layer,), machine, seen, bound)
            tensors.update(native.counted(tensors))

    def _walk_on_gpu(
        self, gpu: CudaNetwork, tensors: dict[str, Array], bound: Bound
    ) -> Iterator[Tap]:
        """As `walk`, in an arena of its own beside the weights that are there."""
        self._require_open()
        profile, usual = self.engine.plan.profiles[bound.profile], self._steps[bound.profile]
        with closing(CudaNetwork(self.engine, gpu.device.gpu.index)) as own:
            ready: list[tuple[Step, cuda_layers.Runnable]] = [
                (step, own.step(step, profile) if step.kind == CUDA else there)
                for step, there in zip(profile.steps, usual, strict=True)
            ]
            yield from cuda_layers.walk(self.engine, own, ready, tensors, bound)

    def layer_times_us(self, inputs: Mapping[str, Array], rounds: int) -> dict[int, float]:
        """Median time of each layer on the GPU in microseconds.

        Each runs once by itself in a named range first, which profilers show (NVTX); the graphs of
        usual runs show none. `inputs` are as for `run`, `rounds` how many times are measured.

        Returns:
            Index into `Plan.layers` -> time.

        Raises:
            InputError, UnsupportedError: as `run`; or the engine is not for CUDA.
        """
        gpu = cuda_layers.required(self.engine, self._gpu)
        tensors, bound = self._checked(inputs)
        profile = self.engine.plan.profiles[bound.profile]
        with self._lock:
            self._require_open()
            self._enter(bound)
            ready = list(zip(profile.steps, self._steps[bound.profile], strict=True))
            return cuda_layers.layer_times_us(gpu, ready, tensors, bound, rounds)

    def timeline(self, inputs: Mapping[str, Array]) -> Timeline:
        """One run with the time of every layer on every thread, or on the GPU.

        Args:
            inputs: as for `run`.

        Raises:
            InputError: as `run`.
        """
        tensors, bound = self._checked(inputs)
        profile, ready = self.engine.plan.profiles[bound.profile], self._steps[bound.profile]
        if self._gpu is not None:
            with self._lock:
                self._require_open()
                self._enter(bound)
                pairs = list(zip(profile.steps, ready, strict=True))
                return cuda_layers.timeline(profile, pairs, tensors, bound)
        workers = self._on_cpu("with a clock at every layer").workers
        stamps = [workers.stamps(len(step.layers)) for step in profile.steps]
        times: list[tuple[int, int]] = []
        with self._lock:
            self._require_open()
            self._enter(bound)
            for step, room in zip(ready, stamps, strict=True):
                begin = now_ns()
                if isinstance(step, NativeStep):
                    step.bind(tensors, bound)
                    step.run_calls(range(len(room)), room)
                    tensors.update(step.counted(tensors))
                else:
                    step.run(tensors, bound)
                times.append((begin, now_ns()))
        return timeline(profile, times, stamps)

    def _taps(
        self,
        layers: Sequence[int],
        machine: Machine,
        tensors: Mapping[str, Array],
        bound: Bound,
    ) -> Iterator[Tap]:
        """What layers wrote just now."""
        for index in layers:
            for write in self.engine.plan.layers[index].writes:
                value = read(write, machine.arena, tensors, bound.values)
                yield Tap(index, write.tensor.name, write.source, value)

    def close(self) -> None:
        """Ends the threads; further runs are errors. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                if self._machine is not None:
                    self._machine.workers.close()
                for network in (self._network, self._gpu):
                    if network is not None:
                        network.close()

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
                raise refusal(self.engine.plan, name, inputs)
            tensors[name] = array
        if len(inputs) != len(tensors):
            raise refusal(self.engine.plan, "", inputs)
        key = tuple([array.shape for array in tensors.values()])
        bound = self._bounds.get(key)
        if bound is None:
            if len(self._bounds) >= _MOST_BOUND:
                self._bounds.clear()
            shapes = {name: array.shape for name, array in tensors.items()}
            bound = self._bounds[key] = bind(self.engine.plan, shapes)
        for name, array in tensors.items():  # a view may stand for more than memory holds
            if not array.flags.c_contiguous:
                tensors[name] = array.copy()
        return tensors, bound

    def _step(
        self, step: Step, index: int, profile: Profile
    ) -> NativeStep | FallbackStep | PythonStep | TensorRTStep | CudaStep:
        """A step of a profile, ready to run."""
        if self._network is not None:
            return TensorRTStep(step, index, profile, self._network)
        if self._gpu is not None and step.kind == CUDA:
            return self._gpu.step(step, profile)
        if step.kind == "native":
            return NativeStep(step, profile, self._on_cpu())
        if step.kind == "python":
            return PythonStep(step, self.engine, {t.name: t.dtype for t in profile.tensors})
        return FallbackStep(step, self.engine, self.threads)

    def _on_cpu(self, how: str = "there") -> Machine:
        """What native steps run on.

        Raises:
            UnsupportedError: the engine is for a GPU.
        """
        if self._machine is None:
            target = self.engine.plan.target
            raise UnsupportedError(
                f"an engine for {target} cannot be run {how}",
                ["a network runs there as a whole"],
                "build the model for the CPU as well, and look at that engine",
            )
        return self._machine

    def _enter(self, bound: Bound) -> None:
        """Writes what the profile keeps in the arena: its halos, and the values of its symbols."""
        before, self._current = self._current, bound
        profile = self.engine.plan.profiles[bound.profile]
        new = before is None or before.profile != bound.profile
        if self._gpu is not None and new:
            self._gpu.enter(profile)
        if self._machine is None:
            return
        if new:
            self._machine.fill(profile)
        self._machine.tell(bound)

    def _require_open(self) -> None:
        if self._closed:
            raise InputError("this session is closed", [], "open a new Session")


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
