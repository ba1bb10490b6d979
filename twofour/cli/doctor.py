"""twofour doctor: what this machine can run, how fast, and what is missing for more."""

from __future__ import annotations

import dataclasses
import platform
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.doctor_report import (
    cuda_lines,
    feature_table,
    gain_lines,
    gpu_lines,
    machine_lines,
    noise_lines,
    package_table,
    plugin_lines,
    speed_table,
    tensorrt_lines,
)
from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from twofour.bench.probe import Probe
    from twofour.bench.speed import Speed
    from twofour.core.machine import Machine

# Package -> what it is for, and the extra that brings it; "" for the core.
_PACKAGES = {
    "numpy": ("everything", ""),
    "llvmlite": ("kernels", ""),
    "safetensors": ("engine files", ""),
    "onnx": ("ONNX files", ""),
    "onnx-ir": ("the compiler", ""),
    "onnxscript": ("the compiler", ""),
    "onnxruntime": ("operators without a kernel, calibration", ""),
    "torch": ("pruning and fine-tuning", "train"),
    "openvino": ("bench --vs openvino", "bench"),
    "tokenizers": ("bench --suite", "bench"),
    "cuda-bindings": ("engines for GPUs", "cuda"),
    "scikit-learn": ("the demo's scans", "demo"),
}


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time dense and sparse convolutions too: a minute.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what this machine can run, how fast, what it lacks.

    Example: twofour doctor
    Example: twofour doctor --measure
    """
    from twofour.bench.noise import others_now, reasons
    from twofour.core.features import features_of
    from twofour.core.gpus import read_gpus
    from twofour.core.machine import read_machine
    from twofour.core.target import detect_host, host_target
    from twofour.core.version import __version__

    out = Output(as_json, quiet)
    host, target, machine = detect_host(), host_target(), read_machine()
    features = features_of(host.arch)
    out.show(
        f"twofour {__version__}, Python {platform.python_version()}, {host.model} ({host.arch})",
        *machine_lines(machine, host.cores),
        f"engines are built for {target}",
        *([feature_table(features, host.features)] if features else []),
    )
    noise = [*reasons(machine, host.cores), *others_now(machine)]
    speed = _speed(machine, out)
    out.show(*speed_table(speed), *noise_lines(noise))
    gpus, packages = read_gpus(), {name: _package(name) for name in _PACKAGES}
    cuda, tensorrt, plugins = _cuda(), _tensorrt(), _plugins()
    out.show(*gpu_lines(gpus), *cuda_lines(cuda), *tensorrt_lines(tensorrt))
    out.show(package_table(packages))
    out.show(*plugin_lines(plugins))
    probes = _probes(out) if measure else []
    out.show(*gain_lines(probes))
    found = {
        "machine": dataclasses.asdict(machine),
        "noise": noise,
        "speed": dataclasses.asdict(speed),
        "gpus": [dataclasses.asdict(each) for each in gpus],
        "cuda": cuda,
        "tensorrt": tensorrt,
        "packages": packages,
        "plugins": plugins,
        "probes": [dataclasses.asdict(each) for each in probes],
    }
    out.data("doctor/1", {**_identity(), **found})


def _tensorrt() -> dict[str, Any]:
    """Which TensorRT is here, whether it is loaded, and what is missing to build and to run."""
    from twofour.core.tensorrt import TITLES, TensorRT, installed, lacks

    found = []
    for each in installed():
        missing = lacks(TensorRT(library=each.library, version=each.version))
        title = f"{TITLES[each.library]} {each.version}".rstrip()
        found.append({"library": each.library, "title": title, "missing_to_run": list(missing)})
    return {"found": found, "install": "" if found else "pip install tensorrt"}


def _cuda() -> dict[str, Any]:
    """What there is of CUDA, and what is missing to run engines and to build them as well."""
    from twofour.core.cuda import PARTS, Cuda, installed, lacks
    from twofour.core.gpus import gpu_name, read_capabilities

    parts = {}
    for name, (purpose, install) in PARTS.items():
        version = installed(name) or None
        parts[name] = {"version": version, "for": purpose, "install": "" if version else install}
    gpus = [gpu_name(each) for each in read_capabilities()]
    return {"gpus": gpus, "parts": parts, "missing_to_run": list(lacks(Cuda()))}


def _identity() -> dict[str, Any]:
    """This version, and what CPU and target it runs on."""
    from twofour.core.features import features_of
    from twofour.core.target import detect_host, host_target
    from twofour.core.version import __version__

    host, target = detect_host(), host_target()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "cpu": host.model,
        "arch": host.arch,
        "cores": host.cores,
        "isa": target.isa,
        "target": str(target),
        "features": sorted(host.features),
        "kernels": [
            {"feature": each.name, "here": each.here(host.features), "gives": each.gives}
            for each in features_of(host.arch)
        ],
        "missing_features": _missing_features(),
    }


def _missing_features() -> dict[str, list[str]]:
    """What this CPU lacks for each instruction set."""
    from twofour.core.target import ISAS, Target, detect_host, missing_features

    host = detect_host()
    return {isa: list(missing_features(Target(isa, host.arch, host.model))) for isa in ISAS}


def _plugins() -> dict[str, Any]:
    """The operators of plugins, what each has tactics for, and what could not be used."""
    from twofour.core.plugins import installed, package_of

    there = installed()
    operators = [
        {
            "operator": str(operator),
            "version": operator.version,
            "package": package_of(operator),
            "meaning": "function" if operator.is_function else "numpy",
            "tactics": [f"{t} {x.name}" for t, found in operator.tactics.items() for x in found],
        }
        for operator in there.operators.values()
    ]
    return {"operators": operators, "problems": list(there.problems)}


def _version(package: str) -> str | None:
    """The installed version without importing the package; None if it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str) -> dict[str, Any]:
    """Its version or null, what it is for, and how to get it if it is missing."""
    version, (purpose, extra) = _version(name), _PACKAGES[name]
    wanted = f"pip install 'twofour[{extra}]'" if extra else f"pip install {name}"
    return {"version": version, "for": purpose, "install": "" if version else wanted}


def _speed(machine: Machine, out: Output) -> Speed:
    from twofour.bench.speed import measure_speed

    with out.stage("measuring") as report:
        return measure_speed(machine, report)


def _probes(out: Output) -> list[Probe]:
    from twofour.bench.probe import probe

    with out.stage("measuring convolutions") as report:
        return probe(report)
