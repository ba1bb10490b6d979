"""Products with a 2:4 weight by cuSPARSELt; what is computed is told by core/cuda_products.py.

    packed = compress(product, w, gpu, stream)     # at build, on the GPU
    product = prepare(settings, 90)
    product.run(stream, addresses)

The weight is the library's operand A: y^T [n, m] = w [n, k] x^T [k, m], w with its rows in order,
x^T and y^T with their columns, so that x and y are used as they lie. Its compressed form does not
depend on the algorithm, nor on the number of rows of x.

The address of the bias is part of the library's plan. So a run with another one than that of the
run before makes the plan again; let the first run happen before a CUDA graph is recorded.
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
    algorithm_numbers,
    read_product,
)
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.libraries import ALIGNMENT, TYPES, Library, cusparselt

Array = NDArray[Any]
STRUCT_BYTES = 16384
"""Room for each of the library's structures: 512 bytes in 0.8, 11024 in some before."""
_COMPUTE_32I, _COMPUTE_32F = 0, 2
_BY_COLUMNS, _BY_ROWS = 1, 2  # cusparseOrder_t
_PLAIN = 0  # CUSPARSE_OPERATION_NON_TRANSPOSE
_HALF = 0  # CUSPARSELT_SPARSITY_50_PERCENT
# cusparseLtMatmulDescAttribute_t
_RELU, _UPPER, _GELU, _VECTOR_ALPHA, _BIAS_POINTER = 0, 1, 3, 5, 8
# cusparseLtMatmulAlgAttribute_t
_ID, _MAX_ID, _SEARCHES, _SPLIT_K, _SPLIT_MODE, _SPLIT_BUFFERS = 0, 1, 2, 3, 4, 5
_SEGMENTS, _LONG = 90, 2048  # split_k of -1, "segment k", is tried from there on
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


