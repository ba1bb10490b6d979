"""The stretches no native kernel covers, as ONNX models for ONNX Runtime."""

from __future__ import annotations

import onnx
import onnx.utils

from twofour.compiler.lower import Section


def subgraph(model: onnx.ModelProto, section: Section) -> bytes:
    """A model of the section's nodes, from the plain values it reads to those it writes.

    Args:
        model: the fused model, with the types of all values.
        section: a fallback section of it.
    """
    extractor = onnx.utils.Extractor(model)
    part = extractor.extract_model(list(section.inputs), list(section.outputs))
    data: bytes = part.SerializeToString()
    return data
