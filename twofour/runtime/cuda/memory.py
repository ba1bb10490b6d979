"""One stream of a GPU, and what was taken of its memory: for a library that brings its own code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import Error
from twofour.runtime.cuda.device import open_device

Array = NDArray[Any]


class GpuMemory:
    """A stream of a GPU, and memory that is freed with it.

    Attributes:
        device: the GPU.
        stream: a number, as libraries take it.

    Raises:
        UnsupportedError: cuda-bindings is not installed, or there is no GPU that it can use.
    """

    def __init__(self, gpu: int | str = 0) -> None:
        """Opens the stream.

        Args:
            gpu: which, by index or UUID.
        """
        self.device = open_device(gpu)
        self.stream = self.device.stream()
        self._taken: set[int] = set()

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        return self.device.gpu.capability

    @property
    def model(self) -> str:
        """The GPU's name."""
        return self.device.gpu.name

    def take(self, size_bytes: int) -> int:
        """The address of so many bytes on the GPU, at least one.

        Raises:
            UnsupportedError: there is not so much memory left.
        """
        address = self.device.take(size_bytes)
        self._taken.add(address)
        return address

    def give_back(self, address: int) -> None:
        """Frees what `take` gave."""
        self._taken.discard(address)
        self.device.give_back(address)

    def to_gpu(self, address: int, array: Array) -> None:
        """Copies a C-contiguous array; it may be changed as soon as the stream was waited for."""
        self.device.to_gpu(address, array, self.stream)

    def from_gpu(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array of what lies there, complete once the stream was waited for."""
        array = np.empty(shape, dtype)
        self.device.from_gpu(array, address, self.stream)
        return array

    def wait(self) -> None:
        """Until all that was put into the stream is done."""
        self.device.wait(self.stream)

    def close(self) -> None:
        """Frees all memory and the stream."""
        for address in sorted(self._taken):
            self.give_back(address)
        self.device.drop_stream(self.stream)


def gpu_here() -> tuple[str, tuple[int, int]] | None:
    """The first GPU's name and compute capability; None where there is none to be used."""
    try:
        gpu = open_device(0).gpu
    except Error:
        return None
    return gpu.name, gpu.capability
