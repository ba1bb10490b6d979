"""Values on the GPU: elements with a distance along each axis, in a buffer that they may share.

A value of four dimensions lies channels-last, any other one in C order; a plain array, as it came
from the host or goes there, in C order too. What a Split, a Slice or a Reshape gives is another
look at the same buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.problem import View

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A value, or part of one.

    Attributes:
        buffer: name of the memory that it lies in.
        dtype: of its elements, a key of `cuda_program.DTYPES`.
        dims: its shape, as ONNX has it: [N, C, H, W], or [..., C].
        strides: elements from one index to the next, for each dimension.
        offset: elements from the buffer's first to its first.
    """

    buffer: str
    dtype: str
    dims: Dims
    strides: Dims
    offset: int = 0

    @staticmethod
    def plain(buffer: str, dtype: str, dims: Dims) -> Tensor:
        """In C order."""
        return Tensor(buffer, dtype, dims, c_strides(dims))

    @staticmethod
    def held(buffer: str, dtype: str, dims: Dims) -> Tensor:
        """As kernels want it: images channels-last, all else in C order.

        A pixel of three channels takes the room of four, so that it can be read at once.
        """
        if len(dims) != 4:
            return Tensor.plain(buffer, dtype, dims)
        _, channels, height, width = dims
        pixel = 4 if channels == 3 else channels
        strides = (height * width * pixel, 1, width * pixel, pixel)
        return Tensor(buffer, dtype, dims, strides)

    @property
    def item_bytes(self) -> int:
        """Of an element."""
        return DTYPES[self.dtype]

    @property
    def offset_bytes(self) -> int:
        """From the buffer's first byte to its own."""
        return self.offset * self.item_bytes

    @property
    def span_bytes(self) -> int:
        """From its first byte to behind its last."""
        if 0 in self.dims:
            return 0
        last = sum((dim - 1) * step for dim, step in zip(self.dims, self.strides, strict=True))
        return (last + 1) * self.item_bytes

    @property
    def is_plain(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        pairs = zip(self.dims, self.strides, c_strides(self.dims), strict=True)
        return all(dim == 1 or step == wanted for dim, step, wanted in pairs)

    @property
    def channel_axis(self) -> int:
        """The axis of [N, C, H, W] or [..., C] that counts channels."""
        return 1 if len(self.dims) == 4 else len(self.dims) - 1

    @property
    def extent(self) -> tuple[int, int, int, int]:
        """Images (or rows of channels), height, width, channels."""
        if len(self.dims) == 4:
            batch, channels, height, width = self.dims
            return batch, height, width, channels
        return math.prod(self.dims[:-1]), 1, 1, self.dims[-1] if self.dims else 1

    @property
    def row_stride(self) -> int | None:
        """Elements from one row of channels to the next; None where they differ, or of images."""
        if len(self.dims) == 4:
            return None
        found = 0
        unit = 1
        for dim, step in zip(self.dims[-2::-1], self.strides[-2::-1], strict=True):
            if dim > 1:
                if found and step != found * unit:
                    return None
                found = found or step // unit
                if found * unit != step:
                    return None
            unit *= dim
        return found or (self.dims[-1] if self.dims else 1)

    @property
    def has_channels_together(self) -> bool:
        """Whether kernels for channels-last tensors can read it as it lies."""
        if not self.dims:
            return True
        channels = self.dims[self.channel_axis]
        together = channels == 1 or self.strides[self.channel_axis] == 1
        return together and (len(self.dims) == 4 or self.row_stride is not None)

    @property
    def view(self) -> View:
        """As kernels for channels-last tensors take it."""
        if len(self.dims) == 4:
            image, _, row, pixel = self.strides
            return View(self.dtype, image, row, pixel)
        step = self.row_stride
        assert step is not None
        return View(self.dtype, step, step, step)

    def channels(self, first: int, dims: Dims) -> Tensor:
        """Some of its channels, as a value of shape `dims`."""
        start = self.offset + first * self.strides[self.channel_axis]
        return replace(self, dims=dims, offset=start)

    def rows(self, first: int, step: int, dims: Dims) -> Tensor:
        """Every `step`-th row of channels from the first, as a value of shape `dims`."""
        row = self.row_stride
        assert row is not None
        leading = tuple(row * step * unit for unit in c_strides(dims[:-1]))
        start = self.offset + first * row
        return replace(self, dims=dims, strides=(*leading, self.strides[-1]), offset=start)

    def pixels(self, dims: Dims) -> Tensor:
        """Its pixels as rows: [N, C, H, W] as [N, H * W, C]; they have to be evenly apart."""
        image, channel, _, pixel = self.strides
        return replace(self, dims=dims, strides=(image, pixel, channel))

    def reshaped(self, dims: Dims) -> Tensor:
        """Another shape of as many images, pixels and channels."""
        _, height, width, _ = self.extent
        if len(dims) == 4 and len(self.dims) != 4:
            step, channel = self.row_stride or 0, self.strides[-1] if self.dims else 1
            return replace(self, dims=dims, strides=(step, channel, step, step))
        if len(self.dims) == 4 and len(dims) != 4:
            assert height == width == 1
            row, channel = self.strides[0], self.strides[1]
            leading = tuple(row * unit for unit in c_strides(dims[:-1]))
            strides = (*leading, channel) if dims else ()
            return replace(self, dims=dims, strides=strides)
        if len(dims) == 4:
            return replace(self, dims=dims)
        return self.rows(0, 1, dims) if dims else replace(self, dims=dims, strides=())


def c_strides(dims: Dims) -> Dims:
    """Elements from one index to the next of a plain array."""
    return tuple(math.prod(dims[axis + 1 :]) for axis in range(len(dims)))
