"""The classification extension: an output's largest values as texts instead of the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.serve.errors import MalformedError

Array = NDArray[Any]


def classified(output: Array, classes: int, labels: Sequence[str] = ()) -> Array:
    """The largest values of each row with their places.

    Args:
        output: [rows, ...] of numbers; what follows the rows counts as one axis. One of a single
            dimension is one row.
        classes: how many, at least 1; no more than a row has are given.
        labels: texts of the places.

    Returns:
        object [rows, classes], or [classes] of a single row without an axis: b"value:place" or
        b"value:place:label", the largest first, of equal values that at the lower place.

    Raises:
        MalformedError: the output holds no numbers that can be ordered.
    """
    if output.dtype.kind not in "fiu" or not output.ndim or not output.size:
        raise MalformedError(
            "this output has no classes",
            [f"expected numbers in rows, got {output.dtype} {list(output.shape)}"],
            "ask for the tensor itself",
        )
    rows = output.reshape(1 if output.ndim == 1 else len(output), -1)
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    texts = np.empty(order.shape, object)
    for row, places in enumerate(order):
        texts[row] = [_text(rows[row, place], int(place), labels) for place in places]
    return texts[0] if output.ndim == 1 else texts


def _text(value: Any, place: int, labels: Sequence[str]) -> bytes:
    number = f"{value:f}" if np.issubdtype(type(value), np.floating) else str(value)
    label = f":{labels[place]}" if place < len(labels) else ""
    return f"{number}:{place}{label}".encode()
