"""Quantizes a model with made-up ranges: for measuring how fast its INT8 form is, not how good.

What kernels take does not depend on scales, so no data is needed to know it. Q/DQ stand where
`quantize` puts them. Two things follow from how large the ranges are, and both are as after
calibration: no two ranges are equal, so a value that is rounded twice stays so; and all are wide
enough for the tables of `core/gates.py`.
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.core.ranges import Range
from twofour.onnx_tools.insert import insert
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import place
from twofour.onnx_tools.prepare import prepare

_WIDTH, _STEP = 4.0, 1 / 1024


def placeholder_quantize(model: ir.Model, options: QuantizeOptions | None = None) -> ir.Model:
    """The INT8 form of a float model, its ranges made up.

    Args:
        model: float32; stays as it is.
        options: placement and exclusions count here.

    Returns:
        A new model with Q/DQ pairs and int8 weights. Its results are of no use.

    Raises:
        InputError: nothing to quantize, or already quantized.
        UnsupportedError: the opset cannot be converted.
    """
    options = options or QuantizeOptions()
    model = prepare(model)
    placement = place(model, options)
    widths = (_WIDTH * (1 + i * _STEP) for i in range(len(placement.calibrated)))
    spans = zip(placement.calibrated, widths, strict=False)
    ranges = {str(value.name): Range(-width, width) for value, width in spans}
    insert(model, placement, placement.schemes(ranges, options.ranges.activation))
    return model
