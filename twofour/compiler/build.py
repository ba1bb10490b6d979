"""model -> engine: import, passes, schedule, places, kernels, engine.

    engine = build("model.onnx")
    engine.save("model.engine")

The steps stand in `compile_model`, in order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from twofour.compiler.assemble import Assembler, Compiled, Progress
from twofour.compiler.cost import with_estimates
from twofour.compiler.emit import Emitter
from twofour.compiler.importer import import_graph
from twofour.compiler.join_moves import join_moves
from twofour.compiler.join_pools import join_pools
from twofour.compiler.join_walks import join_walks
from twofour.compiler.lower import lower
from twofour.compiler.native_plugin import inlined_notes
from twofour.compiler.open_graph import OpenGraph
from twofour.compiler.options import EFFORTS, SPARSITY, BuildOptions, without_sparse
from twofour.compiler.passes.pipeline import Fused, Pass, run_passes
from twofour.compiler.precision import passes_for, target_of, why_float
from twofour.compiler.profile import Placement, with_times
from twofour.compiler.quantized import quantized
from twofour.compiler.requests import (
    Request,
    Shape,
    became_one,
    read_request,
    shapes_of_data,
    with_open_sizes,
)
from twofour.compiler.rivals import Rivals
from twofour.compiler.schedule import schedule, weight_bytes
from twofour.compiler.tensorrt.build import tensorrt_engine
from twofour.compiler.timing_cache import TimingCache
from twofour.compiler.tune import Tuner
from twofour.compiler.whole import whole_engine
from twofour.compiler.whole_race import faster
from twofour.compiler.writes import SourceNames
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import Target, check_runs_here, host_target, parse_target
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.promises import check, without_promises
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.sparse import densified

__all__ = ["EFFORTS", "SPARSITY", "BuildOptions", "Model", "build", "compile_model", "loaded"]

Model = str | os.PathLike[str] | ir.Model | onnx.ModelProto
_NEAR_BYTES = 1 << 20  # weights of a whole network that an L2 may hold from run to run
_HELD_BYTES = 32 << 20  # not packed, that a last-level cache may hold
_LEFT_NEAR_BYTES = 4 << 20  # several times an L2
_FAR_BYTES = 64 << 20  # more than an L3 holds


def build(model: Model, *, progress: Progress | None = None, **options: Any) -> Engine:
    """Compiles a model for this machine.

        engine = build("model.onnx", sparsity="enable", int8=True, data={"x": calibration_inputs})

    Args:
        model: an ONNX file, or a model in memory; not changed.
        progress: told about each layer.
        **options: the fields of `BuildOptions`, by name; `target` may be a word: "tensorrt:sm89".

    Raises:
        InputError: the model, the data or an option is not usable.
        UnsupportedError: an input or output is of a kind that engines do not pass on.
        GateError: a weight does not have the pattern that the model promises; `sparsity="disable"`
            does not look.
    """
    known = {f.name for f in fields(BuildOptions)}
    if unknown := set(options) - known:
        raise InputError(
            f"build has no option {min(unknown)!r}",
            [f"expected some of {', '.join(sorted(known))}"],
        )
    if isinstance(target := options.get("target"), str):
        options["target"] = parse_target(target)
    try:
        return compile_model(model, BuildOptions(**options), progress)
    except MemoryError as error:
        raise UnsupportedError(
            "the build ran out of memory", [f"{error}"], "build for smaller inputs"
        ) from error


def compile_model(model: Model, options: BuildOptions, progress: Progress | None = None) -> Engine:
    """`build`, with its options as one value."""
    target = options.target or host_target()
    if target.tensorrt is not None or target.cuda is not None:
        return _on_gpu(model, target, options, progress)
    return _by_kernels(model, target, options, progress)


def _by_kernels(
    model: Model, target: Target, options: BuildOptions, progress: Progress | None
) -> Engine:
    """`compile_model` where kernels of our own are taken."""
    _require_here(target)
    source, name, digest = _source(model)
    if options.sparsity == "disable":
        source = without_promises(source)
    notes = check(source).notes
    profiles = options.profiles or (options.shapes or {},)
    if options.int8:
        if options.data is not None and not any(profiles):
            profiles = (shapes_of_data(source.graph, options.data),)
        found, notes = quantized(source, options, None, progress)
        source = source if found is None else found.model
    requests = [read_request(source.graph, profile) for profile in profiles]
    notes += tuple(filter(None, [became_one(source.graph, profiles[0])]))
    cache_file = Path(options.timing_cache) if options.timing_cache is not None else None
    cache = TimingCache.load(cache_file)
    compilation = _Compilation(source, tuple(requests), options, target, cache, progress)
    try:
        networks = compilation.networks({})
    except InputError as error:
        raise with_open_sizes(error, source.graph, profiles[0]) from error
    except UnsupportedError as error:
        why = "; ".join(filter(None, (error.what, *error.reasons, error.fix)))
        engine = whole_engine(source, requests, target, options.threads, why)
        engine = _timed(engine, (), cache)
    else:
        notes += tuple(note for each in networks for note in inlined_notes(each.fused.model))
        engine, floats = compilation.settle(networks)
        if options.dump is not None:
            compilation.networks(floats, options.dump)
        if _races(options, target):
            whole = partial(whole_engine, source, requests, target, options.threads)
            engine = faster(engine, whole, cache)
    cache.save(cache_file)
    notes += engine.plan.notes + without_sparse(options, engine.plan.layers)
    plan = replace(engine.plan, source_name=name, source_sha256=digest, notes=notes)
    return replace(engine, plan=plan)


def _on_gpu(
    model: Model, target: Target, options: BuildOptions, progress: Progress | None
) -> Engine:
    """`compile_model` for a GPU: kernels of our own, or TensorRT compiles."""
    source, name, digest = _source(model)
    if options.sparsity == "disable":
        source = without_promises(source)
    kept = check(source).notes
    profiles = options.profiles or (options.shapes or {},)
    if options.data is not None and not any(profiles):
        profiles = (shapes_of_data(source.graph, options.data),)
    made = tensorrt_engine if target.tensorrt is not None else _cuda_engine()
    engine = made(source, target, options, profiles, progress)
    notes = (*kept, *engine.plan.notes)
    plan = replace(engine.plan, source_name=name, source_sha256=digest, notes=notes)
    return replace(engine, plan=plan)


def _cuda_engine() -> Callable[..., Engine]:
    """What builds for CUDA: its kernels are written in Triton, which not everybody has.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        found: Callable[..., Engine] = import_module("twofour.compiler.cuda.build").cuda_engine
    except ImportError as error:
        raise UnsupportedError(
            "nothing can be built for CUDA here", [str(error)], "pip install 'twofour[cuda]'"
        ) from error
    return found


