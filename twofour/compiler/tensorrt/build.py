"""model -> engine of TensorRT: quantize or calibrate, rewrite, build, read what was built.

The steps stand in `tensorrt_engine`, in order.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from twofour.compiler.importer import standardized
from twofour.compiler.options import BuildOptions
from twofour.compiler.quantized import quantized
from twofour.compiler.requests import Requested, became_one, read_request
from twofour.compiler.tensorrt.builder import Built, Order, build_network, without_deprecations
from twofour.compiler.tensorrt.ends import Ends, ends_of, fix_inputs
from twofour.compiler.tensorrt.half import halved
from twofour.compiler.tensorrt.plan_layers import plan_layers, warnings_of
from twofour.compiler.tensorrt.rewrite import for_tensorrt, is_quantized, plugins_in
from twofour.compiler.tensorrt.rules import Rules, rules_of
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.gpus import gpu_name
from twofour.core.plan import PluginCall
from twofour.core.plugins import Operator, package_of
from twofour.core.progress import Report
from twofour.core.target import TENSORRT, Target
from twofour.core.tensorrt import AMPERE_PLUS, TensorRT, fits_gpu
from twofour.core.version import __version__
from twofour.core.writing import write_whole
from twofour.engine import Engine, Plan, Profile, Step
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.tensorrt_table import HEADER, is_table, scales_of, write_table
from twofour.runtime.cuda.memory import gpu_here
from twofour.runtime.tensorrt_library import Library, find_library, register

NETWORK = "tensorrt"
"""The name of the network among an engine's objects."""
_LEVELS = (0, 2, 3, 5)
"""Of TensorRT's optimization, for each tuning effort."""


def tensorrt_engine(
    source: ir.Model,
    target: Target,
    options: BuildOptions,
    asked: Sequence[Requested],
    progress: Report | None,
) -> Engine:
    """Builds a model with the TensorRT that is installed.

    Args:
        source: the model as loaded; not changed.
        target: TensorRT's; which library and which GPU.
        options: how to build.
        asked: the shapes of each profile.
        progress: told how far it is.

    Returns:
        The engine, without the name and hash of its source.

    Raises:
        InputError: the data or a shape does not fit.
        UnsupportedError: TensorRT is not installed, cannot take the model, or cannot build for that
            GPU.
    """
    assert target.tensorrt is not None
    library = find_library(target.tensorrt)
    rules = rules_of(library.name, library.version)
    gpu, gpu_model = _gpu(library, rules, target.tensorrt)
    model, scales, notes = _calibrated(source, rules, options, progress)
    if options.sparsity == "force":
        model = prune(model, keep=("4:8",))[0]
    model, changes = for_tensorrt(model)
    ends = [ends_of(model, read_request(model.graph, profile)) for profile in asked]
    notes += (*changes, *filter(None, [became_one(source.graph, asked[0])]))
    taken = model
    half = _half(options)
    if half and rules.strongly_typed:
        taken, cut = halved(model, half, options.stay_float32)
        notes += cut
    corners = fix_inputs(taken, ends)
    cache = _cache_file(options.timing_cache, library, gpu)
    order = Order(
        model_bytes(taken),
        corners,
        _flags(rules, options, quantized=is_quantized(model) or scales is not None),
        gpu,
        options.workspace_bytes,
        _LEVELS[options.tuning_effort],
        _read(cache) if rules.times_kernels else None,
        scales,
    )
    operators = plugins_in(model)
    register(library, operators)
    with without_deprecations():
        built = build_network(library, rules, order, progress)
    if cache is not None and built.timing_cache is not None:
        _write(cache, built.timing_cache)
    if cache is not None and not rules.times_kernels:
        notes += (f"{library.title} times nothing at build: the timing cache is of no use",)
    found = TensorRT(gpu, library.name, library.version)
    made_for = Target(TENSORRT, platform.machine(), gpu_model, tensorrt=found)
    engine = _engine(model, made_for, ends, built, options.sparsity != "disable", notes)
    return replace(engine, plan=replace(engine.plan, plugins=tuple(map(_call, operators))))


def _call(operator: Operator) -> PluginCall:
    """What the engine asks of an installed package: to register its plugin of TensorRT."""
    package = package_of(operator)
    return PluginCall(NETWORK, operator.domain, operator.name, operator.version, package, "{}", ())


