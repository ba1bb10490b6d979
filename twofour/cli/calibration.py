"""The options of `quantize` and `build` about what calibration saw, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from twofour.cli.options import require_writable

Data = Annotated[
    str | None,
    typer.Option(help="Samples to calibrate with: .npz, folder of .npy, module:function."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration-cache",
        help="File that keeps what calibration saw: made, gone on with, or used without --data. "
        "Or a calibration table of TensorRT to take the scales from.",
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option("--tensorrt-table", help="Write the scales as TensorRT's calibration table, too."),
]


def require_data(data: str | None, cache: Path | None, fix: str) -> None:
    """Refuses a calibration of nothing.

    Raises:
        InputError: there are neither samples nor a cache that exists.
    """
    from twofour.core.errors import InputError

    if data is None and (cache is None or not cache.exists()):
        absent = [] if cache is None else [f"there is no calibration cache {cache} yet"]
        raise InputError(
            "there is no data to calibrate with",
            ["expected --data with some hundred samples, got none", *absent],
            fix,
        )


def require_table(path: Path | None, activation: str) -> None:
    """Finds before the work that a table could not be written, or could not hold the scales."""
    from twofour.core.errors import InputError

    if path is None:
        return
    require_writable(path)
    if activation != "int8":
        raise InputError(
            "no calibration table can hold the scales of uint8 activations",
            [f"--tensorrt-table needs activation int8, got {activation}"],
            "add --activation int8, or leave the table out",
        )


def write_table(path: Path | None, model: Any, method: str) -> None:
    """Writes TensorRT's table of a quantized model in memory, where one is asked for."""
    from twofour.onnx_tools import tensorrt_table

    if path is not None:
        kind = "MinMaxCalibration" if method == "minmax" else "EntropyCalibration2"
        tensorrt_table.write_table(path, tensorrt_table.scales_of(model), kind)
