"""Model -> scheduled graph for each profile, and its stretches on the GPU and on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir as ir

from twofour.compiler import schedule as scheduling
from twofour.compiler.cuda.joins import without_waste
from twofour.compiler.cuda.lower import Lowering, Stretch
from twofour.compiler.cuda.reader import read
from twofour.compiler.cuda.types import Types
from twofour.compiler.importer import import_graph
from twofour.compiler.join_moves import join_moves
from twofour.compiler.join_walks import join_walks
from twofour.compiler.lower import Section
from twofour.compiler.native import plain_kind, static_shape
from twofour.compiler.native_nms import counted
from twofour.compiler.passes.pipeline import Fused, run_passes
from twofour.compiler.schedule import Schedule
from twofour.compiler.writes import SourceNames
from twofour.core.errors import UnsupportedError
from twofour.core.target import Target
from twofour.engine import TensorInfo
from twofour.onnx_tools.edit import reads
from twofour.onnx_tools.prune import prune

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """One step of an engine to be.

    Attributes:
        gpu: the turns, where it runs on the GPU; None for nodes of the host.
        section: what the host runs, and the plain values of either.
    """

    gpu: Stretch | None
    section: Section


@dataclass(frozen=True)
class Network:
    """A network for one profile.

    Attributes:
        fused: the graph after the passes.
        order: its schedule.
        parts: in order.
        names: the source model's own.
        operators: how many the model had.
    """

    fused: Fused
    order: Schedule
    parts: tuple[Part, ...]
    names: SourceNames
    operators: int

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The fused graph as steps on the host take their parts from it."""
        return ir.to_proto(self.fused.model)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Of the model."""
        return tuple(map(info_of, self.fused.model.graph.inputs))

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Of the model."""
        counts = counted(self.order.ops.values())
        outputs = self.fused.model.graph.outputs
        return tuple(counts.get(v.name or "") or info_of(v) for v in outputs)

    @cached_property
    def plain(self) -> Mapping[str, TensorInfo]:
        """Every value that passes between steps."""
        graph = self.fused.model.graph
        values = {v.name: v for v in graph.inputs}
        values |= {v.name: v for node in graph for v in node.outputs}
        names = {n for part in self.parts for n in (*part.section.inputs, *part.section.outputs)}
        ends = {v.name or "" for v in (*graph.inputs, *graph.outputs)}
        counts = counted(self.order.ops.values())
        return {n: counts.get(n) or info_of(values[n]) for n in sorted(names | ends)}


def info_of(value: ir.Value) -> TensorInfo:
    """A value as the plan has it."""
    dims = static_shape(value)
    if dims is None:
        return TensorInfo(value.name or "", plain_kind(value), (), known=False)
    return TensorInfo(value.name or "", plain_kind(value), dims)


def network_of(
    source: ir.Model,
    shapes: Shapes,
    types: Types,
    *,
    forced: bool,
    dump: Path | None,
    target: Target | None = None,
) -> Network:
    """The network for one profile.

    Args:
        source: the model.
        shapes: of its inputs.
        types: how values are held.
        forced: weights without a pattern are pruned to 2:4.
        dump: a folder for the text of the graph after each pass.
        target: the GPU, named; without it operators of plugins are inlined.

    Raises:
        UnsupportedError: nothing of it can run on a GPU.
    """
    imported = import_graph(source, shapes, target)
    operators = len(imported.graph)
    names = SourceNames.of(source.graph).with_imported(imported.graph)
    if forced:
        imported = prune(imported, keep=("4:8",))[0]
    fused = run_passes(imported, dump)
    graph = fused.model.graph
    order = join_moves(scheduling.schedule(graph, read), graph)
    order = join_walks(order, graph)
    if not any(stretch.native for stretch in order.stretches):
        reasons = list(dict.fromkeys(order.reasons.values()))[:10]
        raise UnsupportedError(
            "nothing of the model can run on the GPU", reasons, "build it for the CPU: --target cpu"
        )
    return Network(fused, order, _parts(order, graph, types, target), names, operators)


def _parts(
    order: Schedule, graph: ir.Graph, types: Types, target: Target | None
) -> tuple[Part, ...]:
    values = {v.name or "": v for v in graph.inputs}
    values |= {v.name or "": v for node in graph for v in node.outputs}
    finals = {v.name or "" for v in graph.outputs}
    read_by = [_reads(order, stretch) for stretch in order.stretches]
    capability = 0 if target is None or target.cuda is None else target.cuda.capability
    found = []
    for index, stretch in enumerate(order.stretches):
        later = set().union(*read_by[index + 1 :]) | finals
        if stretch.native:
            written = [n for node in stretch.nodes for n in order.ops[node].writes]
            wanted = [name for name in dict.fromkeys(written) if name in later]
            low = Lowering(values, types, order.ops, capability).stretch(stretch.nodes, wanted)
            low.turns = without_waste(low.turns)
            section = Section(True, (), (), low.inputs, low.outputs)
            found.append(Part(low, section))
            continue
        written = [v.name or "" for node in stretch.nodes for v in node.outputs]
        inputs = tuple(name for name in read_by[index] if name not in written)
        outputs = tuple(name for name in dict.fromkeys(written) if name in later)
        found.append(Part(None, Section(False, (), stretch.nodes, inputs, outputs)))
    return tuple(found)


def _reads(order: Schedule, stretch: scheduling.Stretch) -> dict[str, None]:
    """The computed values that a stretch reads, its own among them."""
    if stretch.native:
        return dict.fromkeys(name for node in stretch.nodes for name in order.ops[node].reads)
    nodes: Sequence[ir.Node] = stretch.nodes
    return dict.fromkeys(
        v.name for node in nodes for v in reads(node) if v.const_value is None and v.name
    )
