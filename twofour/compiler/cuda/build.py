"""model -> engine for a GPU: quantize, import, passes, schedule, lower, compile, time, assemble.

The steps stand in `cuda_engine`, in order.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.compiler.assemble import Progress
from twofour.compiler.cuda.assemble import Constants, code_of, program_of
from twofour.compiler.cuda.choose import (
    GUESS_EFFORT,
    Choice,
    Way,
    choose,
    guesses_of,
    key_of,
    own_ways,
    ways_of,
    with_libraries,
    wrong_ones,
)
from twofour.compiler.cuda.early import EARLY_SECONDS, started_early
from twofour.compiler.cuda.graphs import Network, Part, network_of
from twofour.compiler.cuda.layers import layer_of
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.record import Recorder
from twofour.compiler.cuda.timing import ROUNDS, Bench, keyed_by
from twofour.compiler.cuda.types import Types
from twofour.compiler.fallback import host_layer, subgraph
from twofour.compiler.native_plugin import inlined_notes
from twofour.compiler.options import BuildOptions, without_sparse
from twofour.compiler.quantized import quantized
from twofour.compiler.requests import Requested, became_one, read_request
from twofour.compiler.timing_cache import TimingCache
from twofour.core.cuda import Cuda, installed
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.plan import Candidate
from twofour.core.target import CUDA, Target
from twofour.core.version import __version__
from twofour.engine import Bytes, Engine, Layer, Plan, Profile, Step
from twofour.kernels.cuda.kernel import LibraryKernel
from twofour.onnx_tools.options import QuantizeOptions
from twofour.runtime.cuda.device import Device, open_device

FLOAT8_LEAST = 89
"""The compute capability from which on tensor cores multiply float8."""


def cuda_engine(
    source: ir.Model,
    target: Target,
    options: BuildOptions,
    asked: Sequence[Requested],
    progress: Progress | None,
) -> Engine:
    """Builds a model for a GPU.

    Args:
        source: the model as loaded; not changed.
        target: CUDA's; the GPU may be named, and be another than that of this machine: then
            nothing is timed, and no kernel of a library is taken.
        options: how to build.
        asked: the shapes of each profile, all of them fixed.
        progress: told how far it is.

    Returns:
        The engine, without the name and hash of its source.

    Raises:
        InputError: the data or a shape does not fit.
        UnsupportedError: there is no GPU and none is named, or the model cannot run on one.
    """
    assert target.cuda is not None
    types = _types(options)
    model, notes = _calibrated(source, options, progress)
    requests = [read_request(model.graph, profile) for profile in asked]
    for request in requests:
        _require_fixed([symbol.name for symbol in request.symbols])
    notes += tuple(filter(None, [became_one(source.graph, asked[0])]))
    forced = options.sparsity == "force"
    device = _device(target.cuda)
    found = target.cuda if device is None else replace(target.cuda, gpu=f"sm{device.capability}")
    if options.fp8 and found.capability < FLOAT8_LEAST:
        raise UnsupportedError(
            f"a GPU of {found.gpu} does not multiply float8",
            [f"tensor cores do from sm{FLOAT8_LEAST} on"],
            "build with --int8",
        )
    networks = [
        network_of(
            model,
            request.shapes_at(()),
            types,
            forced=forced,
            dump=options.dump,
            target=replace(target, cuda=found),
        )
        for request in requests
    ]
    notes += tuple(note for network in networks for note in inlined_notes(network.fused.model))
    cache_file = Path(options.timing_cache) if options.timing_cache is not None else None
    cache = TimingCache.load(cache_file)
    builder = _Builder(options, found, device, cache, progress)
    engine = builder.engine(networks, notes)
    if device is not None:
        rounds, seconds = ROUNDS[options.tuning_effort], EARLY_SECONDS[options.tuning_effort]
        engine = started_early(engine, device, builder.waiting(), rounds, seconds)
    cache.save(cache_file)
    notes = engine.plan.notes + without_sparse(options, engine.plan.layers)
    return replace(engine, plan=replace(engine.plan, notes=notes))


@dataclass
class _Builder:
    """Builds the engine of some networks.

    Attributes:
        options: how to build.
        target: the GPU, named.
        device: the GPU, or None where it is not here.
        cache: times already known.
        progress: told how far it is.
    """

    options: BuildOptions
    target: Cuda
    device: Device | None
    cache: TimingCache
    progress: Progress | None
    _chosen: dict[int, Choice] = field(default_factory=dict)

    def engine(self, networks: Sequence[Network], notes: tuple[str, ...]) -> Engine:
        """The engine, its profiles those of the networks."""
        turns = [t for net in networks for part in net.parts if part.gpu for t in part.gpu.turns]
        self._choose(turns)
        constants, code = Constants(), dict[str, Bytes]()
        layers: list[Layer] = []
        subgraphs: dict[str, Bytes] = {}
        profiles: list[Profile] = []
        for network in networks:
            steps: list[Step] = []
            arena = 0
            for part in network.parts:
                index = sum(len(p.steps) for p in profiles) + len(steps)
                step, size = self._step(network, part, index, layers, constants, subgraphs)
                steps.append(step)
                arena = max(arena, size)
            profiles.append(_profile(network, steps, arena))
        for choice in self._chosen.values():
            code |= code_of([choice.way])
        made_for = self._made_for()
        plan = Plan(
            target=made_for,
            version=__version__,
            source_sha256="",
            profiles=tuple(profiles),
            layers=tuple(layers),
            threads=self.options.threads,
            code=tuple(sorted(code)),
            graph=_counts(networks[0]),
            notes=(*notes, *wrong_ones(self._chosen.values())),
            free=networks[0].names.free(layer.source for layer in layers),
        )
        return Engine(plan, constants.block(), code, subgraphs)

    def waiting(self) -> set[str]:
        """Names of the objects whose kernels wait for those in front of them."""
        codes = [code for choice in self._chosen.values() for code in choice.way.code]
        return {code.name for code in codes if code is not None and code.waits}

    def _made_for(self) -> Target:
        """The target with what the engine depends on."""
        used = {
            call.library
            for choice in self._chosen.values()
            for call in choice.way.recipe.calls
            if isinstance(call, LibraryKernel)
        }
        model, driver = "", ""
        versions: tuple[str, ...] = ()
        if self.device is not None:
            model, driver = self.device.gpu.name, self.device.driver.version
            versions = tuple(f"{name} {installed(name)}" for name in sorted(used))
        found = replace(self.target, libraries=versions, driver=driver)
        return Target(CUDA, platform.machine(), model, cuda=found)

    def _choose(self, turns: Sequence[Turn]) -> None:
        """Takes a way for every different turn."""
        options, capability = self.options, self.target.capability
        tell, timer = self._tell("compiling"), None
        effort = GUESS_EFFORT if self.device is None else options.tuning_effort
        if self.device is None:
            ways = guesses_of(turns, capability, options.sparsity, tell)
        else:
            ways = ways_of(turns, capability, effort, options.sparsity, tell)
            timer = Bench(self.device, effort, self.cache, keyed_by(self.device))
        unique = list({key_of(turn): turn for turn in reversed(turns)}.items())
        choices: dict[tuple[Any, ...], Choice] = {}
        for index, (key, turn) in enumerate(unique):
            if self.progress is not None:
                self.progress(index, len(unique), turn.op.name)
            found: list[Way | Candidate] = ways[key]
            if self.device is not None:
                found = with_libraries(
                    found, turn, self.device, effort, options.sparsity, capability
                )
            choices[key] = choose(turn, found, timer, options.sparsity)
        if timer is not None:
            timer.close()
        own = own_ways(turns, choices, self.device, capability, effort)
        for turn, way in zip(turns, own, strict=True):
            self._chosen[id(turn)] = replace(choices[key_of(turn)], way=way)

    def _tell(self, what: str) -> Any:
        if self.progress is None:
            return None
        tell = self.progress
        return lambda done, total: tell(done, total, what)

    def _step(
        self,
        network: Network,
        part: Part,
        index: int,
        layers: list[Layer],
        constants: Constants,
        subgraphs: dict[str, Bytes],
    ) -> tuple[Step, int]:
        """A part as a step, and the bytes of the arena that it needs."""
        first, section, recorder = len(layers), part.section, Recorder(network)
        if part.gpu is None:
            symbol = f"fallback{index}"
            model = subgraph(network.proto, section, network.plain)
            subgraphs[symbol] = np.frombuffer(model, np.uint8)
            layers += [
                replace(
                    host_layer(node, network.order, network.fused), source=recorder.nodes_of(node)
                )
                for node in section.nodes
            ]
            kind, size = "onnxruntime", 0
        else:
            symbol, kind = f"program{index}", "cuda"
            choices = [self._chosen[id(turn)] for turn in part.gpu.turns]
            program, offsets, size = program_of(part.gpu, choices, first, constants)
            subgraphs[symbol] = np.frombuffer(program.to_bytes(), np.uint8)
            for turn, choice in zip(part.gpu.turns, choices, strict=True):
                writes = recorder.writes(turn, offsets)
                layer = layer_of(turn, choice)
                layers.append(replace(layer, source=recorder.nodes(turn), writes=writes))
        indices = tuple(range(first, len(layers)))
        return Step(kind, symbol, section.inputs, section.outputs, indices), size


def _profile(network: Network, steps: Sequence[Step], arena: int) -> Profile:
    ends = {info.name for info in (*network.inputs, *network.outputs)}
    boundary = tuple(info for name, info in network.plain.items() if name not in ends)
    return Profile(network.inputs, network.outputs, boundary, tuple(steps), arena, ())


def _counts(network: Network) -> dict[str, int]:
    """Of nodes, for people."""
    fused = len(network.fused.model.graph)
    return {"operators": network.operators, "fused": fused, "steps": len(network.parts)}


def _types(options: BuildOptions) -> Types:
    real = "float16" if options.fp16 else "bfloat16" if options.bf16 else "float32"
    return Types(real, "float8e4m3fn" if options.fp8 else "int8")


def _device(target: Cuda) -> Device | None:
    """The GPU that the engine is for; None where another one than that of this machine is named.

    Raises:
        UnsupportedError: there is no GPU, and none is named.
    """
    try:
        device = open_device()
    except UnsupportedError as error:
        if target.gpu:
            return None
        raise UnsupportedError(
            "there is no GPU to build for",
            [error.what, *error.reasons],
            "build where one is, or name one, for which nothing is timed: --target cuda:sm90",
        ) from error
    return device if target.fits(device.gpu.capability) else None


def _calibrated(
    source: ir.Model, options: BuildOptions, progress: Progress | None
) -> tuple[ir.Model, tuple[str, ...]]:
    """The model with Q/DQ, symmetric; as it is where it has its scales already, or stays float."""
    given = options.data is not None or options.calibration_cache is not None
    if not (given and (options.int8 or options.fp8)):
        return source, ()
    found, notes = quantized(source, options, QuantizeOptions(activation="int8"), progress)
    return source if found is None else found.model, notes


def _require_fixed(symbols: Sequence[str]) -> None:
    if symbols:
        raise InputError(
            "an engine for a GPU has fixed shapes",
            [f"open: {', '.join(symbols)}"],
            "give every shape that is wanted as a profile of its own: --shapes x:8x3x224x224 "
            "--shapes x:32x3x224x224",
        )
