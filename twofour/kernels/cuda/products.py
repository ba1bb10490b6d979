"""What NVIDIA's libraries can do of a problem: the product, and as much behind it as they have.

Two ways, both tried where they exist:

    direct   the library does the whole `Finish` and writes y: scale, bias, residual, bounds
    sums     it writes its sums to scratch memory, and the kernel of finish.py makes y of them

The libraries round where the definition does not: a bias of theirs is float16 or bfloat16 where y
is; scale and y_factor are one factor. That is at most half a last place of y more, which is what
the comparison with the definition has to allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from twofour.core.bfloat16 import to_bf16
from twofour.core.cuda_products import CUBLASLT, Product
from twofour.core.float8 import LARGEST, to_fp8
from twofour.kernels.cuda.finish import finish_call, finish_constants, numbers_of
from twofour.kernels.cuda.kernel import Array, Kernel, LibraryKernel, Recipe
from twofour.kernels.cuda.problem import ConvProblem

_ENDS = {"int8": (-128.0, 127.0), "float8e4m3fn": (-LARGEST, LARGEST)}
_REAL = (-np.inf, np.inf)
_FP8 = "float8e4m3fn"
_ITEMS = {"float16": np.float16, "bfloat16": np.uint16, _FP8: np.uint8, "float32": np.float32}


@dataclass(frozen=True)
class Offer:
    """A call of a library with what it reads and writes.

    Attributes:
        product: what is computed.
        constants: role -> array of those that the library reads; "w" is the matrix [N, K].
        after: the kernel that finishes sums, or None.
        scratch: role -> bytes.
        config: the way, in words.
    """

    product: Product
    constants: Mapping[str, Array]
    after: Kernel | None
    scratch: Mapping[str, int]
    config: str

    def recipe(self, library: str, tactic: str, before: Kernel | None = None) -> Recipe:
        """The recipe, by the library's own choice of algorithm.

        Args:
            library: "cublaslt" or "cusparselt".
            tactic: its name.
            before: the kernel that writes the role "cols", which is then read for x.
        """
        names = {"x": "cols"} if before is not None else {}
        names |= {"y": "sums"} if self.after is not None else {}
        roles = tuple(names.get(role, role) for role in self.product.roles)
        call = LibraryKernel(library, self.product.to_json(), roles)
        calls = tuple(each for each in (before, call, self.after) if each is not None)
        return Recipe(tactic, self.config, calls, self.constants, self.scratch)


def bits_of(values: Array, dtype: str) -> Array:
    """An array as the bits of a type; one that has them already is left as it is.

    Args:
        values: int8 for int8; for a real type float32, or its bits already.
        dtype: of the elements.

    Returns:
        int8, float16, uint16 (bfloat16), uint8 (float8e4m3fn) or float32, the shape of `values`.
    """
    if dtype == "int8" or values.dtype == _ITEMS[dtype]:
        return values
    if dtype == "bfloat16":
        return to_bf16(values)
    return to_fp8(values) if dtype == _FP8 else values.astype(_ITEMS[dtype])


def plain_product(problem: ConvProblem, y: str, y_row: int) -> Product:
    """The sums alone, of a problem that is a matrix product."""
    return Product(
        m=problem.rows,
        n=problem.out_channels,
        k=problem.k,
        x=problem.x.dtype,
        y=y,
        x_row=problem.x.pixel,
        y_row=y_row,
    )


def summed(
    problem: ConvProblem, constants: Mapping[str, Array], product: Product, dtype: str
) -> Offer:
    """The product's sums in scratch memory, and the kernel that finishes them.

    Args:
        problem: the convolution or product.
        constants: of it.
        product: rows, columns and types; its rows may be more than those of y.
        dtype: of the sums.
    """
    sums = replace(product, y=dtype, y_row=product.n)
    size = sums.sizes(0)[sums.roles.index("y")]
    after = finish_call(problem, dtype, biased="bias" in constants)
    held = finish_constants(problem, constants)
    return Offer(sums, held, after, {"sums": size}, f"{dtype} sums, finished by a kernel")


def scaled_sums(
    problem: ConvProblem, constants: Mapping[str, Array], product: Product
) -> Offer | None:
    """As `summed`, but scale and bias are the library's, so that float16 holds what is left to do.

    Half the bytes of int32 go to memory and back. Values beyond 65504 become infinite, which the
    bounds of a quantized y make its ends of. None where rows have scales.

    Args:
        problem: the convolution or product, of int8.
        constants: of it.
        product: rows, columns and types; its rows may be more than those of y.
    """
    how = problem.finish
    if problem.x.dtype != "int8" or not how.scaled or how.by_rows:
        return None
    wanted = replace(product, y="float16", y_row=product.n, by_channel=True)
    held: dict[str, Array] = {"scale": np.asarray(constants["scale"], np.float32).reshape(-1)}
    if "bias" in constants:
        wanted = replace(wanted, bias="float16")
        bias = np.asarray(constants["bias"], np.float32).reshape(-1)
        held["bias"] = _with_room(np.clip(bias, -65504, 65504).astype(np.float16))
    left = replace(problem, finish=replace(how, scaled=False))
    after = finish_call(left, "float16", biased=False)
    held |= finish_constants(left, {})
    size = wanted.sizes(0)[wanted.roles.index("y")]
    return Offer(wanted, held, after, {"sums": size}, "float16 sums and bias, finished by a kernel")


def direct(
    problem: ConvProblem, constants: Mapping[str, Array], product: Product, library: str
) -> Offer | None:
    """The whole problem by the library, or None where its epilogue cannot do the Finish.

    Args:
        problem: a matrix product, or a convolution whose windows lie side by side already.
        constants: "scale" [N], "bias" [N].
        product: rows, columns and types.
        library: "cublaslt" or "cusparselt".
    """
    how, dense = problem.finish, library == CUBLASLT
    numbers = numbers_of(how, problem.y.dtype)
    residual_scale, factor, low, high, zero, _ = (float(number) for number in numbers)
    ends = _ENDS.get(problem.y.dtype, _REAL)
    clamp = _clamp((low, high), (ends[0] - zero, ends[1] - zero), zero)
    smooth = "" if how.activation.clamps else how.activation.name
    if clamp is None or (smooth and (clamp[0] or smooth != "GeluTanh" or not dense)):
        return None
    if smooth and (factor != 1 or zero or problem.y.dtype == "int8"):
        return None
    if dense and clamp[1]:
        return None
    wanted = replace(product, activation=smooth or clamp[0], upper=clamp[1])
    if problem.r is not None:
        if how.add_last or problem.r.dtype != wanted.r or (not dense and _FP8 in (wanted.y,)):
            return None
        beta = residual_scale * factor
        wanted = replace(wanted, beta=beta, r_row=problem.r.pixel)
    scaled = _scaled(problem, constants, wanted, factor)
    if scaled is None:
        return None
    wanted, held = scaled
    if wanted.beta and wanted.by_channel and not dense:
        wanted = replace(wanted, r_by_channel=True)
        held["r_scale"] = np.full(wanted.n, wanted.beta, np.float32)
    if "bias" in constants or zero:
        bias = np.zeros(product.n, np.float32)
        if "bias" in constants:
            bias = np.asarray(constants["bias"], np.float32).reshape(-1) * np.float32(factor)
        wanted = replace(wanted, bias=bias_type(wanted, library))
        held["bias"] = _with_room(bits_of(bias + np.float32(zero), wanted.bias))
    words = "by the library" + (f", {wanted.activation}" if wanted.activation else "")
    return Offer(wanted, held, None, {}, f"{wanted.y} {words}")


def _scaled(
    problem: ConvProblem, constants: Mapping[str, Array], product: Product, factor: float
) -> tuple[Product, dict[str, Array]] | None:
    """The product with its scales, and the vectors that they are; None where there is no way."""
    how = problem.finish
    scale = np.full(product.n, factor, np.float32)
    if how.scaled:
        scale = np.asarray(constants["scale"], np.float32).reshape(-1) * np.float32(factor)
    even = bool((scale == scale[0]).all())
    if how.by_rows:
        if product.x != _FP8:
            return None
        return replace(product, by_channel=True, by_row=True), {"scale": scale}
    if even:
        return replace(product, alpha=float(scale[0])), {}
    if product.x == "int8":
        return replace(product, by_channel=True), {"scale": scale}
    if product.x == _FP8:
        ones = np.ones(product.m, np.float32)
        return replace(product, by_channel=True, by_row=True), {"scale": scale, "row_scale": ones}
    return None


def _clamp(
    bounds: tuple[float, float], ends: tuple[float, float], zero: float
) -> tuple[str, float] | None:
    """(activation, upper) that bound so, 0 for no upper one; None where none does.

    Args:
        bounds: of v * y_factor.
        ends: what y's type bounds it to by itself.
        zero: zero point of y.
    """
    upper = bounds[1] if bounds[1] < ends[1] else 0.0
    if bounds[0] <= ends[0]:
        return None if upper else ("", 0.0)
    if bounds[0] == 0 and not zero and upper >= 0:
        return "Relu", upper
    return None


def bias_type(product: Product, library: str) -> str:
    """What a library wants a bias to be of: the type of y, but where that has too few bits."""
    if product.y == "int8":
        return "float32"
    if product.y == _FP8 or (product.x == _FP8 and product.y == "float32" and library == CUBLASLT):
        return "bfloat16"
    return product.y


def _with_room(bias: Array) -> Array:
    """A bias followed by zeros, so that one who takes it for float32 stays inside."""
    return np.concatenate([bias, np.zeros(4 * bias.size // bias.itemsize - bias.size, bias.dtype)])