def _require_here(target: Target) -> None:
    """Refuses code that is to be timed and cannot run; that of another machine is not timed."""
    if not target.cpu:
        check_runs_here(target)


def _races(options: BuildOptions, target: Target) -> bool:
    """Whether ONNX Runtime may win the whole model: by time, so never for another machine."""
    timed = options.tuning_effort > 0 and not target.cpu
    return options.race and timed and options.sparsity != "force"


def _timed(engine: Engine, placements: Sequence[Placement], cache: TimingCache) -> Engine:
    """With the times of all layers: measured here, or those of another machine estimated."""
    if engine.plan.target.cpu:
        return with_estimates(engine)
    return with_times(engine, placements, cache)


@dataclass(frozen=True)
class _Compilation:
    """A model that is compiled once, or again with some products in float32.

    Attributes:
        source: the model.
        requests: one for each profile.
        options: how to build.
        target: what to build for.
        cache: times already known.
        progress: told about each layer.
    """

    source: ir.Model
    requests: tuple[Request, ...]
    options: BuildOptions
    target: Target
    cache: TimingCache
    progress: Progress | None

    def settle(self, networks: Sequence[Compiled]) -> tuple[Engine, dict[str, str]]:
        """The engine, and why products stay float32 in it that could be bfloat16, by name.

        Args:
            networks: for each profile, where no product has to stay float32.
        """
        floats: dict[str, str] = {}
        engine, faster = self.attempt(networks)
        while faster:
            other, further = self.attempt(self.networks(floats | faster))
            if _whole_us(other) >= _whole_us(engine):
                break
            engine, floats, faster = other, floats | faster, further
        return engine, floats

    def networks(self, floats: Mapping[str, str], dump: Path | None = None) -> list[Compiled]:
        """The network for each profile, where these products stay float32."""
        passes = passes_for(self.target, self.options.bf16, floats, self._chosen_float32())
        forced = self.options.sparsity == "force"
        return [
            replace(
                _network(self.source, each, passes, self.target, forced, dump),
                bf16=self.options.bf16,
            )
            for each in self.requests
        ]

    def _chosen_float32(self) -> frozenset[str]:
        """The results of the nodes that the user keeps in float32."""
        names = frozenset(self.options.stay_float32)
        nodes = (node for node in self.source.graph if node.name in names)
        return frozenset(node.outputs[0].name or "" for node in nodes)

    def attempt(self, networks: Sequence[Compiled]) -> tuple[Engine, dict[str, str]]:
        """The engine of these networks; and which further products should be float32, and why."""
        options, target, cache = self.options, self.target, self.cache
        reasons: dict[str, str] = {}
        for network in networks:
            reasons |= why_float(target, network.fused, options.bf16)
        used = [target_of(target, network.fused, options.bf16) for network in networks]
        target = next((t for t in used if t.bf16), used[0])
        cold_bytes, effort = _cold_bytes(weight_bytes(networks[0].order)), options.tuning_effort
        tuner = Tuner(target, cache, options.threads, cold_bytes=cold_bytes, effort=effort)
        rivals = Rivals.beside(tuner)
        emitter = Emitter(tuner, options.sparsity, reasons, options.workspace_bytes, rivals)
        assembler = Assembler(networks, emitter, options.threads, self.progress)
        engine = assembler.assemble()
        engine = replace(engine, plan=replace(engine.plan, graph=networks[0].counts))
        engine = _timed(engine, assembler.placements, cache)
        sections = [section for network in networks for section in network.lowered.sections]
        return engine, rivals.faster_in_float(engine.plan.layers, sections)


