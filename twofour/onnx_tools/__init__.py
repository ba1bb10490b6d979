"""ONNX files in, ONNX files out: load and check, calibrate, quantize, inspect."""

from twofour.onnx_tools.inspect import Inspection, inspect, verify_pattern
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

__all__ = [
    "Inspection",
    "QuantizeOptions",
    "inspect",
    "load_model",
    "quantize",
    "save_model",
    "verify_pattern",
]