def _engine(
    model: ir.Model,
    target: Target,
    ends: Sequence[Ends],
    built: Built,
    is_sparse_allowed: bool,
    notes: tuple[str, ...],
) -> Engine:
    """The parts as an engine; its profiles have the same layers."""
    layers = plan_layers(model, built.report, built.sparsity, is_sparse_allowed)
    indices = tuple(range(len(layers)))
    profiles = []
    for each in ends:
        names = [tuple(info.name for info in infos) for infos in (each.inputs, each.outputs)]
        step = Step(TENSORRT, NETWORK, names[0], names[1], indices)
        profiles.append(
            Profile(each.inputs, each.outputs, (), (step,), 8 * len(each.symbols), (), each.symbols)
        )
    plan = Plan(
        target=target,
        version=__version__,
        source_sha256="",
        profiles=tuple(profiles),
        layers=layers,
        threads=1,
        code=(NETWORK,),
        graph={"operators": len(model.graph), "fused": len(layers), "steps": 1},
        notes=(*notes, *built.notes, *warnings_of(model, layers)),
    )
    content = np.frombuffer(built.content, np.uint8)
    return Engine(plan, np.zeros(0, np.uint8), {NETWORK: content}, {})


def _gpu(library: Library, rules: Rules, wanted: TensorRT) -> tuple[str, str]:
    """The GPU to build for, and its name where it is here.

    Raises:
        UnsupportedError: this TensorRT builds on that GPU alone, and it is not here.
    """
    here = gpu_here()
    if rules.chooses_gpu:
        gpu = wanted.gpu or AMPERE_PLUS
        return gpu, here[0] if here is not None and fits_gpu(gpu, here[1]) else ""
    if here is None:
        raise UnsupportedError(
            f"{library.title} cannot build here",
            ["it builds on the GPU that the engine is for, and there is none that can be used"],
            "build where the GPU is, or with TensorRT for RTX, which needs none: "
            "pip install tensorrt-rtx-cu13 and --target tensorrt-rtx",
        )
    model, capability = here
    if not fits_gpu(wanted.gpu, capability):
        raise UnsupportedError(
            f"{library.title} cannot build for {wanted.gpu} here",
            [f"it builds on the GPU itself; this is {gpu_name(capability)}, {model}"],
            f"build on such a GPU, or for this one and all from 8.0 on: --target {TENSORRT}:"
            f"{AMPERE_PLUS}",
        )
    return wanted.gpu or gpu_name(capability), model


def _calibrated(
    source: ir.Model, rules: Rules, options: BuildOptions, progress: Report | None
) -> tuple[ir.Model, bytes | None, tuple[str, ...]]:
    """The model with Q/DQ; or the float model and a table of scales, where the version has both.

    Returns:
        The model, the table or None, and notes.
    """
    if not options.int8:
        return standardized(source), None, ()
    found, notes = quantized(source, options, QuantizeOptions(activation="int8"), progress)
    if found is None:
        return source, None, notes
    if not rules.calibrates:
        return found.model, None, notes
    cache = options.calibration_cache
    if cache is not None and is_table(cache):
        return found.floats, Path(cache).read_bytes(), notes
    return found.floats, _table(found.model, rules), notes


def _table(model: ir.Model, rules: Rules) -> bytes:
    """The scales of a quantized model as TensorRT's own calibration would have left them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        write_table(path, scales_of(model))
        _, _, scales = path.read_bytes().partition(b"\n")
    first = HEADER.replace("8601", str(rules.number)).format("EntropyCalibration2")
    return f"{first}\n".encode() + scales


def _flags(rules: Rules, options: BuildOptions, quantized: bool) -> tuple[str, ...]:
    """The builder's flags.

    Raises:
        UnsupportedError: this version has none for the type that was asked for.
    """
    half = _half(options)
    flags = ["SPARSE_WEIGHTS"] if options.sparsity != "disable" else []
    if rules.strongly_typed:
        return tuple(flags)
    if half and half not in rules.half_flags:
        raise UnsupportedError(
            f"TensorRT {rules.version} has no {half}",
            [f"it computes in {', '.join(rules.half_flags)}"],
            "build with --fp16, or with TensorRT 9 or newer",
        )
    flags += [rules.half_flags[half]] if half else []
    return (*flags, *(["INT8"] if quantized else []))


def _half(options: BuildOptions) -> str:
    """The type of 16 bits that was asked for; "" for none."""
    return "float16" if options.fp16 else "bfloat16" if options.bf16 else ""


def _cache_file(given: str | os.PathLike[str] | None, library: Library, gpu: str) -> Path | None:
    """The timing cache of this version and GPU: TensorRT takes no other's."""
    if given is None:
        return None
    path = Path(given)
    return path.with_name(f"{path.name}.{library.name}-{library.version}-{gpu}")


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(
            f"cannot read the timing cache {path}", [str(error)], "name a file"
        ) from error


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(
            f"cannot write the timing cache {path}",
            [str(error)],
            "name a file in a writable folder",
        ) from error
