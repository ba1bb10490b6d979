"""Suppression of overlapping boxes, as ONNX's NonMaxSuppression has it: the definition.

For each image and each class the boxes whose score is above a threshold are taken in the order of
their scores, the highest first, of equal scores the first box first. One that overlaps a box taken
before by more than a threshold is left out, until there are as many as are wanted.

Kernels give exactly these boxes: every step below is one operation in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Suppression:
    """How boxes are chosen.

    Attributes:
        most: boxes of an image and class at most.
        overlap: the largest allowed overlap of two: intersection over union.
        score: boxes have a score above this; None: any score.
        centred: a box is (centre x, centre y, width, height), else two opposite corners,
            (y, x, y, x).
    """

    most: int
    overlap: float = 0.0
    score: float | None = None
    centred: bool = False


def suppress(boxes: Floats, scores: Floats, how: Suppression) -> NDArray[np.int64]:
    """The boxes that are left.

    Args:
        boxes: [images, places, 4].
        scores: [images, classes, places], none NaN.
        how: thresholds.

    Returns:
        int64 [count, 3]: image, class and place, in the order of images, classes and scores.
    """
    found = [
        (image, kind, place)
        for image, of_image in enumerate(scores)
        for kind, of_class in enumerate(of_image)
        for place in _left(_Corners.of(boxes[image], how.centred), of_class, how)
    ]
    return np.array(found, np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class _Corners:
    """Boxes as [places] arrays: low and high x, low and high y."""

    low_x: Floats
    high_x: Floats
    low_y: Floats
    high_y: Floats

    @staticmethod
    def of(boxes: Floats, centred: bool) -> _Corners:
        if centred:
            x, y, width, height = boxes.astype(np.float32).T
            half_x, half_y = width * np.float32(0.5), height * np.float32(0.5)
            return _Corners(x - half_x, x + half_x, y - half_y, y + half_y)
        y1, x1, y2, x2 = boxes.astype(np.float32).T
        ends = (x1, x2), (y1, y2)
        sides = [(np.where(a >= b, b, a), np.where(a >= b, a, b)) for a, b in ends]
        return _Corners(*sides[0], *sides[1])

    @property
    def area(self) -> Floats:
        area: Floats = (self.high_x - self.low_x) * (self.high_y - self.low_y)
        return area


def _left(boxes: _Corners, scores: Floats, how: Suppression) -> list[int]:
    """The places of one image and class that are left."""
    order = np.argsort(-scores, kind="stable")
    wanted = order if how.score is None else order[scores[order] > np.float32(how.score)]
    taken: list[int] = []
    for place in wanted.tolist():
        if len(taken) >= how.most:
            break
        if not (_overlaps(boxes, place, np.array(taken, np.int64)) > np.float32(how.overlap)).any():
            taken.append(place)
    return taken


def _overlaps(boxes: _Corners, place: int, others: NDArray[np.int64]) -> Floats:
    """Intersection over union with each of some others; -1 where there is none."""
    width = np.minimum(boxes.high_x[place], boxes.high_x[others])
    width = width - np.maximum(boxes.low_x[place], boxes.low_x[others])
    height = np.minimum(boxes.high_y[place], boxes.high_y[others])
    height = height - np.maximum(boxes.low_y[place], boxes.low_y[others])
    both = width * height
    one, other = boxes.area[place], boxes.area[others]
    union = (one + other) - both
    meet = (width > 0) & (height > 0) & (both > 0) & (one > 0) & (other > 0) & (union > 0)
    share: Floats = np.where(meet, both / np.where(meet, union, 1), np.float32(-1))
    return share
