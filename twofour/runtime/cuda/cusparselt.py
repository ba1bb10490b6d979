"""Products with a 2:4 weight by cuSPARSELt; what is computed is told by core/cuda_products.py.

    packed = compress(product, w, gpu, stream)     # at build, on the GPU
    product = prepare(settings, 90)
    product.run(stream, addresses)

The weight is the library's operand A: y^T [n, m] = w [n, k] x^T [k, m], w with its rows in order,
x^T and y^T with their columns, so that x and y are used as they lie. Its compressed form does not
depend on the algorithm, nor on the number of rows of x.

The address of the bias is part of the library's plan. So the first run with an address makes a
plan; let it happen before a CUDA graph is recorded.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.cuda_products import (
    CUSPARSELT,
    WORKSPACE,
    Product,
    read_product,
)
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.runtime.cuda.cusparselt_plan import PLAIN, SparsePlan, struct
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.libraries import ALIGNMENT, Library, cusparselt

Array = NDArray[Any]
_SEGMENTS, _LONG = 90, 2048  # split_k of -1, "segment k", is tried from there on
_BREAK = {(800, 90, "float16"): 36}
"""(version, capability, type of x) -> from this number on algorithms break the GPU's context.

Seen on an H200: numbers 36 to 41 of 0.8.0 end with an illegal instruction, those before do not.
"""
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


class SparseProduct:
    """A product that is ready to run.

    Attributes:
        product: what is computed.
        workspace_bytes: of the operand `workspace`.
        sizes: bytes that are touched of each operand, in order.
    """

    def __init__(self, product: Product, library: Library, handle: Any) -> None:
        """Makes the plan.

        Args:
            product: checked.
            library: cuSPARSELt.
            handle: of cuSPARSELt on this GPU.

        Raises:
            EngineError: the library has no such algorithm.
            UnsupportedError: the library cannot compute it.
        """
        self.product = product
        self._library, self._handle = library, handle
        self._about = f"product: {product.to_json()}"
        self._alpha = ctypes.c_float(product.alpha)
        self._beta = ctypes.c_float(product.beta)
        self._first = SparsePlan(product, library, handle, ALIGNMENT)
        self._others: list[SparsePlan] = []
        self._plans = {} if product.bias else {0: self._first}
        self.ids = self._first.ids
        self.workspace_bytes = self._first.workspace_bytes
        self.compressed_bytes = self._first.compressed_bytes
        self.buffer_bytes = self._first.buffer_bytes
        self.sizes = product.sizes(self.compressed_bytes)

    def run(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Starts the product.

        Args:
            stream: of CUDA.
            addresses: of the operands, in the order of `product.roles`.

        Raises:
            EngineError: the addresses are not those of the operands.
            UnsupportedError: the library refuses.
        """
        roles = self.product.roles
        if len(addresses) != len(roles) or any(each % ALIGNMENT for each in addresses):
            expected = f"expected {len(roles)} multiples of {ALIGNMENT}: {', '.join(roles)}"
            raise EngineError("a product has wrong operands", [expected, f"got {addresses}"])
        at = dict(zip(roles, addresses, strict=True))
        plan = self._plan(at.get("bias", 0))
        vector = self.product.by_channel
        alpha = ctypes.c_void_p(at["scale"]) if vector else ctypes.byref(self._alpha)
        many = self.product.r_by_channel
        beta = ctypes.c_void_p(at["r_scale"]) if many else ctypes.byref(self._beta)
        pointer = ctypes.c_void_p
        streams = (ctypes.c_void_p * 1)(stream)
        plan.call(
            *("cusparseLtMatmul", plan.plan, alpha, pointer(at["w"]), pointer(at["x"])),
            *(beta, pointer(at.get("r", at["y"])), pointer(at["y"])),
            *(pointer(at.get("workspace")), streams, 1),
        )

    def compress(self, w: Array, gpu: Device, stream: int) -> NDArray[np.uint8]:
        """The weight as the library takes it.

        Args:
            w: [n, k], of as many bytes an element as x; 2:4 along k.
            gpu: where it is done, the current one.
            stream: of it.

        Raises:
            InputError: it is no such weight.
        """
        expected = (self.product.n, self.product.k, DTYPES[self.product.x])
        if (*w.shape, w.itemsize) != expected:
            found = f"expected [n, k] and bytes {expected}, got {(*w.shape, w.itemsize)}"
            raise InputError("a weight does not fit its product", [found, self._about])
        held, packed = np.ascontiguousarray(w), np.empty(self.compressed_bytes, np.uint8)
        taken: list[int] = []
        try:
            for size in (held.nbytes, packed.nbytes, self.buffer_bytes):
                taken.append(gpu.take(max(ALIGNMENT, size), "compressing a weight"))
            gpu.to_gpu(taken[0], held, stream)
            self.pack(stream, *taken)
            gpu.from_gpu(packed, taken[1], stream)
            gpu.wait(stream)
            return packed
        finally:
            for address in taken:
                gpu.give_back(address)

    def pack(self, stream: int, w: int, packed: int, buffer: int) -> None:
        """Compresses a weight that lies on the GPU already.

        Args:
            stream: of CUDA.
            w: address of [n, k].
            packed: address of `compressed_bytes`.
            buffer: address of `buffer_bytes` for its work.
        """
        pointers = [ctypes.c_void_p(each) for each in (w, packed, buffer, stream)]
        self._first.call("cusparseLtSpMMACompress2", self._first.w, 1, PLAIN, *pointers)

    def grow(self) -> None:
        """Asks for the workspace of the library's own choice of algorithm."""
        if self.workspace_bytes > self.product.workspace_bytes:
            self.product = replace(self.product, workspace_bytes=self.workspace_bytes)
            self.sizes = self.product.sizes(self.compressed_bytes)

    def close(self) -> None:
        """Frees the plans."""
        self._plans = {}
        for plan in (self._first, *self._others):
            plan.close()

    def _plan(self, bias: int) -> SparsePlan:
        """The plan for this address of the bias."""
        if bias not in self._plans:
            made = SparsePlan(self.product, self._library, self._handle, bias)
            self._others.append(made)
            self._plans[bias] = made
        return self._plans[bias]


