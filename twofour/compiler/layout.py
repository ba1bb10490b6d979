"""Where tensors lie: channels-last, with a halo wide enough for every convolution that reads them.

The interior of a tensor is written by its producer; the halo around it is set once, when a session
starts, to the zero point: convolutions read their padding from it, free of any test or copy.

A tensor may be a view: some channels of every k-th image of another one, its parent. It has no
bytes of its own, and the steps from pixel to pixel are the parent's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from twofour.core.numerics import Window
from twofour.core.sizes import Count, Size, open_size
from twofour.kernels.cpu.pointwise import View
from twofour.kernels.cpu.problem import Strides
from twofour.kernels.cpu.quantize_rows import row_tail

ALIGNMENT = 64
# An L1 of 64 sets of 64 bytes: pixels at multiples of this lie in two sets, or one.
_CROWDED_BYTES = 2048
_LINE_BYTES = 64
_BYTES = {"u8": 1, "bfloat16": 2}


@dataclass
class Tensor:
    """One native tensor.

    Attributes:
        name: of its value; an alias has the tensor of what it aliases.
        batch: images.
        height: rows.
        width: columns.
        channels: channels.
        kind: "u8" (stored quantized: int8 values plus 128), "bfloat16", or the numpy name of its
            type.
        fill: the byte of the halo.
        halo: pixels around the interior: top, left, bottom, right; of the parent for a view.
        offset: in the arena; set by memory planning. A view has none of its own.
        pad_bytes: after the channels of each pixel.
        parent: the tensor that this is a view of, or None.
        images: of the parent, those of the view; none if each pixel of it is an image of the view.
        first: channel of the parent where the view starts.
        open_batch: the number of images where it is open; `batch` is then the largest.
    """

    name: str
    batch: int
    height: int
    width: int
    channels: int
    kind: str
    fill: int = 0
    halo: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    offset: int = -1
    pad_bytes: int = 0
    parent: Tensor | None = None
    images: range = range(0)
    first: int = 0
    open_batch: Size | None = None

    @property
    def count(self) -> Count:
        """The number of images."""
        return self.batch if self.open_batch is None else self.open_batch

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return _BYTES.get(self.kind) or np.dtype(self.kind).itemsize

    @property
    def root(self) -> Tensor:
        """The tensor that holds the bytes."""
        return self if self.parent is None else self.parent.root

    def part(self, name: str, first: int, channels: int, images: range) -> Tensor:
        """A view of `channels` channels from `first` on, and of some images, under another name."""
        view = Tensor(name, len(images), self.height, self.width, channels, self.kind)
        view.parent, view.images, view.first = self, images, first
        return view

    def channel_in(self, wide: Tensor) -> int | None:
        """The channel of another tensor that this one starts at; None where it is no part of it."""
        if self is wide:
            return 0
        if self.parent is None or len(self.images) != self.parent.batch:
            return None
        outer = self.parent.channel_in(wide)
        return None if outer is None else outer + self.first

    def column(self, name: str) -> Tensor:
        """All pixels of all images as images of one pixel; there must be no halo between them."""
        pixels = self.height * self.width
        view = Tensor(name, self.batch * pixels, 1, 1, self.channels, self.kind, parent=self)
        view.open_batch = open_size(self.count * pixels)
        view.images = range(0)
        return view

    @property
    def strides(self) -> Strides:
        """Of the interior."""
        if self.parent is not None:
            outer = self.parent.strides
            if not self.images:
                return Strides(outer.pixel, outer.pixel, outer.pixel)
            image = outer.image * self.images.step
            if self.height == self.width == 1 and not any(self.root.halo):
                return Strides(image, image, image)  # rows of channels: one column
            return Strides(image, outer.row, outer.pixel)
        pixel = self.channels * self.element_bytes + self.pad_bytes
        row = (self.width + self.halo[1] + self.halo[3]) * pixel
        return Strides((self.height + self.halo[0] + self.halo[2]) * row, row, pixel)

    @property
    def size_bytes(self) -> int:
        """With the halo."""
        return self.batch * self.strides.image

    @property
    def view(self) -> View:
        """As the pointwise kernels see it."""
        kind = "f32" if self.kind == "float32" else self.kind
        return View.native(kind, self.strides)

    @property
    def layout(self) -> tuple[int, ...]:
        """Equal for tensors that may take each other's place, halo and all."""
        return (
            self.batch,
            self.height,
            self.width,
            self.channels,
            self.element_bytes,
            self.pad_bytes,
            self.fill,
            *self.halo,
        )

    def at(self, top: int = 0, left: int = 0) -> int:
        """Arena offset of pixel (-top, -left)."""
        if self.parent is not None:
            inside = self.images.start * self.parent.strides.image
            return self.parent.at(top, left) + inside + self.first * self.element_bytes
        strides = self.strides
        return (
            self.offset + (self.halo[0] - top) * strides.row + (self.halo[1] - left) * strides.pixel
        )

    def spread(self, stride: int) -> None:
        """Sets pixels further apart where those of a tile would evict each other from L1.

        Args:
            stride: from one pixel that a tile reads to the next.
        """
        root = self.root
        if root.pad_bytes:
            return
        if root.strides.pixel * stride % _CROWDED_BYTES == 0 and root.width * root.batch > 1:
            root.pad_bytes = _LINE_BYTES

    def in_rows(self, name: str) -> Tensor:
        """Its rows as bytes, each with what they stand for behind it: see `row_tail`."""
        rows = Tensor(name, self.batch, self.height, self.width, self.channels, "u8")
        rows.pad_bytes = row_tail(self.channels)[1] - self.channels
        rows.open_batch = self.open_batch
        return rows

    def in_float32(self, stride: int) -> Tensor:
        """The same tensor of float32, by itself; `stride` as for `spread`."""
        parent = self.parent.in_float32(stride) if self.parent is not None else None
        wide = replace(self, kind="float32", pad_bytes=0, parent=parent)
        if parent is None:
            wide.spread(stride)
        return wide

    def widen(self, window: Window) -> None:
        """Makes the halo hold every pixel the window reads outside the interior."""
        if self.parent is not None:
            self.parent.widen(window)
            return
        out_h, out_w = window.output_size(self.height, self.width)
        top, left = window.pads[:2]
        reach = [
            (out - 1) * s + (k - 1) * d
            for out, s, k, d in zip(
                (out_h, out_w), window.stride, window.kernel, window.dilation, strict=True
            )
        ]
        needs = (top, left, reach[0] - top - (self.height - 1), reach[1] - left - (self.width - 1))
        self.halo = [max(have, need) for have, need in zip(self.halo, needs, strict=True)]
