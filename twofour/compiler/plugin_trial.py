"""Kernels of plugins on trial: compared with the meaning, then timed, as all others are.

Every operand has memory of its own that lies as in the engine, with guard bytes around the outputs.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.plugin_code import Entry, Planned, element_bytes
from twofour.compiler.plugin_meaning import meant, samples
from twofour.compiler.trial import Timer, WrongResult
from twofour.core.abi import BINDINGS, SLACK_BYTES, WEIGHTS
from twofour.core.bfloat16 import ROUNDING, from_bf16, to_bf16
from twofour.core.memory import address, allocate, with_slack
from twofour.core.plugins import BFLOAT16_TOLERANCE, Operand, Problem
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source, compile_object, renamed
from twofour.kernels.cpu.program import Operand as Place
from twofour.kernels.cpu.program import program_text, threads_text
from twofour.runtime.cpu import Code, Workers

Array = NDArray[Any]
_GUARD = 0xA5
_EDGE = 1024  # guard bytes on both sides


class _Memory:
    """An operand in memory of its own."""

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        self._item = np.dtype(f"u{element_bytes(operand.dtype)}")
        spans = ((n - 1) * s for n, s in zip(operand.shape, operand.strides, strict=True))
        self.memory = allocate(sum(spans) + self._item.itemsize + 2 * _EDGE + SLACK_BYTES)
        self.memory[:] = _GUARD
        self.address = address(self.memory) + _EDGE

    def _view(self) -> Array:
        """Its elements as unsigned numbers of their size."""
        flat = self.memory[_EDGE:]
        flat = flat[: flat.size // self._item.itemsize * self._item.itemsize].view(self._item)
        return np.lib.stride_tricks.as_strided(flat, self.operand.shape, self.operand.strides)

    def write(self, array: Array) -> None:
        """Stores values; of bfloat16 they are float32."""
        if self.operand.dtype == "bfloat16":
            array = to_bf16(array)
        elif self.operand.biased:
            array = (array.astype(np.int16) + 128).astype(np.uint8)
        self._view()[...] = np.ascontiguousarray(array).view(self._item)

    def read(self) -> Array:
        """The inverse of `write`."""
        held = np.ascontiguousarray(self._view())
        if self.operand.dtype == "bfloat16":
            return from_bf16(held)
        if self.operand.biased:
            return (held.astype(np.int16) - 128).astype(np.int8)
        return held.view(self.operand.dtype).reshape(self.operand.shape)

    def forget(self) -> None:
        """Guard bytes everywhere."""
        self.memory[:] = _GUARD

    def untouched(self) -> bool:
        """Whether nothing but the elements was written since `forget`; forgets them."""
        self._view()[...] = np.frombuffer(bytes([_GUARD] * self._item.itemsize), self._item)[0]
        return bool((self.memory == _GUARD).all())


@dataclass(frozen=True)
class Built:
    """A candidate as it runs by itself.

    Attributes:
        timer: timer(n) -> microseconds of a run of all its kernels, over n runs.
        program: its address.
        table: its pointers.
        workers: its threads.
        held: what has to live as long.
    """

    timer: Timer
    program: int
    table: Any
    workers: Workers
    held: tuple[Any, ...]

    def stage_times_us(self, count: int, rounds: int) -> list[float]:
        """Of each kernel, the least of some runs."""
        stamps = self.workers.stamps(count)
        times = []
        for _ in range(rounds):
            self.workers.run_calls(self.program, ctypes.addressof(self.table), range(count), stamps)
            times.append((stamps[:, 0, 2] - stamps[:, 0, 0]) / 1e3)
        return [float(least) for least in np.min(times, axis=0)]


class PluginTrial:
    """One operator with random inputs and the right answer."""

    def __init__(self, op: PluginOp, problem: Problem, target: Target, threads: int) -> None:
        """Makes the inputs and computes the answer.

        Args:
            op: the operator.
            problem: as it lies in the engine.
            target: to build for.
            threads: that share the work.

        Raises:
            UnsupportedError: the plugin's samples or its meaning fail.
        """
        self.op, self.problem, self._target, self._threads = op, problem, target, threads
        given = samples(op.operator, problem)
        self._answer = meant(op, given)
        self._memories = [_Memory(operand) for operand in problem.operands]
        for memory, array in zip(self._memories, given, strict=False):
            memory.write(array)

    def build(self, planned: Planned) -> Built:
        """Compiles a candidate, with its operands in place."""
        sources, symbols = [], []
        for number, part in enumerate(planned.parts):
            symbols.append(f"stage{number}")
            text = renamed(part.source.text, symbols[-1])
            sources.append(Source(text, part.source.vectorize))
        constants = with_slack(planned.constants, SLACK_BYTES)
        workspace = allocate(planned.workspace_bytes + SLACK_BYTES)
        workspace[:] = _GUARD
        places = [*(memory.address for memory in self._memories), address(workspace)]

        def place(entry: Entry) -> Place:
            index = len(places) - 1 if entry.operand is None else entry.operand
            return Place(BINDINGS + index, entry.offset)

        calls = planned.calls(symbols, place, Place(WEIGHTS))
        program = Source(program_text("program", calls, self._threads))
        threads = Source(threads_text(self._target.arch))
        data = compile_object([*sources, program, threads], self._target)
        code = Code([data])
        workers = Workers(code, self._threads)
        numbers = (0, address(constants), address(workers.sync), *places)
        table = (ctypes.c_int64 * len(numbers))(*numbers)
        start = code.address("program")

        def timer(count: int) -> float:
            began = time.perf_counter_ns()
            for _ in range(count):
                workers.run(start, ctypes.addressof(table))
            return (time.perf_counter_ns() - began) / count / 1e3

        return Built(timer, start, table, workers, (code, constants, workspace, self))

    def check(self, planned: Planned, built: Built) -> None:
        """Runs once and compares everything, guard bytes included.

        Raises:
            WrongResult: a value differs from the meaning's, or something else was written.
        """
        outputs = self._memories[-len(self._answer) :]
        for memory in outputs:
            memory.forget()
        before = self._inputs_hash()
        built.workers.run(built.program, ctypes.addressof(built.table))
        problems = [] if self._inputs_hash() == before else ["it wrote to its inputs"]
        for memory, answer in zip(outputs, self._answer, strict=True):
            got = memory.read()
            tolerance = self.op.operator.tolerance
            tolerance += BFLOAT16_TOLERANCE if planned.tactic.bfloat16 else 0.0
            wrong = _differs(got, answer, memory.operand, tolerance)
            if wrong.any():
                where = tuple(int(i) for i in np.argwhere(wrong)[0])
                problems.append(
                    f"{int(wrong.sum())} of {wrong.size} values of {memory.operand.name} differ,"
                    f" first at {where}: {got[where]}, expected {answer[where]}"
                )
            if not memory.untouched():
                problems.append(f"bytes around {memory.operand.name} were overwritten")
        if problems:
            shapes = ", ".join(f"{o.dtype} {list(o.shape)}" for o in self.problem.operands)
            raise WrongResult(
                f"kernel {planned.tactic.name} {planned.config} of the plugin operator"
                f" {self.op.operator} computes a wrong result",
                [f"operands: {shapes}", *problems],
                "mend the plugin's kernel or its meaning",
            )

    def _inputs_hash(self) -> bytes:
        digest = hashlib.sha256()
        for memory in self._memories[: -len(self._answer)]:
            digest.update(memory.memory.data)
        return digest.digest()


def _differs(got: Array, expected: Array, operand: Operand, tolerance: float) -> NDArray[np.bool_]:
    """Where values are not what they should be.

    Floats may be off by the tolerance, relative to the largest, bfloat16 by its rounding too. What
    was rounded to steps of a scale may be off by one of them, other integers must be equal.
    """
    if operand.scale is not None:
        return np.asarray(np.abs(got.astype(np.int32) - expected) > 1)
    if got.dtype.kind != "f":
        return np.asarray(got != expected)
    slack = tolerance + (2 * ROUNDING if operand.dtype == "bfloat16" else 0.0)
    bound = slack * float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        near = np.abs(got.astype(np.float64) - expected) <= bound
    both_nan = np.isnan(got) & np.isnan(expected)
    return np.asarray(~(near | (got == expected) | both_nan))
