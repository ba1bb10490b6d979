"""model -> engine: import, passes, schedule, places, kernels, engine.

    engine = build("model.onnx")
    engine.save("model.engine")

The steps stand in `compile_model`, in order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from twofour.compiler.assemble import Assembler, Progress
from twofour.compiler.emit import Emitter
from twofour.compiler.importer import import_graph
from twofour.compiler.lower import lower
from twofour.compiler.passes.pipeline import run_passes
from twofour.compiler.profile import with_times
from twofour.compiler.schedule import schedule, weight_bytes
from twofour.compiler.tune import TimingCache, Tuner
from twofour.core.abi import MAX_THREADS
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.target import Target, check_runs_here, detect_host, host_target
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize

Model = str | os.PathLike[str] | ir.Model | onnx.ModelProto
_NEAR_BYTES = 1 << 20  # weights of a whole network that an L2 may hold from run to run
SPARSITY = ("enable", "force", "disable")


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        sparsity: "enable" (2:4 kernels compete where a weight is 2:4), "force" (weights are pruned
            by magnitude where they can be, and only 2:4 kernels are taken there: for measuring, not
            for accuracy) or "disable".
        int8: quantize the model first, calibrated on `data`.
        data: calibration batches, as `twofour quantize` takes them.
        shapes: input name -> static shape; dimensions left open become 1.
        threads: to tune for.
        timing_cache: a file that keeps measured times between builds.
        target: by default this machine.
        dump: a folder for the text of the graph after each pass.
    """

    sparsity: str = "enable"
    int8: bool = False
    data: DataLike | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    threads: int = 1
    timing_cache: str | os.PathLike[str] | None = None
    target: Target | None = None
    dump: Path | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked before any work.

        Raises:
            InputError: an unknown sparsity, INT8 without data or the reverse, or a thread count
                that the machine does not have.
        """
        if self.sparsity not in SPARSITY:
            raise InputError(
                f"unknown sparsity {self.sparsity!r}", [f"expected one of {', '.join(SPARSITY)}"]
            )
        if self.int8 and self.data is None:
            raise InputError(
                "INT8 needs calibration data",
                ["int8 was asked for without data"],
                "give calibration inputs: --int8 --data inputs.npz",
            )
        if self.data is not None and not self.int8:
            raise InputError(
                "data is of no use without int8",
                ["calibration data was given without int8"],
                "add int8=True, or drop data",
            )
        most = min(MAX_THREADS, detect_host().cores)
        if not 1 <= self.threads <= most:
            raise InputError(
                f"cannot build for {self.threads} threads",
                [f"expected 1 to {most} on this machine"],
            )


def build(model: Model, *, progress: Progress | None = None, **options: Any) -> Engine:
    """Compiles a model for this machine.

        engine = build("model.onnx", sparsity="enable", int8=True, data={"x": calibration_inputs})

    Args:
        model: an ONNX file, or a model in memory; not changed.
        progress: told about each layer.
        **options: the fields of `BuildOptions`, by name.

    Raises:
        InputError: the model, the data or an option is not usable.
        UnsupportedError: the model cannot be compiled.
    """
    known = {f.name for f in fields(BuildOptions)}
    if unknown := set(options) - known:
        raise InputError(
            f"build has no option {min(unknown)!r}",
            [f"expected some of {', '.join(sorted(known))}"],
        )
    return compile_model(model, BuildOptions(**options), progress)


def compile_model(model: Model, options: BuildOptions, progress: Progress | None = None) -> Engine:
    """`build`, with its options as one value."""
    target = options.target or host_target()
    check_runs_here(target)
    source, name, digest = _source(model)
    if options.int8 and options.data is not None:
        source = quantize(source, options.data, progress=progress)
    graph = import_graph(source, options.shapes)
    operators = len(graph.graph)
    if options.sparsity == "force":
        graph, _ = prune(graph)
    fused = run_passes(graph, options.dump)
    order = schedule(fused.model.graph)
    lowered = lower(fused.model.graph, order)
    cache_file = Path(options.timing_cache) if options.timing_cache is not None else None
    cache = TimingCache.load(cache_file)
    cold = weight_bytes(order) > _NEAR_BYTES
    emitter = Emitter(Tuner(target, cache, options.threads, cold=cold), options.sparsity)
    assembler = Assembler(fused, order, lowered, emitter, options.threads, progress)
    engine = assembler.assemble()
    cache.save(cache_file)
    steps = len(engine.plan.steps)
    counts = {"operators": operators, "fused": len(fused.model.graph), "steps": steps}
    plan = replace(engine.plan, source_name=name, source_sha256=digest, graph=counts)
    return with_times(replace(engine, plan=plan), assembler.placements)


def _source(model: Model) -> tuple[ir.Model, str, str]:
    """The model, its name for people, and the hash of its bytes."""
    if isinstance(model, (str, os.PathLike)):
        loaded = load_model(model)
        return loaded, Path(model).name, hashlib.sha256(Path(model).read_bytes()).hexdigest()
    if isinstance(model, onnx.ModelProto):
        model = ir.from_proto(model)
    return model, model.graph.name or "model", hashlib.sha256(model_bytes(model)).hexdigest()
