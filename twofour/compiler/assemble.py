"""Lowered graph -> engine: every section becomes a step, every operator a call and a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from twofour.compiler.emit import Emitter
from twofour.compiler.fallback import host_layer, subgraph
from twofour.compiler.lower import Lowered, Placed, Section
from twofour.compiler.origins import Origins
from twofour.compiler.passes.pipeline import Fused
from twofour.compiler.profile import Placement
from twofour.compiler.python_calls import python_call
from twofour.compiler.reasons import Reasons
from twofour.compiler.schedule import Schedule
from twofour.compiler.writes import Recorder, SourceNames
from twofour.core.abi import BINDINGS
from twofour.core.plan import PluginCall
from twofour.core.sizes import Symbol
from twofour.core.version import __version__
from twofour.engine import Bytes, Engine, Layer, Plan, Profile, Step, TensorInfo
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.program import program_text, threads_text

CODE = "native"
"""Name of the one object that holds an engine's native code."""
PYTHON = "python"
"""Tactic of a plugin's operator that runs by its meaning."""
_SYMBOLS = {"native": "program", "onnxruntime": "fallback", "python": "plugin"}


class Progress(Protocol):
    """Told how far a long operation is."""

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """`done` of `total` (None: unknown) units, now at `what`."""
        ...


