"""In which types an engine for a GPU holds values."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.native import QUANTIZED, kind_of, plain_kind

_NARROW = {"float32", "float64", "float16", "bfloat16"}


@dataclass(frozen=True)
class Types:
    """How values are held.

    Attributes:
        real: type of all real values: "float32", "float16" or "bfloat16".
        quantized: type of all quantized ones: "int8" or "float8e4m3fn".
    """

    real: str = "float32"
    quantized: str = "int8"

    def held(self, value: ir.Value) -> str:
        """The type that kernels read and write a value in."""
        if value.dtype in QUANTIZED:
            return self.quantized
        kind = kind_of(value)
        return self.real if kind in _NARROW else kind

    def plain(self, value: ir.Value) -> str:
        """The type that the host has it in."""
        return plain_kind(value)
