"""The process that `race.py` starts: runs products of libraries and tells how long they take.

    python -m twofour.compiler.cuda.race_child GPU-UUID

One line of JSON in, {"library", "settings": [...], "runs"}; one line out for each of the settings,
{"us"} or {"error"}. Operands hold random numbers. It ends where a kernel broke the GPU's context.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.bfloat16 import to_bf16
from twofour.core.cuda_products import CUSPARSELT, Product, read_product
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import Error, UnsupportedError
from twofour.core.float8 import to_fp8
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.device import Device, open_device

Array = NDArray[Any]
_ELEMENTS = 4 * 262139  # random ones; repeated, so that no two rows of a matrix are the same


class Child:
    """A GPU, with memory for the operands of one request after the other."""

    def __init__(self, device: Device) -> None:
        """Takes nothing yet.

        Args:
            device: the current GPU.
        """
        self._device, self._stream = device, device.stream()
        self._events = (device.event(), device.event())
        self._held: dict[str, tuple[str, int, int]] = {}
        self._bits: dict[str, Array] = {}

    def us(self, product: Product, library: str, runs: int) -> float:
        """Microseconds of one run, the first not counted.

        Raises:
            Error: it cannot run.
        """
        device, stream = self._device, self._stream
        prepare = cusparselt.prepare if library == CUSPARSELT else cublaslt.prepare
        ready = prepare(product.to_json(), device.capability, device.gpu.index)
        try:
            sizes = dict(zip(ready.product.roles, ready.sizes, strict=True))
            types = {"w": product.x, "x": product.x, "r": product.r, "bias": product.bias}
            addresses = tuple(
                self._filled(role, types.get(role, "float32"), size) for role, size in sizes.items()
            )
            if isinstance(ready, cusparselt.SparseProduct):
                w = self._filled("dense w", product.x, product.n * product.k * DTYPES[product.x])
                buffer = self._filled("buffer", "", ready.buffer_bytes)
                ready.pack(stream, w, addresses[0], buffer)
            ready.run(stream, addresses)
            device.record(self._events[0], stream)
            for _ in range(runs):
                ready.run(stream, addresses)
            device.record(self._events[1], stream)
            device.wait(stream)
            return device.elapsed_us(*self._events) / runs
        finally:
            ready.close()

    def wait(self) -> None:
        """Until all is done.

        Raises:
            UnsupportedError: a kernel broke the context.
        """
        self._device.wait(self._stream)

    def _filled(self, role: str, dtype: str, size_bytes: int) -> int:
        """The address of so many bytes, of random elements of the type where it is read."""
        kind, there, address = self._held.get(role, ("", -1, 0))
        if there >= size_bytes and kind == dtype:
            return address
        if there >= 0:
            del self._held[role]
            self._device.give_back(address)
        address = self._device.take(size_bytes, "timing a library's algorithms")
        self._held[role] = dtype, size_bytes, address
        if role in ("w", "x", "r", "dense w", "bias", "scale", "row_scale", "r_scale", "y_scale"):
            bits = self._random(dtype)
            for begin in range(0, size_bytes, bits.size):
                piece = bits[: size_bytes - begin]
                self._device.to_gpu(address + begin, piece, self._stream)
        else:
            self._device.fill(address, 0, size_bytes, self._stream)
        self._device.wait(self._stream)
        return address

    def _random(self, dtype: str) -> Array:
        """Bytes of random elements, two zeros in each group of four."""
        if dtype not in self._bits:
            rng = np.random.default_rng(3)
            values = rng.standard_normal(_ELEMENTS, np.float32)
            values.reshape(-1, 2, 2)[:, :, rng.integers(0, 2)] = 0
            bits: Array = values
            if dtype == "int8":
                bits = np.clip(values * 40, -127, 127).astype(np.int8)
            elif dtype == "float16":
                bits = values.astype(np.float16)
            elif dtype in ("bfloat16", "float8e4m3fn"):
                bits = to_bf16(values) if dtype == "bfloat16" else to_fp8(values)
            self._bits[dtype] = bits.view(np.uint8)
        return self._bits[dtype]


def main(which: str) -> None:
    """Answers requests until there are no more."""
    device = open_device(which)
    with device.current():
        child = Child(device)
        for line in sys.stdin:
            request = json.loads(line)
            for settings in request["settings"]:
                library = request["library"]
                try:
                    product = read_product(settings, library)
                    us = child.us(product, library, request["runs"])
                    _tell({"us": us})
                except Error as error:
                    child.wait()  # where the context is broken, the end of this process says so
                    _tell({"error": " ".join(str(error).split())[:400]})


def _tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UnsupportedError as error:
        sys.exit(" ".join(str(error).split()))
    except (BrokenPipeError, KeyboardInterrupt):  # who asked has ended
        os._exit(1)