class SparseProduct:
    """A product that is ready to run.

    Attributes:
        product: what is computed.
        workspace_bytes: of the operand `workspace`.
        sizes: bytes that are touched of each operand, in order.
    """

    def __init__(self, product: Product, library: Library, handle: Any) -> None:
        """Makes the descriptors and the plan.

        Args:
            product: checked.
            library: cuSPARSELt.
            handle: of cuSPARSELt on this GPU.

        Raises:
            UnsupportedError: the library cannot compute it.
        """
        self.product = product
        self._library, self._handle = library, handle
        self._about = f"product: {product.to_json()}"
        self._made: list[tuple[str, Any]] = []
        self._planned = False
        self._alpha = ctypes.c_float(product.alpha)
        self._beta = ctypes.c_float(product.beta)
        try:
            self._make(ALIGNMENT if product.bias else 0)
            self.workspace_bytes = self._workspace()
            self.compressed_bytes, self.buffer_bytes = self._compressed()
        except (EngineError, UnsupportedError):
            self.close()
            raise
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
        self._start("cusparseLtMatmul", stream, addresses)

    def search(self, stream: int, addresses: tuple[int, ...], times: int = 5) -> tuple[int, ...]:
        """The library's own search among its algorithms, with the operands of a run.

        Args:
            stream: of CUDA.
            addresses: of the operands; all but y hold what is computed with.
            times: each algorithm is run so often.

        Returns:
            id, split_k, mode and buffers of the fastest.
        """
        self._set_algorithm(_SEARCHES, times)
        self._start("cusparseLtMatmulSearch", stream, addresses)
        keys = (_ID, _SPLIT_K, _SPLIT_MODE, _SPLIT_BUFFERS)
        return tuple(self._of_algorithm(key) for key in keys)

    @property
    def ids(self) -> int:
        """How many algorithms there are, numbered from 0."""
        return max(1, self._of_algorithm(_MAX_ID))

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
        self._call("cusparseLtSpMMACompress2", self._w, 1, _PLAIN, *pointers)

    def grow(self) -> None:
        """Asks for the workspace of the library's own choice of algorithm."""
        if self.workspace_bytes > self.product.workspace_bytes:
            self.product = replace(self.product, workspace_bytes=self.workspace_bytes)
            self.sizes = self.product.sizes(self.compressed_bytes)

    def close(self) -> None:
        """Frees the plan and the descriptors."""
        if self._planned:
            self._planned = False
            self._library.call("cusparseLtMatmulPlanDestroy", ctypes.byref(self._plan))
        while self._made:
            destroy, made = self._made.pop()
            self._library.call(destroy, ctypes.byref(made), about=self._about)

    def _start(self, name: str, stream: int, addresses: tuple[int, ...]) -> None:
        roles = self.product.roles
        if len(addresses) != len(roles) or any(each % ALIGNMENT for each in addresses):
            expected = f"expected {len(roles)} multiples of {ALIGNMENT}: {', '.join(roles)}"
            raise EngineError("a product has wrong operands", [expected, f"got {addresses}"])
        at = dict(zip(roles, addresses, strict=True))
        if at.get("bias", 0) != self._bias:
            self._make(at["bias"])
        vector = self.product.by_channel
        alpha = ctypes.c_void_p(at["scale"]) if vector else ctypes.byref(self._alpha)
        pointer = ctypes.c_void_p
        streams = (ctypes.c_void_p * 1)(stream)
        self._call(
            *(name, ctypes.byref(self._plan), alpha, pointer(at["w"]), pointer(at["x"])),
            *(ctypes.byref(self._beta), pointer(at.get("r", at["y"])), pointer(at["y"])),
            *(pointer(at.get("workspace")), streams, 1),
        )

    def _structured(self) -> Any:
        p = self.product
        made = _struct()
        shape = [ctypes.c_int64(each) for each in (p.n, p.k, p.k)]
        name = "cusparseLtStructuredDescriptorInit"
        self._call(name, ctypes.byref(made), *shape, ALIGNMENT, TYPES[p.x], _BY_ROWS, _HALF)
        self._made.append(("cusparseLtMatDescriptorDestroy", made))
        return ctypes.byref(made)

    def _dense(self, dtype: str, rows: int, row: int) -> Any:
        made = _struct()
        shape = [ctypes.c_int64(each) for each in (rows, self.product.m, row)]
        name = "cusparseLtDenseDescriptorInit"
        self._call(name, ctypes.byref(made), *shape, ALIGNMENT, TYPES[dtype], _BY_COLUMNS)
        self._made.append(("cusparseLtMatDescriptorDestroy", made))
        return ctypes.byref(made)

    def _make_descriptor(self) -> None:
        p = self.product
        x, y = self._dense(p.x, p.k, p.x_row), self._dense(p.y, p.n, p.y_row)
        r = y if p.r == p.y else self._dense(p.r, p.n, p.r_row or p.y_row)
        compute = _COMPUTE_32I if p.x == "int8" else _COMPUTE_32F
        made = ctypes.byref(self._matmul)
        name = "cusparseLtMatmulDescriptorInit"
        self._call(name, made, _PLAIN, _PLAIN, self._w, x, r, y, compute)
        if p.activation == "Relu":
            self._set(_RELU, ctypes.c_int(1))
            if p.upper:
                self._set(_UPPER, ctypes.c_float(p.upper))
        if p.activation == "GeluTanh":
            self._set(_GELU, ctypes.c_int(1))
        if p.by_channel:
            self._set(_VECTOR_ALPHA, ctypes.c_int(1))
        if p.bias:
            self._set(_BIAS_POINTER, ctypes.c_void_p(self._bias))

    def _make_algorithm(self) -> None:
        made = ctypes.byref(self._algorithm)
        name = "cusparseLtMatmulAlgSelectionInit"
        self._call(name, made, ctypes.byref(self._matmul), 0)
        if self._library.version >= 800:
            self._made.append(("cusparseLtMatmulAlgSelectionDestroy", self._algorithm))
        numbers = algorithm_numbers(self.product)
        if numbers and numbers[0] >= self.ids:
            what = f"{self._library.title} does not know the engine's algorithm"
            reasons = [f"it is number {numbers[0]} of {self.ids}", self._about]
            raise EngineError(what, reasons, _REBUILD)
        keys = (_ID, _SPLIT_K, _SPLIT_MODE, _SPLIT_BUFFERS)
        for key, number in zip(keys, numbers, strict=False):
            if number or key == _ID:
                self._set_algorithm(key, number)

    def _make(self, bias: int) -> None:
        """Descriptors and plan, with this address of the bias.

        All of them anew: a plan that is made of the descriptors of an earlier one ends the process.
        """
        self.close()
        self._matmul, self._algorithm, self._plan = _struct(), _struct(), _struct()
        self._bias = bias
        self._w = self._structured()
        self._make_descriptor()
        self._make_algorithm()
        matmul, algorithm = ctypes.byref(self._matmul), ctypes.byref(self._algorithm)
        self._call("cusparseLtMatmulPlanInit", ctypes.byref(self._plan), matmul, algorithm)
        self._planned = True

    def _workspace(self) -> int:
        found = ctypes.c_size_t()
        plan = ctypes.byref(self._plan)
        self._call("cusparseLtMatmulGetWorkspace", plan, ctypes.byref(found))
        return found.value

    def _compressed(self) -> tuple[int, int]:
        """Bytes of the compressed weight, and of the buffer that compressing needs."""
        sizes = (ctypes.c_size_t(), ctypes.c_size_t())
        name = "cusparseLtSpMMACompressedSize2"
        self._call(name, self._w, ctypes.byref(sizes[0]), ctypes.byref(sizes[1]))
        return sizes[0].value, sizes[1].value

    def _set(self, key: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cusparseLtMatmulDescSetAttribute"
        self._call(name, ctypes.byref(self._matmul), key, ctypes.byref(value), size)

    def _set_algorithm(self, key: int, number: int) -> None:
        value = ctypes.c_int(number)
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cusparseLtMatmulAlgSetAttribute"
        self._call(name, ctypes.byref(self._algorithm), key, ctypes.byref(value), size)

    def _of_algorithm(self, key: int) -> int:
        value = ctypes.c_int()
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cusparseLtMatmulAlgGetAttribute"
        self._call(name, ctypes.byref(self._algorithm), key, ctypes.byref(value), size)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        handle = ctypes.byref(self._handle)
        self._library.call(name, handle, *arguments, about=self._about)


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
    names = [str(number) for number in range(asked.ids)]
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
        if size <= WORKSPACE:
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
    handle = _struct()
    library.call("cusparseLtInit", ctypes.byref(handle), about=f"GPU {device}")
    return handle


def _struct() -> Any:
    """Room for one of the library's structures, at a multiple of 16 bytes."""
    room = (ctypes.c_uint8 * (STRUCT_BYTES + ALIGNMENT))()
    start = -ctypes.addressof(room) % ALIGNMENT
    return (ctypes.c_uint8 * STRUCT_BYTES).from_buffer(room, start)
