"""Where tensors lie: channels-last, with a halo wide enough for every convolution that reads them.

The interior of a tensor is written by its producer; the halo around it is set once, when a session
starts, to the zero point: convolutions read their padding from it, free of any test or copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twofour.core.numerics import Window
from twofour.kernels.cpu.pointwise import View
from twofour.kernels.cpu.problem import Strides

ALIGNMENT = 64


@dataclass
class Tensor:
    """One native tensor.

    Attributes:
        name: of its value; an alias has the tensor of what it aliases.
        batch: images.
        height: rows.
        width: columns.
        channels: channels.
        kind: "u8" (stored quantized: int8 values plus 128) or "float32".
        fill: the byte of the halo.
        halo: pixels around the interior: top, left, bottom, right.
        offset: in the arena; set by memory planning.
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

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return 1 if self.kind == "u8" else 4

    @property
    def strides(self) -> Strides:
        """Of the interior."""
        pixel = self.channels * self.element_bytes
        row = (self.width + self.halo[1] + self.halo[3]) * pixel
        return Strides((self.height + self.halo[0] + self.halo[2]) * row, row, pixel)

    @property
    def size_bytes(self) -> int:
        """With the halo."""
        return self.batch * self.strides.image

    @property
    def view(self) -> View:
        """As the pointwise kernels see it."""
        return View.native("u8" if self.kind == "u8" else "f32", self.strides)

    @property
    def layout(self) -> tuple[int, ...]:
        """Equal for tensors that may take each other's place, halo and all."""
        return (
            self.batch,
            self.height,
            self.width,
            self.channels,
            self.element_bytes,
            self.fill,
            *self.halo,
        )

    def at(self, top: int = 0, left: int = 0) -> int:
        """Arena offset of pixel (-top, -left)."""
        strides = self.strides
        return (
            self.offset + (self.halo[0] - top) * strides.row + (self.halo[1] - left) * strides.pixel
        )

    def widen(self, window: Window) -> None:
        """Makes the halo hold every pixel the window reads outside the interior."""
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
