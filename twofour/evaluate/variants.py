"""The engine, rebuilt with some layers switched back.

An engine holds no source, so it is built again from its file: checked by the hash in the plan, and
by the outputs of what the rebuilding gives. Each variant is a real engine, its kernels timed with
one shared timing cache: a ResNet-18 takes about two seconds, less than running 50 images on ONNX
Runtime as written, and nothing has to be assumed about how another runtime would round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twofour.compiler.build import BuildOptions, compile_model
from twofour.compiler.explain import layers_of
from twofour.compiler.requests import Requested, Shape, ShapeRange
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.plan import Plan, Profile
from twofour.core.progress import Report
from twofour.engine import Engine
from twofour.onnx_tools.inspect import patterns_of
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.onnx_tools.revert import Switch, Switches, find_switches, is_quantized, switched

_EFFORT = 1  # enough to know what a layer costs; what it computes does not depend on it


@dataclass(frozen=True)
class Origin:
    """Where an engine came from.

    Attributes:
        model: the float model that says what is right.
        source: the file the engine was built from.
        dense: a model with dense weights; None if the float model has them.
        calibration: samples that the engine was quantized with while it was built; None if its
            source is quantized, or it is not.
    """

    model: Path
    source: Path
    dense: Path | None = None
    calibration: DataLike | None = None


class Workshop:
    """Builds an engine again, with layers switched back.

    Args:
        plan: of the engine.
        origin: its files.
        folder: for the timing cache.
        report: told about a calibration.

    Attributes:
        source: the model that the engine was compiled from, quantized and pruned.
        switches: what can be switched back.

    Raises:
        InputError: the source is not what the engine was built from, or it was quantized while it
            was built and there is no calibration data.
    """

    def __init__(self, plan: Plan, origin: Origin, folder: Path, report: Report) -> None:
        """Reads the files; builds nothing yet."""
        _require_source(plan, origin)
        source = load_model(origin.source)
        if _quantized_at_build(plan) and not is_quantized(source):
            if origin.calibration is None:
                raise _no_calibration(origin)
            source = quantize(source, origin.calibration, progress=report)
        if _has_patterns(plan) and not patterns_of(source):
            source = prune(source, keep=("4:8",))[0]  # as --sparsity force did
        others = [load_model(path) for path in (origin.model, origin.dense) if path is not None]
        self.source = source
        self.switches: Switches = find_switches(source, others)
        self._options = BuildOptions(
            bf16=any(layer.precision == "bfloat16" for layer in plan.layers),
            profiles=[_requested(profile) for profile in plan.profiles],
            threads=plan.threads,
            timing_cache=folder / "timing.json",
            tuning_effort=_EFFORT,
            target=plan.target,
            race=False,
        )

    def engine(self, switches: Sequence[Switch] = ()) -> Engine:
        """The engine with these layers in their other form."""
        return compile_model(switched(self.source, switches), self._options)


def time_us(plan: Plan) -> float:
    """Of all layers of the first profile, as timed at build."""
    return sum(layer.time_us or 0.0 for layer in layers_of(plan, 1))


def _require_source(plan: Plan, origin: Origin) -> None:
    if not origin.source.is_file():
        raise InputError(
            f"no model at {origin.source}", ["there is no such file"], "check --source"
        )
    got = hashlib.sha256(origin.source.read_bytes()).hexdigest()
    if got != plan.source_sha256:
        raise InputError(
            f"{origin.source} is not what the engine was built from",
            [
                f"expected {plan.source_name or 'a file'} with sha256 {plan.source_sha256}",
                f"got {got}",
            ],
            "name the file that `twofour build` was given: --source FILE",
        )


def _no_calibration(origin: Origin) -> InputError:
    return InputError(
        "the engine was quantized while it was built",
        [f"{origin.source} is a float model: the ranges are found again from the same samples"],
        "give the --data of that build as --calibration; or write the quantized file with "
        "`twofour quantize`, build from it, and name it as --source",
    )


def _quantized_at_build(plan: Plan) -> bool:
    return any(layer.precision == "int8" for layer in plan.layers)


def _has_patterns(plan: Plan) -> bool:
    return any(layer.pattern not in ("", "dense") for layer in plan.layers)


def _requested(profile: Profile) -> Requested:
    """What `build` was asked for."""
    symbols = profile.symbols
    least, usual, most = (
        tuple(symbol.least for symbol in symbols),
        tuple(symbol.usual for symbol in symbols),
        tuple(symbol.most for symbol in symbols),
    )
    shapes: dict[str, Shape | ShapeRange] = {}
    for info in profile.inputs:
        corners = info.shape_at(least), info.shape_at(usual), info.shape_at(most)
        shapes[info.name] = corners if info.sizes else info.shape
    return shapes
