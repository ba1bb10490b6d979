"""twofour build: an ONNX file to an engine for this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twofour.cli.calibration import CalibrationFile, Data, require_data
from twofour.cli.options import Ranges, Threads, parse_profiles, parse_size, require_writable
from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from twofour.core.target import Target
    from twofour.engine import Engine, Plan


class Sparsity(StrEnum):
    """What to do with weights that have a pattern."""

    enable = "enable"
    force = "force"
    disable = "disable"


class Isa(StrEnum):
    """Instruction sets by name, those of `core.target.ISAS`."""

    dotprod = "dotprod"
    avx512vnni = "avx512vnni"
    avx2 = "avx2"
    vector = "vector"


def build(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .engine file to write.")],
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantize first; a quantized model is taken as it is."),
    ] = False,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Let float layers compute in bfloat16 where that is faster."),
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Compute in float16; with --target cuda or tensorrt.")
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="As --int8, in float8 (e4m3); with --target cuda from sm89 on."),
    ] = False,
    data: Data = None,
    calibration_cache: CalibrationFile = None,
    sparsity: Annotated[
        Sparsity,
        typer.Option(
            help="enable: sparse kernels compete where a weight has a pattern; "
            "force: prune weights that have none first; disable: dense only."
        ),
    ] = Sparsity.enable,
    shapes: Ranges = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File with measured times, read and extended.")
    ] = None,
    tuning_effort: Annotated[
        int, typer.Option(min=0, max=3, help="0: time nothing; 3: time more, and longer.")
    ] = 2,
    workspace: Annotated[
        str | None, typer.Option(help="Most memory a kernel may take of its own: 65536, 64k, 1M.")
    ] = None,
    threads: Threads = None,
    isa: Annotated[Isa | None, typer.Option(help="Force an instruction set.")] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="TARGET",
            help="cpu: this machine; cpu:NAME: another, by a cost model; cuda: this GPU; "
            "cuda:sm90: one of that compute capability, untimed if it is not here; tensorrt: this "
            "GPU, by TensorRT; tensorrt:sm89: another; tensorrt:ampere+: any from 8.0 on.",
        ),
    ] = "cpu",
    no_race: Annotated[
        bool,
        typer.Option(
            "--no-race",
            help="Keep kernels even where ONNX Runtime runs the whole model faster.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile an ONNX file into an engine, timed here.

    Example: twofour build resnet20.onnx -o resnet20.engine --int8 --data samples.npz
    Example: twofour build resnet20_int8.onnx -o gpu.engine --target cuda --fp16
    Example: twofour build resnet20_int8.onnx -o gpu.engine --target tensorrt --fp16
    Example: twofour build resnet20.onnx -o arm.engine --target cpu:neoverse-n1
    """
    from twofour.compiler.build import build as compile_model

    out = Output(as_json, quiet)
    require_writable(output)
    _require_int8(int8, fp8, data, calibration_cache)
    chosen = _target(target, isa)
    with out.stage("building") as report:
        engine = compile_model(
            model,
            progress=report,
            int8=int8,
            bf16=bf16,
            fp16=fp16,
            fp8=fp8,
            data=data,
            calibration_cache=calibration_cache,
            sparsity=sparsity.value,
            profiles=parse_profiles(shapes),
            threads=threads or 1,
            timing_cache=timing_cache,
            tuning_effort=tuning_effort,
            workspace_bytes=parse_size(workspace),
            target=chosen,
            race=not no_race,
        )
    engine.save(output)
    out.show(_summary(engine, output))
    out.data("build/1", _document(engine, output))


def _require_int8(int8: bool, fp8: bool, data: str | None, cache: Path | None) -> None:
    from twofour.core.errors import InputError

    if int8:
        fix = "give --data samples.npz, or a model that has Q/DQ already and no --int8"
        require_data(data, cache, fix)
    elif not fp8 and (data is not None or cache is not None):
        option = "--data" if data is not None else "--calibration-cache"
        raise InputError(
            f"{option} is of no use without --int8", fix=f"add --int8, or drop {option}"
        )


def _target(text: str, isa: Isa | None) -> Target:
    """What to build for; --isa is for this machine, where all is timed."""
    from twofour.core.errors import InputError
    from twofour.core.target import host_target, parse_target

    if isa is None:
        return parse_target(text)
    if text != "cpu":
        raise InputError(
            "--isa and --target contradict each other",
            [f"got --isa {isa.value}, to be timed on this machine, and --target {text}"],
            f"give one of them; for another machine --target cpu:{isa.value}",
        )
    return host_target(isa.value)


def profile_texts(plan: Plan) -> list[str]:
    """The shapes of each profile; nothing for one of fixed shapes."""
    from twofour.runtime.shapes import shape_text

    if len(plan.profiles) == 1 and not plan.profiles[0].symbols:
        return []
    return [
        ", ".join(f"{info.name} {shape_text(info, profile)}" for info in profile.inputs)
        for profile in plan.profiles
    ]


def _summary(engine: Engine, output: Path) -> str:
    document = _document(engine, output)
    estimated = f"  nothing was timed: the cost model for {engine.plan.target.model} chose"
    lines = [
        f"{output}: {output.stat().st_size / 1e3:.0f} kB for {document['target']}, "
        f"{_by(engine.plan)}",
        *([estimated] if engine.plan.target.cpu else []),
        f"  {document['layers']} layers: {document['sparse']} sparse, {document['dense']} dense, "
        f"{_rest(document)} others",
        *(f"  runs {text}" for text in profile_texts(engine.plan)),
        *(f"  note: {text}" for text in engine.plan.notes),
        f"  read why: twofour explain {output}",
    ]
    return "\n".join(lines)


def _by(plan: Plan) -> str:
    """What runs it."""
    target = plan.target
    if target.tensorrt is not None:
        return f"by {target.tensorrt.title}"
    return f"threads {plan.threads}" if target.cuda is None else f"on {target.model or target}"


def _rest(document: dict[str, str | int | list[str]]) -> str:
    """The layers that are neither sparse nor dense, as far as there are such."""
    later = f"{document['later']} chosen when loaded, " if document["later"] else ""
    return f"{later}{document['fallback']} on ONNX Runtime, {document['other']}"


def _document(engine: Engine, output: Path) -> dict[str, str | int | list[str]]:
    from twofour.compiler.explain import DENSE, FALLBACK, LATER, SPARSE, kind_of, layers_of

    layers = layers_of(engine.plan, 1)
    kinds = [kind_of(layer) for layer in layers]
    counts = {kind: kinds.count(kind) for kind in (SPARSE, DENSE, LATER, FALLBACK)}
    return {
        "engine": str(output),
        "size_bytes": output.stat().st_size,
        "target": str(engine.plan.target),
        "threads": engine.plan.threads,
        "profiles": len(engine.plan.profiles),
        "layers": len(layers),
        "sparse": counts[SPARSE],
        "dense": counts[DENSE],
        "later": counts[LATER],
        "fallback": counts[FALLBACK],
        "other": len(layers) - sum(counts.values()),
        "notes": list(engine.plan.notes),
    }
