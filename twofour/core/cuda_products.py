"""A matrix product as NVIDIA's libraries compute it: the settings of a `LibraryCall`, plain data.

    v[m, n] = alpha * scale[n] * row_scale[m] * sum over k of x[m, k] * w[n, k]
              + beta * r[m, n] + bias[n]
    y[m, n] = activation(v) * y_scale, rounded to y's type and saturated

Rows of x, r and y lie `x_row`, `r_row` and `y_row` elements apart, those of w k elements. The
libraries count in columns: what they are told is y^T [n, m] = w [n, k] x^T [k, m], so that all
four are used as they lie.

The operands of a call come in the order of `Product.roles`:

    w, x, r (where beta is not 0), scale (by_channel), row_scale (by_row), r_scale (r_by_channel),
    bias (where it has a type), y_scale (scaled_result), y, workspace (where it is not empty)

scale, row_scale, r_scale and y_scale are float32. `w` is [n, k] for cuBLASLt, and what `compress`
made of it for cuSPARSELt.

Types, of x and w: of y. cuBLASLt takes
    float16: float16, float32           bfloat16: bfloat16, float32      float32: float32
    int8: int8, int32                   float8e4m3fn: float16, bfloat16, float32, float8e4m3fn
and cuSPARSELt
    float16: float16                    bfloat16: bfloat16               float32: float32
    int8: int8, int32, float16, bfloat16
    float8e4m3fn: float16, bfloat16, float32, float8e4m3fn
where the float32 one is 1:2: tensor cores round it to 10 bits of significand (TF32), and of each
two weights side by side one is 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twofour.core.cuda_program import DTYPES
from twofour.core.errors import EngineError
from twofour.core.records import from_plain, to_plain

CUBLASLT, CUSPARSELT = "cublaslt", "cusparselt"
_E4M3 = "float8e4m3fn"
_FP8 = ("float16", "bfloat16", "float32", _E4M3)
RESULTS: dict[str, dict[str, tuple[str, ...]]] = {
    CUBLASLT: {
        "float16": ("float16", "float32"),
        "bfloat16": ("bfloat16", "float32"),
        "float32": ("float32",),
        "int8": ("int8", "int32"),
        _E4M3: _FP8,
    },
    CUSPARSELT: {
        "float16": ("float16",),
        "bfloat16": ("bfloat16",),
        "float32": ("float32",),
        "int8": ("int8", "int32", "float16", "bfloat16"),
        _E4M3: _FP8,
    },
}
"""What y may be for each type of x and w."""
SPARSE_MULTIPLE = {"float16": 16, "bfloat16": 16, "int8": 32, _E4M3: 32, "float32": 8}
"""cuSPARSELt: n and k are multiples of it."""
DENSE_MULTIPLE = {"float16": 8, "bfloat16": 8, "int8": 16, _E4M3: 16, "float32": 4, "int32": 4}
"""cuSPARSELt: m and the distances of rows are multiples of it, for the type of each matrix."""
ACTIVATIONS = {CUBLASLT: ("", "Relu", "GeluTanh"), CUSPARSELT: ("", "Relu")}
LARGEST = 2**31 - 1
WORKSPACE = {CUBLASLT: 32 * 2**20, CUSPARSELT: 512 * 2**20}
"""Bytes that an algorithm may ask for at most; cuSPARSELt orders n * k / 8 of them in each run."""
_LARGEST_BYTES = 2**42
_LARGEST_FACTOR = 1e30
_REBUILD = "build the engine again: twofour build MODEL.onnx -o E.engine --target cuda"


@dataclass(frozen=True)
class Product:
    """One product, see the module's text.

    Attributes:
        m: rows of x and y.
        n: rows of w, columns of y.
        k: columns of x and w.
        x: type of x and w.
        y: type of y.
        x_row: elements from one row of x to the next.
        y_row: elements from one row of y to the next.
        r_row: elements from one row of r to the next; 0 where there is none.
        alpha: factor of all sums.
        beta: factor of r; 0 where there is none.
        by_channel: sums are multiplied by scale[n].
        by_row: sums are multiplied by row_scale[m], of fp8 by cuBLASLt; only with `by_channel`.
        r_by_channel: r is multiplied by r_scale[n] instead of beta, which then only says that there
            is one: cuSPARSELt has either both factors as vectors or none.
        bias: type of the bias, "" for none.
        activation: one of ACTIVATIONS of the library.
        upper: greatest result of "Relu", 0 for none; cuSPARSELt alone bounds it.
        scaled_result: y is multiplied by y_scale, which is one number; fp8 by cuBLASLt.
        fast: fp8 sums are kept in fewer bits, float32 is rounded to TF32; cuBLASLt.
        workspace_bytes: of the operand `workspace`.
        algorithm: how it is computed. cuBLASLt: the 64 bytes of its own description, as hex.
            cuSPARSELt: "id", or "id/split_k/mode/buffers". "" leaves it to the library.
        version: of the library that the algorithm is of; 0 for any.
    """

    m: int
    n: int
    k: int
    x: str
    y: str
    x_row: int
    y_row: int
    r_row: int = 0
    alpha: float = 1.0
    beta: float = 0.0
    by_channel: bool = False
    by_row: bool = False
    r_by_channel: bool = False
    bias: str = ""
    activation: str = ""
    upper: float = 0.0
    scaled_result: bool = False
    fast: bool = False
    workspace_bytes: int = 0
    algorithm: str = ""
    version: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the operands, in order."""
        there = {
            "w": True,
            "x": True,
            "r": self.beta != 0,
            "scale": self.by_channel,
            "row_scale": self.by_row,
            "r_scale": self.r_by_channel,
            "bias": bool(self.bias),
            "y_scale": self.scaled_result,
            "y": True,
            "workspace": self.workspace_bytes > 0,
        }
        return tuple(role for role, is_there in there.items() if is_there)

    @property
    def r(self) -> str:
        """Type of r: y's own, but bfloat16 beside a y of fp8."""
        return "bfloat16" if self.y == _E4M3 else self.y

    def sizes(self, w_bytes: int) -> tuple[int, ...]:
        """Bytes that the call touches of each operand, in the order of `roles`.

        Args:
            w_bytes: of the weight as the library takes it.
        """
        sizes = {
            "w": w_bytes,
            "x": _matrix_bytes(self.m, self.k, self.x_row, self.x),
            "r": _matrix_bytes(self.m, self.n, self.r_row, self.r),
            "scale": 4 * self.n,
            "row_scale": 4 * self.m,
            "r_scale": 4 * self.n,
            "bias": self.n * DTYPES.get(self.bias, 0),
            "y_scale": 4,
            "y": _matrix_bytes(self.m, self.n, self.y_row, self.y),
            "workspace": self.workspace_bytes,
        }
        return tuple(sizes[role] for role in self.roles)

    def to_json(self) -> str:
        """The settings of a `LibraryCall`."""
        return json.dumps(to_plain(self), separators=(",", ":"))

    def wrong(self, library: str) -> Iterator[str]:
        """What the library, or no library, can be asked for."""
        for name in ("m", "n", "k", "x_row", "y_row"):
            if not 1 <= getattr(self, name) <= LARGEST:
                yield f"{name} is {getattr(self, name)}; expected 1 to {LARGEST}"
        if self.y not in RESULTS[library].get(self.x, ()):
            yield f"no product of {self.x} gives {self.y}"
            return
        yield from self._wrong_rows()
        yield from self._wrong_epilogue(library)
        yield from self._wrong_scales(library)
        if library == CUSPARSELT:
            yield from self._wrong_multiples()
        yield from self._wrong_algorithm(library)

    def _wrong_rows(self) -> Iterator[str]:
        if self.x_row < self.k or self.y_row < self.n:
            yield f"rows overlap: x_row {self.x_row} for k {self.k}, y_row {self.y_row}, n {self.n}"
        if (self.beta != 0) != (self.r_row != 0) or (self.r_row and self.r_row < self.n):
            yield f"r_row is {self.r_row} where beta is {self.beta} and n {self.n}"
        if not 0 <= self.r_row <= LARGEST:
            yield f"r_row is {self.r_row}"
        largest = max(self.sizes(DTYPES[self.x] * self.n * self.k))
        if largest > _LARGEST_BYTES:
            yield f"an operand has {largest} bytes; expected at most {_LARGEST_BYTES}"

    def _wrong_epilogue(self, library: str) -> Iterator[str]:
        dense = library == CUBLASLT
        for name in ("alpha", "beta", "upper"):
            if abs(getattr(self, name)) > _LARGEST_FACTOR:
                yield f"{name} is {getattr(self, name)}"
        if self.activation not in ACTIVATIONS[library]:
            known = ACTIVATIONS[library]
            yield f"no activation {self.activation!r} of {library}; expected one of {known}"
        if self.upper and (dense or self.activation != "Relu" or self.upper < 0):
            yield f"upper is {self.upper} of {library}'s {self.activation or 'no activation'}"
        if self.bias and self.bias not in DTYPES:
            yield f"no type {self.bias!r} of a bias"
        if self.y == "int32" and (self.bias or self.beta or self.by_channel or self.activation):
            yield "sums of int32 are stored as such"

    def _wrong_scales(self, library: str) -> Iterator[str]:
        dense = library == CUBLASLT
        if self.by_row and not (self.by_channel and self.x == _E4M3 and dense):
            yield "row_scale is for fp8 by cuBLASLt, beside scale"
        if self.by_channel and self.x != "int8" and not self.by_row:
            yield f"scale is for int8, or for fp8 beside row_scale; x is {self.x}"
        if self.scaled_result and not (self.y == _E4M3 and dense):
            yield "y_scale is for an fp8 y of cuBLASLt"
        vectors = self.by_channel and self.beta != 0 and not dense
        if self.r_by_channel != vectors:
            yield "r_scale is for cuSPARSELt, where there are scale and r; there it has to be"

    def _wrong_multiples(self) -> Iterator[str]:
        sparse, of_x, of_y = SPARSE_MULTIPLE[self.x], DENSE_MULTIPLE[self.x], DENSE_MULTIPLE[self.y]
        expected = {"n": sparse, "k": sparse, "m": max(of_x, of_y), "x_row": of_x, "y_row": of_y}
        if self.r_row:
            expected["r_row"] = DENSE_MULTIPLE[self.r]
        for name, multiple in expected.items():
            if getattr(self, name) % multiple:
                yield f"{name} is {getattr(self, name)}; expected a multiple of {multiple}"
        if self.r_row and self.r_row != self.y_row:
            yield f"r_row is {self.r_row}; expected that of y, {self.y_row}"

    def _wrong_algorithm(self, library: str) -> Iterator[str]:
        if not 0 <= self.workspace_bytes <= WORKSPACE[library]:
            yield f"workspace_bytes is {self.workspace_bytes}; expected 0 to {WORKSPACE[library]}"
        if self.version < 0:
            yield f"version is {self.version}"
        if self.algorithm and not self.version:
            yield "an algorithm without the version of its library"
        try:
            _ = algorithm_bytes(self) if library == CUBLASLT else algorithm_numbers(self)
        except ValueError as error:
            yield f"algorithm is {self.algorithm[:140]!r}: {error}"


