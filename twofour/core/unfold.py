"""The patches of a convolution's input: what each output position multiplies the filter with.

    for o in output positions:                    # one axis for each spatial axis of x
        for t in taps:
            patch[b, o, t, :] = x[b, o * strides + t * dilations - begins, :]     # padding outside

A patch has its features in the order (tap, channel), channels fastest.

Source: ONNX Conv.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Where a convolution looks, one number for each spatial axis.

    Attributes:
        kernel: taps.
        strides: from one output position to the next.
        dilations: from one tap to the next.
        pads: begins of all axes, then ends.
    """

    kernel: Ints
    strides: Ints
    dilations: Ints
    pads: Ints

    def output(self, size: Ints) -> Ints:
        """Output positions for an input of this size; 0 where the window does not fit."""
        axes = len(self.kernel)
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        padded = [s + self.pads[i] + self.pads[axes + i] for i, s in enumerate(size)]
        steps = zip(padded, reach, self.strides, strict=True)
        return tuple(max((p - r) // stride + 1, 0) for p, r, stride in steps)


def same_pads(windows: Windows, size: Ints, *, lower: bool) -> Ints:
    """The pads with which there are ceil(size / stride) output positions: ONNX's auto_pad SAME.

    Args:
        windows: whose pads do not count.
        size: of the input, for each spatial axis.
        lower: the odd one is at the beginning (SAME_LOWER), not at the end (SAME_UPPER).
    """
    totals = [
        max((-(-length // stride) - 1) * stride + (taps - 1) * dilation + 1 - length, 0)
        for length, taps, stride, dilation in zip(
            size, windows.kernel, windows.strides, windows.dilations, strict=True
        )
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (*large, *small) if lower else (*small, *large)


def unfold(x: Array, windows: Windows, fill: float = 0) -> Array:
    """Every patch of `x`.

    Args:
        x: [batch, *spatial, C], any dtype.
        windows: of as many axes as `x` has spatial ones.
        fill: the value of the padding.

    Returns:
        [batch, *output, taps, C], the dtype of `x`.
    """
    axes = len(windows.kernel)
    ends = list(zip(windows.pads[:axes], windows.pads[axes:], strict=True))
    padded = np.pad(x, [(0, 0), *ends, (0, 0)], constant_values=fill) if any(windows.pads) else x
    output = windows.output(x.shape[1:-1])
    found = np.empty((len(x), *output, math.prod(windows.kernel), x.shape[-1]), x.dtype)
    for index, tap in enumerate(itertools.product(*map(range, windows.kernel))):
        parts = zip(tap, windows.dilations, windows.strides, output, strict=True)
        where = [slice(t * d, t * d + s * (o - 1) + 1 if o else 0, s) for t, d, s, o in parts]
        found[..., index, :] = padded[(slice(None), *where)]
    return found


def pieces(x: Array, windows: Windows, most_bytes: int) -> Iterator[Array]:
    """All patches of `x`, padded with 0, some at a time.

    Args:
        x: [batch, *spatial, C].
        windows: of as many axes as `x` has spatial ones.
        most_bytes: that the patches of a piece may take; but at least those of one row of outputs
            (all but the first spatial axis).

    Yields:
        [patches, taps, C], the dtype of `x`, in order.
    """
    axes = len(windows.kernel)
    ends = zip(windows.pads[:axes], windows.pads[axes:], strict=True)
    padded = np.pad(x, [(0, 0), *ends, (0, 0)]) if any(windows.pads) else x
    inside = replace(windows, pads=(0,) * 2 * axes)
    rows, *rest = inside.output(padded.shape[1:-1])
    channels = x.shape[-1]
    row_bytes = math.prod((*rest, *windows.kernel, channels)) * x.itemsize
    at_once = max(most_bytes // max(row_bytes, 1), 1)
    samples, most_rows = max(at_once // max(rows, 1), 1), min(at_once, max(rows, 1))
    reach = windows.dilations[0] * (windows.kernel[0] - 1) + 1
    for sample, row in itertools.product(range(0, len(x), samples), range(0, rows, most_rows)):
        last = min(row + most_rows, rows) - 1
        part = padded[sample : sample + samples, row * windows.strides[0] :]
        found = unfold(part[:, : (last - row) * windows.strides[0] + reach], inside)
        yield found.reshape(-1, *found.shape[-2:])
