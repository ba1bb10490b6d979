"""twofour doctor: what this machine can run, and what is missing for more."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from twofour.cli.output import Json, Output, Quiet

if TYPE_CHECKING:
    from twofour.bench.probe import Probe

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
    "scikit-learn": ("the demo's scans", "demo"),
    "openvino": ("bench --vs openvino", "bench"),
}


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time dense and sparse convolutions too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what this machine can run, what is missing for more, and what sparsity pays.

    Example: twofour doctor --measure
    """
    from twofour.core.target import ISAS, Target, detect_host, host_target, missing_features
    from twofour.core.version import __version__

    out = Output(as_json, quiet)
    host, target = detect_host(), host_target()
    lacking = {isa: missing_features(Target(isa, host.arch, host.model)) for isa in ISAS}
    versions = {name: _version(name) for name in _PACKAGES}
    out.show(
        f"twofour {__version__} on {host.model} ({host.arch}), {host.cores} cores usable",
        f"engines are built for {target}",
        *(f"  {isa} cannot run here: lacks {', '.join(m)}" for isa, m in lacking.items() if m),
        _packages(versions),
        *_missing(versions),
    )
    probes = _probes(out) if measure else []
    peaks = _peaks() if measure else {}
    out.show(*_gains(probes), *_rates(peaks))
    out.data(
        "doctor/1",
        {
            "version": __version__,
            "cpu": host.model,
            "arch": host.arch,
            "cores": host.cores,
            "features": sorted(host.features),
            "isa": target.isa,
            "missing_features": {isa: list(missing) for isa, missing in lacking.items()},
            "packages": versions,
            "probes": [dataclasses.asdict(each) for each in probes],
            "peak_gmacs": peaks,
        },
    )


def _version(package: str) -> str | None:
    """The installed version without importing the package; None if it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(versions: dict[str, Any]) -> Table:
    table = Table()
    for header in ("package", "version", "for"):
        table.add_column(header)
    for name, found in versions.items():
        table.add_row(name, found or "not installed", _PACKAGES[name][0])
    return table


def _probes(out: Output) -> list[Probe]:
    from twofour.bench.probe import probe

    with out.stage("measuring") as report:
        return probe(report)


def _gains(probes: list[Probe]) -> list[str]:
    """One line for each precision and pattern."""
    lines = [
        f"  {each.precision}: dense {each.dense_us:.0f} us ({each.dense_gops:.0f} GOPS), "
        f"{each.pattern} {each.sparse_us:.0f} us: {each.gain:.2f} times as fast"
        for each in probes
    ]
    return ["a 3x3 convolution, 128 to 128 channels on 28x28, one thread", *lines] if lines else []


def _peaks() -> dict[str, float]:
    from twofour.compiler.peak import measure_peaks

    return measure_peaks().gmacs


def _rates(peaks: dict[str, float]) -> list[str]:
    """What a core can do at most: the loops of the kernels without loads of weights or stores."""
    if not peaks:
        return []
    words = "at most, thousand million multiply-adds a second of one core, counted as if dense"
    return [words, *(f"  {name}: {rate:.0f}" for name, rate in peaks.items())]


def _missing(versions: dict[str, Any]) -> list[str]:
    """How to get each missing package."""
    lines = []
    for name, found in versions.items():
        purpose, extra = _PACKAGES[name]
        if found is None:
            what = f"twofour[{extra}]" if extra else name
            lines.append(f"for {purpose}: pip install '{what}'")
    return lines or ["nothing is missing"]