@dataclass(frozen=True)
class Compiled:
    """A network ready for one profile.

    Attributes:
        fused: the graph after the passes.
        order: its schedule.
        lowered: its sections.
        operators: how many the model had.
        names: the source model's own.
        symbols: its open dimensions.
        bf16: whether bfloat16 was asked for.
    """

    fused: Fused
    order: Schedule
    lowered: Lowered
    operators: int
    names: SourceNames
    symbols: tuple[Symbol, ...] = ()
    bf16: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Of nodes, for people."""
        sections = len(self.lowered.sections)
        return {
            "operators": self.operators,
            "fused": len(self.fused.model.graph),
            "steps": sections,
            "calls": sum(len(section.ops) for section in self.lowered.sections),
            "waves": sum(section.waves for section in self.lowered.sections),
        }

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The fused graph as all fallback steps take their parts from it."""
        return ir.to_proto(self.fused.model)

    @cached_property
    def recorder(self) -> Recorder:
        """Records what its layers write."""
        return Recorder(self.fused.model.graph, self.order, self.lowered, self.names)

    @cached_property
    def origins(self) -> Origins:
        """Tells who wrote what its layers read, as they are assembled."""
        return Origins(self.fused.model.graph)

    @cached_property
    def reasons(self) -> Reasons:
        """Why its layers are not integer, and who caused its conversions."""
        return Reasons(self.fused, self.order, self.bf16)

    def fallback_layer(self, node: ir.Node, section: Section, index: int) -> Layer:
        """A node that stays on ONNX Runtime, with all known reasons; `index` is the layer's."""
        return replace(
            host_layer(node, self.order, self.fused),
            source=self.recorder.nodes_of([node]),
            writes=self.recorder.outputs(node, section.outputs),
            reads=self.origins.of_node(node, index),
        )

    def recorded(self, layer: Layer, placed: Placed, index: int) -> Layer:
        """A native layer with what it computes, reads and writes, and what the graph tells of it.

        Args:
            layer: as the emitter made it.
            placed: its operator.
            index: of the layer among those of all profiles.
        """
        return replace(
            layer,
            notes=(*layer.notes, *self.reasons.notes(placed, layer)),
            source=self.recorder.nodes(placed),
            writes=self.recorder.writes(placed),
            cause=self.reasons.cause(placed),
            reads=self.origins.of_native(placed, index),
        )

    def profile(self, steps: Sequence[Step]) -> Profile:
        """The profile whose steps these are."""
        graph, lowered = self.fused.model.graph, self.lowered
        ends = {v.name for v in (*graph.inputs, *graph.outputs)}
        crossing = {n for s in lowered.sections for n in (*s.inputs, *s.outputs)}
        return Profile(
            inputs=self._infos(graph.inputs),
            outputs=self._infos(graph.outputs),
            boundary=tuple(lowered.plain[n] for n in sorted(crossing - ends)),
            steps=tuple(steps),
            arena_bytes=lowered.arena_bytes,
            fills=lowered.fills,
            symbols=self.symbols,
        )

    def _infos(self, values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
        return tuple(self.lowered.plain[value.name or ""] for value in values)


@dataclass
class Assembler:
    """Collects the profiles of one engine, which share code and constants.

    Attributes:
        networks: the network for each profile.
        emitter: makes kernels and constants.
        threads: to balance the work for.
        progress: told about each operator, or None.
        placements: every call, for its time to be taken.
    """

    networks: Sequence[Compiled]
    emitter: Emitter
    threads: int
    progress: Progress | None = None
    placements: list[Placement] = field(default_factory=list)
    _subgraphs: dict[str, Bytes] = field(default_factory=dict)
    _plugins: list[PluginCall] = field(default_factory=list)
    _done: int = 0

    def assemble(self) -> Engine:
        """The engine, without the name and hash of its source; fills `placements`."""
        profiles: list[Profile] = []
        for network in self.networks:
            first = sum(len(profile.steps) for profile in profiles)
            self.emitter.begin(network.lowered.arena_bytes)
            steps = [
                self._step(network, index, section)
                for index, section in enumerate(network.lowered.sections, first)
            ]
            profile = network.profile(steps)
            profiles.append(replace(profile, arena_bytes=self.emitter.memory_bytes))
        self._tell("code")
        target = self.emitter.tuner.target
        sources = [*self.emitter.sources.values(), Source(threads_text(target.arch))]
        code = compile_object(sources, target)
        objects = {CODE: np.frombuffer(code, np.uint8)}
        plan = Plan(
            target=target,
            version=__version__,
            source_sha256="",
            profiles=tuple(profiles),
            layers=tuple(self.emitter.layers),
            threads=self.threads,
            code=(CODE,),
            plugins=tuple(self._plugins),
            free=self.networks[0].names.free(layer.source for layer in self.emitter.layers),
        )
        return Engine(plan, self.emitter.weights(), objects, self._subgraphs)

    def _step(self, network: Compiled, index: int, section: Section) -> Step:
        """A section as a step."""
        first = len(self.emitter.layers)
        kind = section.kind
        symbol = f"{_SYMBOLS[kind]}{index}"
        if kind == "native":
            self._native(network, symbol, section)
        elif kind == "python":
            self._python(network, symbol, section)
        else:
            self._fallback(network, symbol, section)
        layers = tuple(range(first, len(self.emitter.layers)))
        return Step(kind, symbol, section.inputs, section.outputs, layers)

    def _native(self, network: Compiled, symbol: str, section: Section) -> None:
        """A program of calls."""
        names = (*section.inputs, *section.outputs)
        bindings = {name: BINDINGS + i for i, name in enumerate(names)}
        infos = tuple(network.lowered.plain[name] for name in names)
        values = tuple(symbol.usual for symbol in network.symbols)
        calls = []
        later = [*section.ops[1:], None]
        for placed, following in zip(section.ops, later, strict=True):
            self._tell(placed.op.name)
            first = len(self.emitter.layers)
            added = self.emitter.emit(placed, bindings)
            last = len(self.emitter.layers) - 1
            self.emitter.layers[-1] = network.recorded(self.emitter.layers[-1], placed, last)
            last_of_wave = following is None or following.wave != placed.wave
            calls += [*added[:-1], replace(added[-1], meets=last_of_wave)]
            self.placements += [
                Placement(index, call, infos, values) for index, call in enumerate(added, first)
            ]
            self._done += 1
        self.emitter.sources[symbol] = Source(program_text(symbol, calls, self.threads))

    def _fallback(self, network: Compiled, symbol: str, section: Section) -> None:
        """A subgraph for ONNX Runtime."""
        self._tell(symbol)
        model = subgraph(network.proto, section, network.lowered.plain)
        self._subgraphs[symbol] = np.frombuffer(model, np.uint8)
        first = len(self.emitter.layers)
        self.emitter.layers += [
            network.fallback_layer(node, section, index)
            for index, node in enumerate(section.nodes, first)
        ]
        self._done += 1

    def _python(self, network: Compiled, symbol: str, section: Section) -> None:
        """An operator of a plugin, by its meaning."""
        (node,) = section.nodes
        self._tell(node.name or symbol)
        call, self._subgraphs[symbol] = python_call(symbol, node, section.inputs)
        self._plugins.append(call)
        layer = network.fallback_layer(node, section, len(self.emitter.layers))
        note = f"it runs in Python, by the meaning that {call.package} gives it"
        layer = replace(layer, tactic=PYTHON, notes=(note, *layer.notes))
        self.emitter.layers.append(layer)
        self._done += 1

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            sections = [s for network in self.networks for s in network.lowered.sections]
            total = sum(len(s.ops) + bool(s.nodes) for s in sections)
            self.progress(self._done, total, what)
