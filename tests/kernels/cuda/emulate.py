"""Runs the 2:4 convolution on the CPU: its CUDA C++ with the assembly exchanged, see emulator.h."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.kernel import NvidiaSource, Recipe

Array = np.ndarray[Any, np.dtype[Any]]
COMPILER = shutil.which("g++") or shutil.which("clang++")
_HEADER = Path(__file__).with_name("emulator.h")
_INSTRUCTIONS = {
    r'asm volatile\("ldmatrix.*?\);': "ldmatrix(b[n], from);",
    r'asm volatile\("wgmma\.commit.*?\);': "wgmma_commit<ES, SUM>();",
    r'asm volatile\("wgmma\.wait_group\.sync\.aligned (\d).*?\);': r"wgmma_wait<ES, SUM>(\1);",
    r'asm volatile\("(?:wgmma\.)?fence.*?\);': "",
    r'float f;\s*asm\("cvt\.f32\.f16.*?\)\);\s*return f;': "return half_value(v.bits);",
}
"""Assembly, which ends at the first ");", and what stands for it."""
_PRODUCTS = """
#define ONCE inline
ONCE void mma_sparse_0(SUM (&d)[4], const uint4& a, const uint4& b, u32 e) {{
  mma_sparse<ES>(d, a, b, e, 0);
}}
ONCE void mma_sparse_1(SUM (&d)[4], const uint4& a, const uint4& b, u32 e) {{
  mma_sparse<ES>(d, a, b, e, {second});
}}
template <int TILES>
ONCE void wgmma_sparse_0(SUM (&d)[TILES][4], const uint4& a, const u32& e, u64 x, bool add = 1) {{
  wgmma_sparse<ES>(d, a, e, x, 0, add);
}}
template <int TILES>
ONCE void wgmma_sparse_1(SUM (&d)[TILES][4], const uint4& a, const u32& e, u64 x, bool add = 1) {{
  wgmma_sparse<ES>(d, a, e, x, {second}, add);
}}
template <int TILES>
ONCE void wgmma_dense(SUM (&d)[TILES][4], const uint4& a, u64 x, bool add = true) {{
  wgmma_sparse<ES>(d, a, a.x, x, -1, add);
}}
"""


class EmulatorError(Exception):
    """The kernel did what a GPU would not allow."""


def source_of(call: NvidiaSource, dtype: str) -> str:
    """C++ of a kernel for the CPU.

    Args:
        call: the kernel; y is int8 or float32.
        dtype: of x: int8 or float16.
    """
    defines, text = re.match(r"((?:#define .*\n)+)((?:.|\n)*)", call.text).groups()  # type: ignore[union-attr]
    # What the emulator has itself: the emitted instructions, and what moves bytes.
    begin = text.find("__device__ __forceinline__ void mma_sparse_0")
    begin = begin if begin >= 0 else text.find("// Rows of 128 bytes, 128-byte swizzle")
    if begin >= 0:
        text = text[:begin] + text[text.index("// A convolution whose weight") :]
    begin, end = text.index("typedef unsigned int u32;"), text.index("// ---- from sums to y")
    text = text[:begin] + text[end:]
    text = text.replace("extern __shared__ __align__(1024) char memory[];", "")
    for pattern, meaning in _INSTRUCTIONS.items():
        text = re.sub(pattern, meaning, text, flags=re.DOTALL)
    assert "asm" not in re.sub("//.*", "", text), re.findall(".*asm.*", text)
    parameters = re.search("#define PARAMETERS (.*)", defines)
    assert parameters is not None
    types = [re.sub(r"\w+$", "", each) for each in parameters[1].split(", ")]
    given = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(types))
    return (
        f'#include "{_HEADER}"\n{defines}{_PRODUCTS.format(second=DTYPES[dtype] - 1)}'
        + text.replace('extern "C" ', "")
        + f"static void go(void** a) {{ {call.symbol}({given.replace('__restrict__', '')}); }}\n"
        'extern "C" const char* start(void** a, int blocks, int parts, int count, bool eager) {\n'
        "  return run_grid(go, a, blocks, parts, count, eager);\n}\n"
        'extern "C" void others_wrote(const char* begin, long size) {\n'
        "  others_begin = begin, others_end = begin + size;\n  operands.clear();\n}\n"
        'extern "C" void operand(const char* begin, long size) {\n'
        "  operands.emplace_back(begin, begin + size);\n}\n"
    )


def emulate(
    recipe: Recipe, arrays: Mapping[str, Array], folder: Path, dtype: str, *, eager: bool
) -> None:
    """Runs all kernels of a recipe on arrays by role; the constants and the scratch are made here.

    Args:
        recipe: of conv_sparse.
        arrays: operands as they lie in memory; y is written.
        folder: for the compiled kernels.
        dtype: of x.
        eager: copies are done at once, not when they are waited for.

    Raises:
        EmulatorError: the kernel did what a GPU would not allow.
    """
    held = {role: aligned(array) for role, array in recipe.constants.items()}
    held |= {role: aligned(np.full(n, 85, np.uint8)) for role, n in recipe.scratch.items()}
    held = {role: aligned(array) for role, array in arrays.items() if role != "y"} | held
    held["y"] = arrays["y"]
    for number, call in enumerate(recipe.calls):
        assert isinstance(call, NvidiaSource)
        source, made = folder / f"{number}.cc", folder / f"{number}.so"
        if not made.exists():
            source.write_text(source_of(call, dtype))
            command = [str(COMPILER), "-O1", "-w", "-std=c++17", "-shared", "-fPIC"]
            subprocess.run([*command, "-o", str(made), str(source)], check=True)
        addresses = (ctypes.c_void_p * len(call.roles))(*[held[r].ctypes.data for r in call.roles])
        library, x = ctypes.CDLL(str(made)), held["x"]
        library.others_wrote(ctypes.c_void_p(x.ctypes.data), ctypes.c_long(x.nbytes))
        for role in call.roles:
            array = held[role]
            library.operand(ctypes.c_void_p(array.ctypes.data), ctypes.c_long(array.nbytes))
        start = library.start
        start.restype = ctypes.c_char_p
        failure = start(addresses, call.grid[0], call.grid[2], call.threads, eager)
        if failure:
            raise EmulatorError(failure.decode())


def aligned(array: Array) -> Array:
    """A copy that begins at a multiple of 256 bytes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    room = np.empty(flat.nbytes + 256, np.uint8)
    first = -room.ctypes.data % 256
    found = room[first : first + flat.nbytes].view(flat.dtype)
    found[:] = flat
    return found
