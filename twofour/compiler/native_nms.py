"""NonMaxSuppression: how many rows it gives is found while running, how many at most is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler.layout import Tensor
from twofour.compiler.native import NativeOp, NotNative, name_of, scalar_input
from twofour.compiler.native_nd import (
    BROADCAST,
    Look,
    NdOp,
    NdValue,
    Part,
    require_kinds,
    value_of,
)
from twofour.core.suppression import Suppression
from twofour.engine import TensorInfo
from twofour.kernels.cpu.nms import NmsProblem

_MOST_BYTES = 1 << 28
_ROW_BYTES = 24
NOTHING = Suppression(0)

Steps = tuple[int, int, int]


@dataclass(frozen=True)
class NmsOp(NdOp):
    """Suppression of overlapping boxes; `y` is [rows, 3], `also` the number of rows and scratch.

    Attributes:
        how: thresholds.
        sizes: images, classes and places in words: a kernel is for these alone.
    """

    how: Suppression = NOTHING
    sizes: str = ""

    def problem(self, boxes: Steps = (0, 0, 0), scores: Steps = (0, 0, 0)) -> NmsProblem:
        """The kernel's view, where the steps along the axes of the operands are these bytes."""
        images, classes, places = self.values[1].shape
        return NmsProblem(images, classes, places, boxes, scores, self.how)

    @property
    def most(self) -> tuple[int, ...]:
        """The largest shape of the result."""
        return self.values[2].shape

    def scratch(self, name: str) -> Tensor:
        """Memory that it needs while it runs."""
        words = -(-self.problem().scratch_bytes // 4)
        return Tensor(name, 1, 1, 1, words, "float32")

    @property
    def count(self) -> str:
        """The value that says how many rows there are."""
        return self.also[0]


def counted(ops: Iterable[NativeOp]) -> dict[str, TensorInfo]:
    """The values whose rows these operators count, and their counts, by name."""
    found: dict[str, TensorInfo] = {}
    for op in ops:
        if isinstance(op, NmsOp):
            found[op.y] = TensorInfo(op.y, "int64", (), (), False, op.most, op.count)
            found[op.count] = TensorInfo(op.count, "int64", (1,))
    return found


def read_nms(node: ir.Node) -> NmsOp:
    """The operator; its limits are constants, and its operands have known shapes."""
    boxes, scores = value_of(node.inputs[0]), value_of(node.inputs[1])
    require_kinds([boxes, scores], ["float32"])
    if len(boxes.shape) != 3 or boxes.shape[2] != 4 or len(scores.shape) != 3:
        raise NotNative(f"boxes {list(boxes.shape)} and scores {list(scores.shape)}")
    if boxes.shape[0] != scores.shape[0] or boxes.shape[1] != scores.shape[2]:
        raise NotNative(f"boxes {list(boxes.shape)} do not match scores {list(scores.shape)}")
    score = scalar_input(node, 4)
    how = Suppression(
        int(scalar_input(node, 2) or 0),
        float(np.float32(scalar_input(node, 3) or 0.0)),
        None if score is None else float(np.float32(score)),
        bool(node.attributes.get_int("center_point_box", 0)),
    )
    if not 0 <= how.overlap <= 1:
        raise NotNative(f"its overlap {how.overlap} is not within 0 to 1")
    if (how.score is not None and not np.isfinite(how.score)) or not boxes.name or not scores.name:
        raise NotNative("its boxes and scores are computed while running, its limits are numbers")
    y = name_of(node.outputs[0])
    images, classes, places = scores.shape
    rows = NdValue(y, (images * classes * max(0, min(how.most, places)), 3), "int64")
    count, scratch = NdValue(f"{y}/count", (1,), "int64"), NdValue(f"{y}/scratch", (1,), "float32")
    values = (boxes, scores, rows, count, scratch)
    looks = (
        Look(0, ((0, 1), BROADCAST, (1, 1), (2, 1)), (0, 0, 0)),
        Look(1, ((0, 1), (1, 1), (2, 1), BROADCAST), (0, 0, 0)),
    )
    part = Part("nms", (*scores.dims, 4), Look(2, (BROADCAST,) * 4, (0, 0)), looks)
    op = NmsOp(
        node.name or "",
        node.op_type,
        "nd",
        boxes.name,
        y,
        more=(scores.name,),
        also=(count.name, scratch.name),
        values=values,
        parts=(part,),
        how=how,
        sizes=str(scores.shape),
    )
    if op.most[0] * _ROW_BYTES > _MOST_BYTES:
        raise NotNative(
            f"it may give {op.most[0]} rows, which are more than {_MOST_BYTES >> 20} MiB"
        )
    return op


READERS = {"NonMaxSuppression": read_nms}
