"""Products whose blocks come by descriptors, in Triton's interpreter, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.cuda.conv_cases import Case, Size
from tests.kernels.cuda.interpret import interpret
from twofour.core.numerics import Window
from twofour.kernels.cuda import product_descriptors
from twofour.kernels.cuda.conv_pack import pack
from twofour.kernels.cuda.conv_tiles import Tile
from twofour.kernels.cuda.finish import finish_constants
from twofour.kernels.cuda.kernel import Kernel, compile_kernel


@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn", "float16", "bfloat16"])
def test_products(dtype: str) -> None:
    """More tiles than programs, edges on all sides, gaps between the rows."""
    for size in (Size(37, 1, 1, 96, 40), Size(1, 3, 5, 72, 33, gap=8)):
        problem = size.problem(dtype, dtype, dtype)
        case = Case.of(problem)
        packed = {"w": pack(case.arrays["w"], dtype), **finish_constants(problem, case.arrays)}
        recipe = product_descriptors._recipe(problem, Tile(16, 32, 32, 4, 3), packed, 90)
        fewer = replace(recipe.calls[0], grid=(2, 1, 1))
        fewer = replace(fewer, constants={**fewer.constants, "PROGRAMS": 2})
        tensors = case.tensors()
        interpret(replace(recipe, calls=(fewer,)), tensors)
        assert case.wrong(tensors["y"]) == ""


@pytest.mark.parametrize("dtype", ["int8", "float8e4m3fn", "float16"])
def test_they_compile(dtype: str) -> None:
    case = Case.of(Size(300, 1, 1, 256, 256).problem(dtype, dtype, dtype))
    recipe = product_descriptors.recipes(case.problem, case.arrays, 90, effort=0)[0]
    (call,) = recipe.calls
    assert isinstance(call, Kernel)
    compiled = compile_kernel(call, 90)
    assert compiled.nulls == 1
    assert call.roles[-1] == "descriptors"
    assert recipe.scratch["descriptors"] == 256 * call.grid[0]
    with pytest.raises(ValueError, match="aligned"):
        compile_kernel(replace(call, unaligned=("x",)), 90)
    with pytest.raises(ValueError, match="scratch"):
        compile_kernel(replace(call, own=("descriptors", 128)), 90)


def test_what_it_refuses() -> None:
    def offered(size: Size, dtype: str, capability: int = 90) -> int:
        case = Case.of(size.problem(dtype, dtype))
        return len(product_descriptors.recipes(case.problem, case.arrays, capability))

    assert offered(Size(64, 1, 1, 64, 64), "int8") > 0
    assert offered(Size(64, 1, 1, 64, 64), "int8", 89) == 0
    assert offered(Size(64, 1, 1, 60, 64), "int8") == 0
    assert offered(Size(64, 1, 1, 64, 64), "float32") == 0
    assert offered(Size(1, 8, 8, 64, 64, Window((3, 3))), "int8") == 0
