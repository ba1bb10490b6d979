"""NonMaxSuppression behind a detector, as part of its ONNX file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

SELECTED = "selected"
"""The output that is added: int64 [rows, 3], image, class and place of each box that is left."""


def add_suppression(
    path: Path,
    outputs: Sequence[str],
    most: int = 100,
    overlap: float = 0.45,
    score: float = 0.25,
) -> None:
    """Adds the output `SELECTED` to a file whose outputs are boxes and scores.

    Args:
        path: of the file; replaced whole.
        outputs: names of the boxes, [B, places, 4] as centre x, centre y, width and height, and of
            the scores, [B, classes, places].
        most: boxes of an image and class at most.
        overlap: the largest allowed intersection over union of two boxes.
        score: boxes have a score above this.
    """
    model = ir.load(path)
    graph = model.graph
    named = {value.name: value for value in graph.outputs}
    limits: dict[str, NDArray[Any]] = {
        "most": np.array([most], np.int64),
        "overlap": np.array([overlap], np.float32),
        "score": np.array([score], np.float32),
    }
    constants = []
    for name, array in limits.items():
        value = ir.Value(name=f"{SELECTED}/{name}", const_value=ir.tensor(array))
        graph.register_initializer(value)
        constants.append(value)
    inputs = [*(named[name] for name in outputs), *constants]
    node = ir.node("NonMaxSuppression", inputs, {"center_point_box": 1}, name=SELECTED)
    (rows,) = node.outputs
    rows.name, rows.type = SELECTED, ir.TensorType(ir.DataType.INT64)
    rows.shape = ir.Shape([f"{SELECTED}_rows", 3])
    graph.append(node)
    graph.outputs.append(rows)
    temporary = path.with_name(path.name + ".part")
    try:
        ir.save(model, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
