"""Memory and a stream on a GPU, by NVIDIA's cuda-bindings: the one place where it is imported."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import UnsupportedError

_MODULE = "cuda.bindings.runtime"
_SUCCESS = 0
Array = NDArray[Any]


class Cuda:
    """One stream of the current GPU, and what was taken of its memory.

    Raises:
        UnsupportedError: cuda-bindings is not installed, or there is no GPU that it can use.
    """

    def __init__(self) -> None:
        """Opens the stream."""
        self._cuda = _bindings()
        self.device = int(self._call("cudaGetDevice"))
        self.stream = int(self._call("cudaStreamCreate"))
        self._taken: set[int] = set()

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        kinds = [getattr(self._cuda.cudaDeviceAttr, name) for name in names]
        major, minor = (self._call("cudaDeviceGetAttribute", k, self.device) for k in kinds)
        return int(major), int(minor)

    @property
    def model(self) -> str:
        """The GPU's name."""
        name = self._call("cudaGetDeviceProperties", self.device).name
        return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)

    def take(self, size_bytes: int) -> int:
        """The address of so many bytes on the GPU, at least one.

        Raises:
            UnsupportedError: there is not so much memory left.
        """
        address = int(self._call("cudaMalloc", max(1, size_bytes)))
        self._taken.add(address)
        return address

    def give_back(self, address: int) -> None:
        """Frees what `take` gave."""
        self._taken.discard(address)
        self._call("cudaFree", address)

    def to_gpu(self, address: int, array: Array) -> None:
        """Copies a C-contiguous array; it may be changed as soon as the stream was waited for."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def from_gpu(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array of what lies there, complete once the stream was waited for."""
        array = np.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
        return array

    def wait(self) -> None:
        """Until all that was put into the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Frees all memory and the stream."""
        for address in sorted(self._taken):
            self.give_back(address)
        self._call("cudaStreamDestroy", self.stream)

    def _copy(self, to: int, source: int, size_bytes: int, kind: str) -> None:
        if size_bytes:
            way = getattr(self._cuda.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", to, source, size_bytes, way, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of CUDA: its result, if it has one."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status) != _SUCCESS:
            _, text = self._cuda.cudaGetErrorString(status)
            told = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            raise UnsupportedError(
                f"CUDA refuses {name}",
                [f"error {int(status)}: {told}"],
                "twofour doctor says what there is of GPUs and their driver",
            )
        return results[0] if results else None


def gpu_here() -> tuple[str, tuple[int, int]] | None:
    """The current GPU's name and compute capability; None where there is none to be used."""
    try:
        cuda = Cuda()
    except UnsupportedError:
        return None
    try:
        return cuda.model, cuda.capability
    finally:
        cuda.close()


def _bindings() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise UnsupportedError(
            "the GPU cannot be reached: cuda-bindings is not installed",
            [f"import {_MODULE}: {error}"],
            "pip install 'twofour[tensorrt]'",
        ) from error
