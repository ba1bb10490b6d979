"""The steps of an engine, ready to run: a generated program, or a subgraph on ONNX Runtime."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.abi import BINDINGS, SYMBOL_BYTES
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.memory import Bytes, address
from twofour.engine import Engine, Profile, Step
from twofour.runtime.cpu import Code, Stamps, Workers
from twofour.runtime.shapes import Bound

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Machine:
    """What native steps run on.

    Attributes:
        code: holds their programs.
        workers: the threads.
        arena: activation memory.
        weights: packed weights and constants.
    """

    code: Code
    workers: Workers
    arena: Bytes
    weights: Bytes

    def fill(self, profile: Profile) -> None:
        """Writes the halos of a profile to the arena."""
        for fill in profile.fills:
            self.arena[fill.offset : fill.offset + fill.size_bytes] = fill.value

    def tell(self, bound: Bound) -> None:
        """Writes the values of a profile's symbols to the arena."""
        size = len(bound.values) * SYMBOL_BYTES
        self.arena[:size].view(np.int64)[:] = bound.values


class NativeStep:
    """A generated program with its table of pointers."""

    def __init__(self, step: Step, profile: Profile, machine: Machine) -> None:
        """Finds the program and fixes what does not change from run to run."""
        infos = {info.name: info for info in profile.tensors}
        self._inputs = step.inputs
        self._outputs = [(name, np.dtype(infos[name].dtype)) for name in step.outputs]
        self._counted = {name: infos[name] for name in step.outputs if infos[name].count}
        self._program = machine.code.address(step.symbol)
        self._machine = machine  # holds the memory whose addresses stand in the table
        self._workers = machine.workers
        self._args = (ctypes.c_int64 * (BINDINGS + len(step.inputs) + len(step.outputs)))()
        self._args_address = ctypes.addressof(self._args)
        for index, block in enumerate((machine.arena, machine.weights, machine.workers.sync)):
            self._args[index] = address(block)

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Binds the plain tensors and calls the program."""
        self.bind(tensors, bound)
        self._workers.run(self._program, self._args_address)
        if self._counted:
            tensors.update(self.counted(tensors))

    def bind(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Makes the plain outputs, and tells the program where all plain tensors are."""
        at = BINDINGS
        for name in self._inputs:
            self._args[at] = address(tensors[name])
            at += 1
        for name, dtype in self._outputs:
            info = self._counted.get(name)
            array = tensors[name] = np.empty(info.most if info else bound.shapes[name], dtype)
            self._args[at] = address(array)
            at += 1
        for info in self._counted.values():
            tensors[info.count][:] = 0  # a run of some calls may not count

    def counted(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """The outputs whose rows the program counts, as many rows as it wrote."""
        found = {}
        for name, info in self._counted.items():
            rows = int(tensors[info.count][0])
            found[name] = tensors[name][: min(max(rows, 0), info.most[0])].copy()
        return found

    def run_calls(self, calls: range, stamps: Stamps | None = None) -> None:
        """Some calls of the program, on tensors that are bound; see `Workers.run_calls`."""
        self._workers.run_calls(self._program, self._args_address, calls, stamps)


class FallbackStep:
    """A subgraph on ONNX Runtime."""

    def __init__(self, step: Step, engine: Engine, threads: int) -> None:
        """Opens the subgraph."""
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
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # It would drop a DQ -> Q pair between two scales, and move values by a whole step.
        options.add_session_config_entry("session.disable_double_qdq_remover", "1")
        options.log_severity_level = 4  # what goes wrong is raised, not printed as well
        model = engine.subgraphs[step.symbol].tobytes()
        try:
            self._session = onnxruntime.InferenceSession(
                model,
                options,
                providers=["CPUExecutionProvider"],
                # It would round float weights between quantized tensors, all channels alike.
                disabled_optimizers=["WeightBiasQuantization"],
            )
        except self._errors as e:
            raise EngineError(
                f"ONNX Runtime refuses step {step.symbol!r}", [str(e)], "rebuild the engine"
            ) from e
        self._inputs, self._outputs, self._symbol = step.inputs, step.outputs, step.symbol
        self._options = onnxruntime.RunOptions()

    def stop(self) -> None:
        """Makes this run, and all later ones, errors: from another thread, where one never ends."""
        self._options.terminate = True

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Feeds and runs the subgraph."""
        feeds = {name: tensors[name] for name in self._inputs}
        try:
            results = self._session.run(list(self._outputs), feeds, self._options)
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
