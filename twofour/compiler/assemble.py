"""Lowered graph -> engine: every section becomes a step, every operator a call and a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from twofour.compiler.emit import Emitter
from twofour.compiler.fallback import subgraph
from twofour.compiler.lower import Lowered, Section
from twofour.compiler.passes.pipeline import Fused
from twofour.compiler.profile import Placement
from twofour.compiler.schedule import Schedule
from twofour.core.abi import BINDINGS
from twofour.core.version import __version__
from twofour.engine import Bytes, Engine, Layer, Plan, Step, TensorInfo
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.program import program_text, threads_text

CODE = "native"
"""Name of the one object that holds an engine's native code."""


class Progress(Protocol):
    """Told how far a long operation is."""

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """`done` of `total` (None: unknown) units, now at `what`."""
        ...


@dataclass
class Assembler:
    """Collects the steps of one engine.

    Attributes:
        fused: the graph after the passes.
        order: its schedule.
        lowered: its sections.
        emitter: makes kernels and constants.
        threads: to balance the work for.
        progress: told about each operator, or None.
    """

    fused: Fused
    order: Schedule
    lowered: Lowered
    emitter: Emitter
    threads: int
    progress: Progress | None = None
    placements: list[Placement] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)
    _subgraphs: dict[str, Bytes] = field(default_factory=dict)
    _done: int = 0

    def assemble(self) -> Engine:
        """The engine, without the name and hash of its source; fills `placements`."""
        for index, section in enumerate(self.lowered.sections):
            first = len(self.emitter.layers)
            symbol = f"{'program' if section.native else 'fallback'}{index}"
            if section.native:
                self._native(symbol, section)
            else:
                self._fallback(symbol, section)
            layers = tuple(range(first, len(self.emitter.layers)))
            kind = "native" if section.native else "onnxruntime"
            self._steps.append(Step(kind, symbol, section.inputs, section.outputs, layers))
        self._tell("code")
        sources = [*self.emitter.sources.values(), Source(threads_text())]
        code = compile_object(sources, self.emitter.tuner.target)
        objects = {CODE: np.frombuffer(code, np.uint8)}
        return Engine(self._plan(), self.emitter.weights(), objects, self._subgraphs)

    def _native(self, symbol: str, section: Section) -> None:
        """A program of calls."""
        names = (*section.inputs, *section.outputs)
        bindings = {name: BINDINGS + i for i, name in enumerate(names)}
        infos = tuple(self.lowered.plain[name] for name in names)
        calls = []
        for placed in section.ops:
            self._tell(placed.op.name)
            call = self.emitter.emit(placed, bindings)
            calls.append(call)
            self.placements.append(Placement(len(self.emitter.layers) - 1, call, infos))
            self._done += 1
        self.emitter.sources[symbol] = Source(program_text(symbol, calls, self.threads))

    def _fallback(self, symbol: str, section: Section) -> None:
        """A subgraph for ONNX Runtime."""
        self._tell(symbol)
        model = subgraph(self._proto, section)
        self._subgraphs[symbol] = np.frombuffer(model, np.uint8)
        self.emitter.layers += [self._fallback_layer(node) for node in section.nodes]
        self._done += 1

    @cached_property
    def _proto(self) -> onnx.ModelProto:
        """The fused graph as all fallback steps take their parts from it."""
        return ir.to_proto(self.fused.model)

    def _fallback_layer(self, node: ir.Node) -> Layer:
        """A node that stays on ONNX Runtime, with all known reasons."""
        name = node.name or node.op_type
        notes = [self.order.reasons.get(node, "")]
        notes += [f"{r.rule}: {r.reason}" for r in self.fused.refusals if r.node == name]
        return Layer(name, node.op_type, "onnxruntime", notes=tuple(n for n in notes if n))

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            total = sum(len(s.ops) + bool(s.nodes) for s in self.lowered.sections)
            self.progress(self._done, total, what)

    def _plan(self) -> Plan:
        graph, lowered = self.fused.model.graph, self.lowered
        ends = {v.name for v in (*graph.inputs, *graph.outputs)}
        crossing = {n for s in lowered.sections for n in (*s.inputs, *s.outputs)}
        return Plan(
            target=self.emitter.tuner.target,
            version=__version__,
            source_sha256="",
            inputs=self._infos(graph.inputs),
            outputs=self._infos(graph.outputs),
            boundary=tuple(lowered.plain[n] for n in sorted(crossing - ends)),
            steps=tuple(self._steps),
            layers=tuple(self.emitter.layers),
            arena_bytes=lowered.arena_bytes,
            fills=lowered.fills,
            threads=self.threads,
            code=(CODE,),
        )

    def _infos(self, values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
        return tuple(self.lowered.plain[value.name or ""] for value in values)
