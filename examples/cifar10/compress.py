"""The ONNX half: calibrate, write INT8, check that the weights are still 2:4, build engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cifar10.data import INPUT, Images
from cifar10.resume import once
from cifar10.settings import DENSE_LAYERS, Network, Settings
from twofour.cli.output import Output
from twofour.compiler.build import build
from twofour.core.errors import GateError
from twofour.core.target import host_target
from twofour.onnx_tools.inspect import verify_pattern
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

THREADS = 1
# Kind of file -> how it is quantized: ours, and as ONNX Runtime's integer kernels like it best.
QUANTIZATION = {
    "int8": QuantizeOptions(activation="int8"),
    "uint8": QuantizeOptions(activation="uint8", add_inputs="both"),
}


def quantize_stage(
    settings: Settings, network: Network, kind: str, images: Images, out: Output
) -> None:
    """Calibrates on training images and writes `int8.onnx` or `uint8.onnx`.

    Raises:
        GateError: a weight lost its pattern on the way.
    """
    source, path = network.onnx("f32"), network.onnx(kind)
    options = replace(QUANTIZATION[kind], samples=settings.calibration)

    with out.stage(f"{network.name}: quantize {kind}") as report:

        def make() -> None:
            data = {INPUT: images.calibration(settings.calibration)}
            save_model(quantize(load_model(source), data, options, report), path)

        once(path, [source], f"{options}, short {settings.short}", make)
    if network.sparse:
        require_pattern(network, path)


def require_pattern(network: Network, path: Path) -> None:
    """Reads the weights back from the file.

    Raises:
        GateError: one of a layer that was pruned does not have the pattern.
    """
    lost = verify_pattern(load_model(path), network.name, DENSE_LAYERS)
    if lost:
        raise GateError(f"{path} is not {network.name}", lost, "delete it and start again")


def build_stage(network: Network, kind: str, out: Output) -> None:
    """Builds `f32.engine` or `int8.engine` for this machine, batch 1, one thread."""
    source, path = network.onnx(kind), network.engine(kind)
    with out.stage(f"{network.name}: build {kind} engine") as report:

        def make() -> None:
            build(source, progress=report, threads=THREADS).save(path)

        once(path, [source], f"threads {THREADS}, {host_target().to_json()}", make)
