"""Matrix products by cuBLASLt; what is computed is told by core/cuda_products.py.

    product = prepare(settings, 90)
    product.run(stream, addresses)

cuBLASLt counts in columns: it is asked for y^T [n, m] = (w^T)^T [n, k] x^T [k, m], each matrix with
its rows as columns. All descriptors are made in `prepare`; a run sets the addresses of the vectors
and starts the kernels, which a CUDA graph may record. The first run loads the kernels' code: let
it happen before a graph is recorded.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twofour.core.cuda_products import (
    CUBLASLT,
    WORKSPACE,
    Product,
    algorithm_bytes,
    read_product,
)
from twofour.core.cuda_program import DTYPES
from twofour.core.errors import EngineError, UnsupportedError
from twofour.runtime.cuda.libraries import ALIGNMENT, TYPES, Library, cublaslt

_COMPUTE_32F, _COMPUTE_TF32, _COMPUTE_32I = 68, 77, 72
_TRANSPOSED, _PLAIN = 1, 0
_EPILOGUES = {"": 1, "Relu": 2, "GeluTanh": 32}
_BIAS = 4
_VECTOR_ALPHA = 4  # CUBLASLT_POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_HOST
_OUTER_VECTOR = 3  # CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
# cublasLtMatmulDescAttributes_t
_POINTER_MODE, _TRANS_A, _TRANS_B, _EPILOGUE, _BIAS_POINTER = 2, 3, 4, 7, 8
_A_SCALE, _B_SCALE, _D_SCALE, _FAST, _BIAS_TYPE = 17, 18, 20, 25, 26
_A_SCALE_MODE, _B_SCALE_MODE = 31, 32
# cublasLtMatmulPreferenceAttributes_t
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)
_UNSUPPORTED = (7, 15)  # CUBLAS_STATUS_INVALID_VALUE, _NOT_SUPPORTED
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasProduct:
    """A product that is ready to run.

    Attributes:
        product: what is computed.
        workspace_bytes: of the operand `workspace`.
        sizes: bytes that are touched of each operand, in order.
    """

    def __init__(self, product: Product, library: Library, handle: ctypes.c_void_p) -> None:
        """Makes the descriptors.

        Args:
            product: checked.
            library: cuBLASLt.
            handle: of cuBLASLt on this GPU.

        Raises:
            UnsupportedError: the library cannot compute it.
        """
        self.product = product
        self._library, self._handle = library, handle
        self._about = f"product: {product.to_json()}"
        self._made: list[tuple[str, ctypes.c_void_p]] = []
        self._descriptor = ctypes.c_void_p()
        ints = product.y == "int32"
        self._beta = ctypes.c_int32(0) if ints else ctypes.c_float(product.beta)
        self._alpha = ctypes.c_int32(1) if ints else ctypes.c_float(product.alpha)
        self._algorithm: Any = None
        self.workspace_bytes = product.workspace_bytes
        self.sizes = product.sizes(DTYPES[product.x] * product.n * product.k)
        try:
            self._make_descriptor()
            self._w, self._x, self._r, self._y = self._layouts()
        except UnsupportedError:
            self.close()
            raise

    def choose(self, algorithm: bytes) -> None:
        """Takes an algorithm, or the library's first choice where it is b"".

        Raises:
            EngineError: the algorithm does not fit the product or its workspace.
            UnsupportedError: the library has no algorithm for the product.
        """
        if not algorithm:
            found = self.heuristics(1)
            if not found:
                raise UnsupportedError(
                    f"{self._library.title} has no algorithm for a product", [self._about]
                )
            self._algorithm = found[0].algo
            self.workspace_bytes = int(found[0].workspace_bytes)
            grown = replace(self.product, workspace_bytes=self.workspace_bytes)
            self.product, self.sizes = grown, grown.sizes(self.sizes[0])
            return
        self._algorithm = (ctypes.c_uint64 * 8)(*struct.unpack("<8Q", algorithm))
        result = Heuristic()
        layouts = (self._w, self._x, self._r, self._y)
        status = self._library.status(
            "cublasLtMatmulAlgoCheck",
            *(self._handle, self._descriptor, *layouts),
            *(ctypes.byref(self._algorithm), ctypes.byref(result)),
        )
        needed = int(result.workspace_bytes)
        if status or needed > self.product.workspace_bytes:
            why = f"status {status}: {self._library.status_text(status)}, workspace {needed}"
            what = f"{self._library.title} does not know the engine's algorithm"
            raise EngineError(what, [why, self._about], _REBUILD)

    def heuristics(self, most: int) -> list[Heuristic]:
        """The library's algorithms for the product, the fastest first by its own estimate.

        Args:
            most: how many are asked for.
        """
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            largest = ctypes.c_uint64(WORKSPACE[CUBLASLT])
            settings = {_MAX_WORKSPACE: largest} | dict.fromkeys(
                _ALIGNMENTS, ctypes.c_uint32(ALIGNMENT)
            )
            for key, value in settings.items():
                size = ctypes.c_size_t(ctypes.sizeof(value))
                name = "cublasLtMatmulPreferenceSetAttribute"
                self._call(name, preference, key, ctypes.byref(value), size)
            return self._asked(preference, most)
        finally:
            self._call("cublasLtMatmulPreferenceDestroy", preference)

    def _asked(self, preference: ctypes.c_void_p, most: int) -> list[Heuristic]:
        found, count = (Heuristic * most)(), ctypes.c_int()
        layouts = (self._w, self._x, self._r, self._y)
        name = "cublasLtMatmulAlgoGetHeuristic"
        status = self._library.status(
            *(name, self._handle, self._descriptor, *layouts, preference),
            *(most, found, ctypes.byref(count)),
        )
        if status in _UNSUPPORTED:
            return []
        if status:
            why = f"status {status}: {self._library.status_text(status)}"
            raise UnsupportedError(f"{self._library.title} refuses {name}", [why, self._about])
        return [each for each in found[: max(0, min(most, count.value))] if not each.state]

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
        vectors = {_A_SCALE: "scale" * self.product.by_row, _B_SCALE: "row_scale"}
        vectors |= {_BIAS_POINTER: "bias", _D_SCALE: "y_scale"}
        for key, role in vectors.items():
            if role in at:
                self._set(key, ctypes.c_void_p(at[role]))
        vector = self.product.by_channel and not self.product.by_row
        alpha = ctypes.c_void_p(at["scale"]) if vector else ctypes.byref(self._alpha)
        unread = at["y"] if self.product.r == self.product.y else None
        pointer = ctypes.c_void_p
        self._call(
            "cublasLtMatmul",
            *(self._handle, self._descriptor, alpha),
            *(pointer(at["w"]), self._w, pointer(at["x"]), self._x),
            *(ctypes.byref(self._beta), pointer(at.get("r", unread)), self._r),
            *(pointer(at["y"]), self._y, ctypes.byref(self._algorithm)),
            *(pointer(at.get("workspace")), ctypes.c_size_t(self.workspace_bytes)),
            pointer(stream),
        )

    def close(self) -> None:
        """Frees the descriptors."""
        while self._made:
            destroy, made = self._made.pop()
            self._call(destroy, made)

    def _layouts(self) -> tuple[ctypes.c_void_p, ...]:
        """Of w, x, r and y."""
        p = self.product
        w = self._layout(p.x, p.k, p.n, p.k)
        x = self._layout(p.x, p.k, p.m, p.x_row)
        y = self._layout(p.y, p.n, p.m, p.y_row)
        same = p.r == p.y and p.r_row in (0, p.y_row)
        r = y if same else self._layout(p.r, p.n, p.m, p.r_row or p.y_row)
        return w, x, r, y

    def _make_descriptor(self) -> None:
        product = self.product
        compute, scale = _COMPUTE_32F, TYPES["float32"]
        if product.x == "int8":
            compute = _COMPUTE_32I
            scale = TYPES["int32" if product.y == "int32" else "float32"]
        elif product.x == "float32" and product.fast:
            compute = _COMPUTE_TF32
        made = self._descriptor
        self._call("cublasLtMatmulDescCreate", ctypes.byref(made), compute, scale)
        self._made.append(("cublasLtMatmulDescDestroy", made))
        self._set(_TRANS_A, ctypes.c_int32(_TRANSPOSED))
        self._set(_TRANS_B, ctypes.c_int32(_PLAIN))
        epilogue = _EPILOGUES[product.activation] & ~(1 if product.bias else 0)
        self._set(_EPILOGUE, ctypes.c_uint32(epilogue | (_BIAS if product.bias else 0)))
        if product.bias:
            self._set(_BIAS_TYPE, ctypes.c_int32(TYPES[product.bias]))
            self._set(_BIAS_POINTER, ctypes.c_void_p(ALIGNMENT))  # asked of its alignment alone
        if product.by_row:
            self._set(_A_SCALE_MODE, ctypes.c_int32(_OUTER_VECTOR))
            self._set(_B_SCALE_MODE, ctypes.c_int32(_OUTER_VECTOR))
            self._set(_A_SCALE, ctypes.c_void_p(ALIGNMENT))
            self._set(_B_SCALE, ctypes.c_void_p(ALIGNMENT))
        elif product.by_channel:
            self._set(_POINTER_MODE, ctypes.c_int32(_VECTOR_ALPHA))
        if product.scaled_result:
            self._set(_D_SCALE, ctypes.c_void_p(ALIGNMENT))
        if product.fast and product.x == "float8e4m3fn":
            self._set(_FAST, ctypes.c_int8(1))

    def _layout(self, dtype: str, rows: int, columns: int, row: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        shape = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(row))
        self._call("cublasLtMatrixLayoutCreate", ctypes.byref(made), TYPES[dtype], *shape)
        self._made.append(("cublasLtMatrixLayoutDestroy", made))
        return made

    def _set(self, key: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        name = "cublasLtMatmulDescSetAttribute"
        self._call(name, self._descriptor, key, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        self._library.call(name, *arguments, about=self._about)


def prepare(
    settings: str,
    capability: int,
    device: int = 0,
    get: Callable[[], Library] = cublaslt,
) -> CublasProduct:
    """A product, ready to run on the current GPU.

    Args:
        settings: of a `LibraryCall`.
        capability: of the GPU, 90 for 9.0.
        device: the number of the current GPU: each has a handle of its own.
        get: gives the library.

    Raises:
        EngineError: the settings are malformed, or of another version of the library.
        UnsupportedError: there is no cuBLASLt, or it cannot compute the product.
    """
    product = read_product(settings, CUBLASLT)
    library = get()
    if product.x == "float8e4m3fn" and capability < 89:
        what = f"no products of float8 on a GPU of compute capability {capability / 10}"
        raise UnsupportedError(what, ["expected 8.9 or higher"], "build with --int8 or --fp16")
    if product.version not in (0, library.version):
        reasons = [f"expected version {product.version}, this is {library.title}", library.path]
        raise EngineError("the engine's algorithms are of another cuBLASLt", reasons, _REBUILD)
    made = CublasProduct(product, library, _handle(library, device))
    try:
        made.choose(algorithm_bytes(product))
    except (EngineError, UnsupportedError):
        made.close()
        raise
    return made


def algorithms(product: Product, capability: int, most: int, device: int = 0) -> list[Product]:
    """The same product by each algorithm that the library proposes, its first choice first.

    Args:
        product: without an algorithm.
        capability: of the GPU.
        most: how many at most.
        device: the number of the current GPU.

    Raises:
        UnsupportedError: there is no cuBLASLt.
    """
    library = cublaslt()
    if list(product.wrong(CUBLASLT)) or (product.x == "float8e4m3fn" and capability < 89):
        return []
    asked = CublasProduct(product, library, _handle(library, device))
    try:
        return [
            replace(
                product,
                algorithm=bytes(found.algo).hex(),
                workspace_bytes=int(found.workspace_bytes),
                version=library.version,
            )
            for found in asked.heuristics(most)
        ]
    finally:
        asked.close()


@functools.cache
def _handle(library: Library, device: int) -> ctypes.c_void_p:
    """One a GPU, for the life of the process; threads may share it."""
    handle = ctypes.c_void_p()
    library.call("cublasLtCreate", ctypes.byref(handle), about=f"GPU {device}")
    return handle
