"""Who takes part in a row, and which of them are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Plain = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A contestant before it is set up.

    Attributes:
        key: of its figures.
        kind: of its ONNX file.
        precision: the class it is compared in: "f32", "bf16" or "int8".
        peer: who runs it; "" for us.
        floats: the precision that the peer is told to compute floats in; "" for its own choice.
        alone: one thread, however many all others have.
    """

    key: str
    kind: str
    precision: str
    peer: str = ""
    floats: str = ""
    alone: bool = False


OURS = (
    Entry("dense_f32", "f32", "f32"),
    Entry("2_4_f32", "24-f32", "f32"),
    Entry("dense_bf16", "f32", "bf16"),
    Entry("2_4_bf16", "24-f32", "bf16"),
    Entry("dense_int8", "int8", "int8"),
    Entry("2_4_int8", "24-int8", "int8"),
    Entry("pair_int8", "pair-int8", "int8"),
    Entry("pair_bf16", "pair-f32", "bf16"),
)
# What several threads gain -> the engine, and the same built for one thread.
SCALING = {
    f"scaling_{entry.key}": (entry, replace(entry, key=f"{entry.key}_one_thread", alone=True))
    for entry in OURS
    if entry.precision == "int8"
}
PEERS = (
    Entry("onnxruntime_f32", "f32", "f32", "onnxruntime"),
    Entry("onnxruntime_int8_same_file", "24-int8", "int8", "onnxruntime"),
    Entry("onnxruntime_int8_uint8_file", "24-uint8", "int8", "onnxruntime"),
    Entry("onnxruntime_int8_dynamic", "dynamic", "int8", "onnxruntime"),
    Entry("openvino_f32", "f32", "f32", "openvino", "f32"),
    Entry("openvino_bf16", "f32", "bf16", "openvino"),
    Entry("openvino_int8_same_file", "24-int8", "int8", "openvino"),
    Entry("openvino_int8_uint8_file", "24-uint8", "int8", "openvino"),
)
# Ratio -> our contestant, and the class of the peers it is compared with.
RATIOS = {
    "ratio_2_4_int8_over_best_peer": ("2_4_int8", "int8"),
    "ratio_dense_int8_over_best_peer": ("dense_int8", "int8"),
    "ratio_pair_int8_over_best_peer": ("pair_int8", "int8"),
    "ratio_dense_f32_over_best_peer": ("dense_f32", "f32"),
    "ratio_2_4_f32_over_best_peer": ("2_4_f32", "f32"),
    "ratio_dense_bf16_over_best_peer": ("dense_bf16", "bf16"),
    "ratio_2_4_bf16_over_best_peer": ("2_4_bf16", "bf16"),
    "ratio_pair_bf16_over_best_peer": ("pair_bf16", "bf16"),
}