def _whole_us(engine: Engine) -> float:
    """The times of all layers together."""
    return sum(layer.time_us or 0.0 for layer in engine.plan.layers)


def _network(
    source: ir.Model,
    request: Request,
    passes: tuple[Pass, ...],
    target: Target,
    forced: bool,
    dump: Path | None,
) -> Compiled:
    """The network for one profile, for a target; `forced` prunes weights that have no pattern."""
    operators: list[int] = []
    names = [SourceNames.of(source.graph)]

    def imported(shapes: Mapping[str, Shape]) -> ir.Model:
        graph = import_graph(source, shapes, None if request.symbols else target)
        operators.append(len(graph.graph))
        names.append(names[0].with_imported(graph.graph))
        return prune(graph, keep=("4:8",))[0] if forced else graph

    def fused(graph: ir.Model) -> Fused:
        return run_passes(graph, None if operators[1:] else dump, passes)

    if not request.symbols:
        static = fused(imported(request.shapes_at(())))
        order = join_moves(schedule(static.model.graph), static.model.graph)
        order = join_pools(join_walks(order, static.model.graph))
        lowered = lower(static.model.graph, order)
        return Compiled(static, order, lowered, operators[0], names[-1])
    found = OpenGraph.of(request, imported, fused)
    graph = found.fused.model.graph
    order = schedule(graph, found.read)
    for node in order.reasons:
        found.require_plain(node)
    lowered = lower(graph, order, found.dims)
    return Compiled(found.fused, order, lowered, operators[0], names[-1], request.symbols)


def loaded(model: Model) -> ir.Model:
    """The model in memory.

    Raises:
        InputError: the file is not a usable model.
    """
    if isinstance(model, (str, os.PathLike)):
        return load_model(model)
    return ir.from_proto(densified(model)) if isinstance(model, onnx.ModelProto) else model


def _source(model: Model) -> tuple[ir.Model, str, str]:
    """The model, its name for people, and the hash of its bytes."""
    source = loaded(model)
    if isinstance(model, (str, os.PathLike)):
        return source, Path(model).name, hashlib.sha256(Path(model).read_bytes()).hexdigest()
    return source, source.graph.name or "model", hashlib.sha256(model_bytes(source)).hexdigest()


def _cold_bytes(weights: int) -> int:
    """What is read of other weights between two runs of a layer; 0 if all stay in a near cache.

    Where a last-level cache holds all of them, enough to leave the near ones, and no more: copies
    of several candidates share it.
    """
    if weights <= _NEAR_BYTES:
        return 0
    return _LEFT_NEAR_BYTES if weights <= _HELD_BYTES else _FAR_BYTES
