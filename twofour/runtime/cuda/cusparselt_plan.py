"""One plan of cuSPARSELt: descriptors, algorithm, and what follows from them.

The library ties all of a plan's parts together: none may change, or be used for a second plan, once
there is one. So a product with another address of its bias is another `SparsePlan`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from twofour.core.cuda_products import Product, algorithm_numbers
from twofour.core.errors import EngineError, UnsupportedError
from twofour.runtime.cuda.libraries import ALIGNMENT, TYPES, Library

STRUCT_BYTES = 16384
"""Room for each of the library's structures: 512 bytes in 0.8, 11024 in some before."""
PLAIN = 0  # CUSPARSE_OPERATION_NON_TRANSPOSE
_COMPUTE_32I, _COMPUTE_32F = 0, 2
_BY_COLUMNS, _BY_ROWS = 1, 2  # cusparseOrder_t
_HALF = 0  # CUSPARSELT_SPARSITY_50_PERCENT
# cusparseLtMatmulDescAttribute_t
_RELU, _UPPER, _VECTOR_ALPHA, _VECTOR_BETA, _BIAS_POINTER = 0, 1, 5, 6, 8
# cusparseLtMatmulAlgAttribute_t
_ID, _MAX_ID, _SPLIT_K, _SPLIT_MODE, _SPLIT_BUFFERS = 0, 1, 3, 4, 5
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


class SparsePlan:
    """A plan and all that it is made of.

    Attributes:
        plan: by reference, for the library's functions.
        w: descriptor of the weight, likewise.
        workspace_bytes: that a run needs.
        compressed_bytes: of the weight.
        buffer_bytes: that compressing the weight needs.
        ids: how many algorithms there are, numbered from 0.
    """

    def __init__(self, product: Product, library: Library, handle: Any, bias: int) -> None:
        """Makes it.

        Args:
            product: checked.
            library: cuSPARSELt.
            handle: of cuSPARSELt on this GPU.
            bias: address of the bias; any multiple of 16 where nothing will run.

        Raises:
            EngineError: the library has no such algorithm.
            UnsupportedError: the library cannot compute the product.
        """
        self._product, self._library, self._handle = product, library, handle
        self._about = f"product: {product.to_json()}"
        self._made: list[tuple[str, Any]] = []
        matmul, algorithm, plan = struct(), struct(), struct()
        self._matmul, self._algorithm = ctypes.byref(matmul), ctypes.byref(algorithm)
        self.plan = ctypes.byref(plan)
        try:
            self.w = self._structured()
            self._describe(bias)
            self._choose(algorithm)
            self.call("cusparseLtMatmulPlanInit", self.plan, self._matmul, self._algorithm)
            self._made.append(("cusparseLtMatmulPlanDestroy", plan))
            self.workspace_bytes = self._size("cusparseLtMatmulGetWorkspace", self.plan)[0]
            name = "cusparseLtSpMMACompressedSize2"
            self.compressed_bytes, self.buffer_bytes = self._size(name, self.w, 2)
        except (EngineError, UnsupportedError):
            self.close()
            raise

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function with the handle.

        Raises:
            UnsupportedError: it refuses.
        """
        handle = ctypes.byref(self._handle)
        self._library.call(name, handle, *arguments, about=self._about)

    def close(self) -> None:
        """Frees all of it, the plan first."""
        while self._made:
            destroy, made = self._made.pop()
            self._library.call(destroy, ctypes.byref(made), about=self._about)

    def _structured(self) -> Any:
        p = self._product
        made = struct()
        shape = [ctypes.c_int64(each) for each in (p.n, p.k, p.k)]
        name = "cusparseLtStructuredDescriptorInit"
        self.call(name, ctypes.byref(made), *shape, ALIGNMENT, TYPES[p.x], _BY_ROWS, _HALF)
        self._made.append(("cusparseLtMatDescriptorDestroy", made))
        return ctypes.byref(made)

    def _dense(self, dtype: str, rows: int, row: int) -> Any:
        made = struct()
        shape = [ctypes.c_int64(each) for each in (rows, self._product.m, row)]
        name = "cusparseLtDenseDescriptorInit"
        self.call(name, ctypes.byref(made), *shape, ALIGNMENT, TYPES[dtype], _BY_COLUMNS)
        self._made.append(("cusparseLtMatDescriptorDestroy", made))
        return ctypes.byref(made)

    def _describe(self, bias: int) -> None:
        p = self._product
        x, y = self._dense(p.x, p.k, p.x_row), self._dense(p.y, p.n, p.y_row)
        r = y if p.r == p.y else self._dense(p.r, p.n, p.r_row or p.y_row)
        compute = _COMPUTE_32I if p.x == "int8" else _COMPUTE_32F
        name = "cusparseLtMatmulDescriptorInit"
        self.call(name, self._matmul, PLAIN, PLAIN, self.w, x, r, y, compute)
        if p.activation == "Relu":
            self._set(_RELU, ctypes.c_int(1))
            if p.upper:
                self._set(_UPPER, ctypes.c_float(p.upper))
        if p.by_channel:
            self._set(_VECTOR_ALPHA, ctypes.c_int(1))
        if p.r_by_channel:
            self._set(_VECTOR_BETA, ctypes.c_int(1))
        if p.bias:
            self._set(_BIAS_POINTER, ctypes.c_void_p(bias))

    def _choose(self, algorithm: Any) -> None:
        self.call("cusparseLtMatmulAlgSelectionInit", self._algorithm, self._matmul, 0)
        if self._library.version >= 800:
            self._made.append(("cusparseLtMatmulAlgSelectionDestroy", algorithm))
        count = ctypes.c_int()
        size = ctypes.c_size_t(ctypes.sizeof(count))
        name = "cusparseLtMatmulAlgGetAttribute"
        self.call(name, self._algorithm, _MAX_ID, ctypes.byref(count), size)
        self.ids = max(1, count.value)
        numbers = algorithm_numbers(self._product)
        if numbers and numbers[0] >= self.ids:
            what = f"{self._library.title} does not know the engine's algorithm"
            reasons = [f"it is number {numbers[0]} of {self.ids}", self._about]
            raise EngineError(what, reasons, _REBUILD)
        for key, number in zip((_ID, _SPLIT_K, _SPLIT_MODE, _SPLIT_BUFFERS), numbers, strict=False):
            if number or key == _ID:
                value = ctypes.c_int(number)
                name = "cusparseLtMatmulAlgSetAttribute"
                self.call(name, self._algorithm, key, ctypes.byref(value), size)

    def _set(self, key: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cusparseLtMatmulDescSetAttribute"
        self.call(name, self._matmul, key, ctypes.byref(value), size)

    def _size(self, name: str, what: Any, count: int = 1) -> tuple[int, ...]:
        """The sizes that a function tells."""
        found = [ctypes.c_size_t() for _ in range(count)]
        self.call(name, what, *map(ctypes.byref, found))
        return tuple(each.value for each in found)


def struct() -> Any:
    """Room for one of the library's structures, at a multiple of 16 bytes."""
    room = (ctypes.c_uint8 * (STRUCT_BYTES + ALIGNMENT))()
    start = -ctypes.addressof(room) % ALIGNMENT
    return (ctypes.c_uint8 * STRUCT_BYTES).from_buffer(room, start)