def prepare(
    settings: str,
    capability: int,
    device: int = 0,
    get: Callable[[], Library] = cusparselt,
) -> SparseProduct:
    """A product, ready to run on the current GPU.

    Args:
        settings: of a `LibraryCall`.
        capability: of the GPU, 90 for 9.0.
        device: the number of the current GPU: each has a handle of its own.
        get: gives the library.

    Raises:
        EngineError: the settings are malformed, or of another version of the library.
        UnsupportedError: there is no cuSPARSELt, or it cannot compute the product.
    """
    product = read_product(settings, CUSPARSELT)
    least = 89 if product.x == "float8e4m3fn" else 80
    if capability < least:
        what = f"no 2:4 products of {product.x} on a GPU of compute capability {capability / 10}"
        raise UnsupportedError(what, [f"expected {least / 10} or higher"])
    library = get()
    if product.version not in (0, library.version):
        reasons = [f"expected version {product.version}, this is {library.title}", library.path]
        raise EngineError("the engine's algorithms are of another cuSPARSELt", reasons, _REBUILD)
    made = SparseProduct(product, library, _handle(library, device))
    if made.workspace_bytes > product.workspace_bytes and product.algorithm:
        made.close()
        needed = f"expected {made.workspace_bytes} bytes, got {product.workspace_bytes}"
        raise EngineError("a product has too little workspace", [needed, settings], _REBUILD)
    made.grow()
    return made


def compress(
    product: Product, w: Array, gpu: Device, stream: int, device: int = 0
) -> NDArray[np.uint8]:
    """A weight as cuSPARSELt takes it.

    Args:
        product: what it is for, by any algorithm.
        w: [n, k], of as many bytes an element as x; 2:4 along k.
        gpu: where it is done, the current one.
        stream: of it.
        device: its number.

    Raises:
        InputError: it is no such weight.
        UnsupportedError: the library cannot compute the product.
    """
    library = cusparselt()
    made = SparseProduct(product, library, _handle(library, device))
    try:
        return made.compress(w, gpu, stream)
    finally:
        made.close()


def algorithms(product: Product, capability: int, most: int, device: int = 0) -> list[Product]:
    """The same product by each algorithm that the library has for it.

    Args:
        product: without an algorithm.
        capability: of the GPU.
        most: how many at most.
        device: the number of the current GPU.

    Raises:
        UnsupportedError: there is no cuSPARSELt.
    """
    library = cusparselt()
    if list(product.wrong(CUSPARSELT)):
        return []
    found: list[Product] = []
    asked = _made(product, library, device)
    if asked is None:
        return found
    safe = _BREAK.get((library.version, capability, product.x), asked.ids)
    names = [str(number) for number in range(min(safe, asked.ids))]
    asked.close()
    if capability >= _SEGMENTS and product.k >= _LONG:
        names += [f"{name}/-1/0/0" for name in names]
    for name in names:
        wanted = replace(product, algorithm=name, version=library.version)
        made = _made(wanted, library, device)
        if made is None:
            continue
        size = made.workspace_bytes
        made.close()
        if size <= WORKSPACE[CUSPARSELT]:
            found.append(replace(wanted, workspace_bytes=size))
        if len(found) == most:
            break
    return found


def _made(product: Product, library: Library, device: int) -> SparseProduct | None:
    """The product; None where the library has no such one."""
    try:
        return SparseProduct(product, library, _handle(library, device))
    except UnsupportedError:
        return None


@functools.cache
def _handle(library: Library, device: int) -> Any:
    """One a GPU, for the life of the process; threads may share it."""
    handle = struct()
    library.call("cusparseLtInit", ctypes.byref(handle), about=f"GPU {device}")
    return handle