def algorithm_bytes(product: Product) -> bytes:
    """CuBLASLt's own description of the algorithm, 64 bytes; none where it is left to the library.

    Raises:
        ValueError: it is no hex, or not as long.
    """
    found = bytes.fromhex(product.algorithm)
    if len(found) not in (0, 64):
        raise ValueError(f"expected 64 bytes, got {len(found)}")
    return found


def algorithm_numbers(product: Product) -> tuple[int, ...]:
    """CuSPARSELt's algorithm: (), (id,) or (id, split_k, mode, buffers).

    Raises:
        ValueError: it is no such numbers.
    """
    if not product.algorithm:
        return ()
    parts = product.algorithm.split("/")
    digits = all(part.removeprefix("-").isdecimal() and len(part) <= 6 for part in parts)
    if len(parts) not in (1, 4) or not digits:
        raise ValueError("expected id, or id/split_k/mode/buffers")
    numbers = tuple(map(int, parts))
    most = (2**15, 2**10, 16, 2**10)
    least = (0, -1, 0, 0)
    if any(not a <= number <= b for a, number, b in zip(least, numbers, most, strict=False)):
        raise ValueError(f"expected no more than {most}")
    return numbers


def read_product(settings: str, library: str) -> Product:
    """The product that an engine's settings are, every number checked.

    Args:
        settings: JSON, what `Product.to_json` gave.
        library: "cublaslt" or "cusparselt".

    Raises:
        EngineError: it is none, or none that the library can compute; with all reasons.
    """
    what = f"the engine's settings of a call of {library} are malformed"
    try:
        product: Product = from_plain(Product, _loaded(settings), "settings")
    except (ValueError, RecursionError) as error:
        raise EngineError(what, [str(error)], _REBUILD) from error
    if reasons := list(product.wrong(library)):
        raise EngineError(what, [*reasons, f"settings: {settings[:400]}"], _REBUILD)
    return product


def _loaded(settings: str) -> Any:
    if len(settings) > 4096:
        raise ValueError(f"settings of {len(settings)} characters")
    return json.loads(settings)


def _matrix_bytes(rows: int, columns: int, row: int, dtype: str) -> int:
    """From the first element to the last."""
    return max(0, (rows - 1) * row + columns) * DTYPES[dtype]
