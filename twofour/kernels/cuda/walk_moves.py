"""Operators of images that are walks on a GPU: nothing but copies and fills."""

from __future__ import annotations

from dataclasses import replace

from twofour.kernels.cuda.problem import Ref, View, Walk


def slice_pad(
    x: View,
    y: View,
    size: tuple[int, int, int, int],
    steps: tuple[int, int],
    channel_pads: tuple[int, int],
    value: float = 0.0,
) -> tuple[Walk, ...]:
    """Every k-th pixel of x, with channels of one value before and after its own (SlicePad).

        y[n, i, j, before + c] = x[n, i * steps[0], j * steps[1], c]

    Each walk writes a part of y, so they may run in any order; all have the role y, the first in0.

    Args:
        x: input.
        y: output, of the same type.
        size: images, rows and columns of y, channels of x.
        steps: along rows and columns.
        channel_pads: channels of y before and after those of x.
        value: of these; the zero point of a quantized y.
    """
    before, after = channel_pads
    read = (x.image, x.row * steps[0], x.pixel * steps[1], 1)
    written = (y.image, y.row, y.pixel, 1)
    to = Ref(y.dtype, written, before)
    walks = [Walk("copy", size, to, (Ref(x.dtype, read),))]
    for count, start in ((before, 0), (after, before + size[3])):
        if count:
            dims = (*size[:3], count)
            walks.append(Walk("fill", dims, replace(to, offset=start), scalars=(value,)))
    return tuple(walks)
