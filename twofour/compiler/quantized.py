"""The model that a build starts from: quantized, where that was asked for and can be."""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler.importer import standardized
from twofour.compiler.options import BuildOptions
from twofour.core.errors import UnsupportedError
from twofour.core.progress import Report
from twofour.onnx_tools.eligible import NothingToQuantizeError
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import Quantized, quantize_with_report


def quantized(
    source: ir.Model, options: BuildOptions, kind: QuantizeOptions | None, progress: Report | None
) -> tuple[Quantized | None, tuple[str, ...]]:
    """The model with Q/DQ, calibrated on the data of the options; and notes.

    Args:
        source: the model as loaded; not changed.
        options: of the build.
        kind: how to quantize, or None for what suits the CPU of this machine.
        progress: told how far it is.

    Returns:
        What was made, and how it was calibrated; or None, and why the model stays as it is.

    Raises:
        InputError: the data does not fit.
    """
    data, cache = options.data, options.calibration_cache
    try:
        found = quantize_with_report(standardized(source), data, kind, progress, cache)
    except (NothingToQuantizeError, UnsupportedError) as error:
        why = "; ".join(error.reasons)
        return None, (f"not quantized, the data was not used: {error.what} ({why})",)
    return found, tuple(filter(None, [found.calibration]))
