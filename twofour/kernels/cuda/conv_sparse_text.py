"""The CUDA C++ of the 2:4 convolution: constants and instructions in front of conv_sparse.cu."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from twofour.core.cuda_program import DTYPES
from twofour.kernels.cuda.conv_sparse_tiles import Tile, blocks_of, is_flat, workers
from twofour.kernels.cuda.kernel import divided
from twofour.kernels.cuda.problem import ConvProblem, View
from twofour.kernels.cuda.sparse_fragments import ROWS, STEP_BYTES, record_bytes, steps_of


def source_of(name: str) -> str:
    """A file beside this one, with those that it includes."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub('#include "(.*)"\n', lambda found: source_of(found[1]), text)


BODY = source_of("conv_sparse.cu")
INSTRUCTION_TYPES = {
    "int8": ("s32.s8.s8", 64),
    "float8e4m3fn": ("f32.e4m3.e4m3", 64),
    "float16": ("f32.f16.f16", 32),
    "bfloat16": ("f32.bf16.bf16", 32),
}
"""Element -> types of sums and operands in the instructions' names, and their K."""
C_TYPES = {
    "int8": "signed char",
    "float8e4m3fn": "e4m3",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "float",
}
ACTIVATIONS = ("Sigmoid", "Silu", "Gelu", "GeluTanh", "Tanh", "HardSigmoid", "HardSwish")
"""Those that the kernel knows besides the ones that only clamp."""
_VALUES = """
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
struct e4m3 { unsigned char bits; };
template <class T, int COUNT>
struct __align__(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Run { T v[COUNT]; };
__device__ __forceinline__ float r_value(float v) { return v; }
__device__ __forceinline__ float r_value(signed char v) { return (float)v; }
__device__ __forceinline__ float r_value(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ float r_value(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
"""
_E4M3_VALUE = """
__device__ __forceinline__ float r_value(e4m3 v) {
  unsigned both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"((unsigned short)v.bits));
  return r_value(f16{(unsigned short)both});
}
"""
_TO_Y = {
    "int8": "return (signed char)__float_as_int(v);",  # `finish` left it in the last bits
    "float8e4m3fn": "unsigned short s; "
    'asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(s) : "f"(0.0f), "f"(v)); '
    "return e4m3{(unsigned char)s};",
    "float16": 'f16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v)); return h;',
    "bfloat16": 'bf16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(v)); return h;',
    "float32": "return v;",
}


def conv_text(problem: ConvProblem, tile: Tile, symbol: str, *, biased: bool = True) -> str:
    """The convolution itself; with tile.split > 1 it stores sums.

    Parameters: x, w (records), then `end_roles`, or the sums.
    """
    parameters = [f"const char* __restrict__ {name}" for name in ("x", "w")]
    if tile.split > 1:
        parameters.append("SUM* __restrict__ sums")
        ends, sums = "Ends{}", "sums"
    else:
        parameters += end_parameters(problem, biased)
        ends, sums = ends_of(problem, biased), "(SUM*)nullptr"
    texts = {"SYMBOL": symbol, "PARAMETERS": ", ".join(parameters), "ENDS": ends, "SUMS": sums}
    emitted = wgmma_text(problem, tile.pixels) if tile.wgmma else _mma(problem)
    return joined(texts | _tile_constants(problem, tile), problem, biased, emitted, BODY)


def finish_text(
    problem: ConvProblem, tile: Tile, symbol: str, threads: int, *, biased: bool = True
) -> str:
    """The kernel that adds up the parts of split sums. Parameters: the sums, then `end_roles`."""
    parameters = ["const SUM* __restrict__ sums", *end_parameters(problem, biased)]
    constants = {
        "SYMBOL": symbol,
        "PARAMETERS": ", ".join(parameters),
        "ENDS": ends_of(problem, biased),
        "IS_CONV": 0,
        "THREADS": threads,
        "SPLIT": tile.split,
    }
    return joined(constants, problem, biased, "", BODY)


def end_roles(problem: ConvProblem, biased: bool) -> tuple[str, ...]:
    """Of the operands of what follows the sums."""
    finish = problem.finish
    wanted = {
        "scale": finish.scaled,
        "row_scale": finish.by_rows,
        "bias": biased,
        "numbers": True,
        "r": problem.r is not None,
        "y": True,
    }
    return tuple(role for role, is_there in wanted.items() if is_there)


def end_parameters(problem: ConvProblem, biased: bool) -> list[str]:
    """Declarations of `end_roles`."""
    kinds = {"r": "const R_TYPE", "y": "Y_TYPE"}
    return [
        f"{kinds.get(role, 'const float')}* __restrict__ {role}"
        for role in end_roles(problem, biased)
    ]


def ends_of(problem: ConvProblem, biased: bool) -> str:
    """The struct of `end_roles`."""
    roles = end_roles(problem, biased)
    fields = ("scale", "row_scale", "bias", "numbers", "r", "y")
    return f"Ends{{{', '.join(name if name in roles else 'nullptr' for name in fields)}}}"


def joined(
    texts: Mapping[str, object], problem: ConvProblem, biased: bool, emitted: str, body: str
) -> str:
    """Constants, types, instructions and the body."""
    constants = {**texts, **_problem_constants(problem), "HAS_BIAS": int(biased)}
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    defines += "".join(f"#define ACTIVATION_{a} {i + 1}\n" for i, a in enumerate(ACTIVATIONS))
    y_type, has_e4m3 = C_TYPES[problem.y.dtype], constants["R_TYPE"] == "e4m3"
    head = f"__device__ __forceinline__ {y_type} y_value(float v)"
    to_y = f"{head} {{ {_TO_Y[problem.y.dtype]} }}\n"
    return defines + _VALUES + _E4M3_VALUE * has_e4m3 + to_y + emitted + body


def _problem_constants(problem: ConvProblem) -> dict[str, object]:
    """Sizes, strides, types and the finish."""
    window, finish, size = problem.window, problem.finish, DTYPES[problem.x.dtype]
    r = problem.r or View.dense(problem.y.dtype, *problem.out_size, problem.out_channels)
    n = problem.out_channels
    return {
        "ES": size,
        "SUM": "int" if problem.x.dtype == "int8" else "float",
        "H": problem.height,
        "W": problem.width,
        "OH": problem.out_size[0],
        "OW": problem.out_size[1],
        "PIXELS": problem.rows,
        "N": n,
        "N_SUMS": sums_pitch(n),
        "TAPS": window.kernel[0] * window.kernel[1],
        "TAPS_INSIDE": int(taps_inside(problem)),
        "KW": window.kernel[1],
        "STRIDE_H": window.stride[0],
        "STRIDE_W": window.stride[1],
        "DILATION_H": window.dilation[0],
        "DILATION_W": window.dilation[1],
        "PAD_TOP": window.pads[0],
        "PAD_LEFT": window.pads[1],
        "PADDING": f"0x{problem.x_zero % 256 * 0x01010101:08x}u" if size == 1 else 0,
        "C_PIECES": problem.channels * size // 16,
        **_strides("X", problem.x),
        **_strides("Y", problem.y),
        **_strides("R", r),
        "X_FLAT": int(is_flat(problem)),
        "Y_FLAT": int(problem.y.is_flat(*problem.out_size)),
        "R_FLAT": int(r.is_flat(*problem.out_size)),
        "Y_ALIGNED": aligned(problem.y, n),
        "R_ALIGNED": aligned(r, n),
        "Y_TYPE": C_TYPES[problem.y.dtype],
        "Y_COARSE": int(problem.y.dtype == "int8"),
        "R_TYPE": C_TYPES[r.dtype],
        "HAS_R": int(problem.r is not None),
        "SCALED": int(finish.scaled),
        "BY_ROWS": int(finish.by_rows),
        "ADD_LAST": int(finish.add_last),
        "RESIDUAL_ZERO": f"{finish.residual_zero}.0f",
        "ACTIVATION": 0 if finish.activation.clamps else f"ACTIVATION_{finish.activation.name}",
    }


def taps_inside(problem: ConvProblem) -> bool:
    """Whether K is in the order (128 bytes of channels, kh, kw, c of these)."""
    return problem.channels * DTYPES[problem.x.dtype] % STEP_BYTES == 0


def aligned(view: View, channels: int) -> int:
    """How many channels may be moved at once: 16, 8, 4, 2 or 1.

    A slice of a wider tensor may begin anywhere.
    """
    strides = (view.image, view.row, view.pixel, channels)
    return math.gcd(16, *strides) if view.pixel == channels else 1


def sums_pitch(channels: int) -> int:
    """Elements from one pixel of split sums to the next; no thread's run crosses it."""
    return divided(channels, 16) * 16


def _strides(prefix: str, view: View) -> dict[str, object]:
    """In elements, 64 bits wide where that is needed."""
    found = {"IMAGE": view.image, "ROW": view.row, "PIXEL": view.pixel}
    return {f"{prefix}_{name}": f"{value}LL" for name, value in found.items()}


def _tile_constants(problem: ConvProblem, tile: Tile) -> dict[str, object]:
    """Of how the work is cut."""
    size = DTYPES[problem.x.dtype]
    blocks = divided(problem.out_channels, tile.channels)
    return {
        "IS_CONV": 1,
        "PERSISTENT": int(tile.persistent),
        "HELD": int(tile.held),
        "PARTS": blocks_of(problem, tile),
        "WORKERS": workers(problem, tile),
        "BM": tile.channels,
        "BN": tile.pixels,
        "THREADS": tile.threads,
        "BLOCKS": tile.blocks,
        "STAGES": tile.stages,
        "STAGE_BYTES": tile.stage_bytes(size),
        "WARPS_M": tile.warps_m,
        "TILES_M": tile.tiles_m,
        "WGMMA": int(tile.wgmma),
        "SPLIT": tile.split,
        "DIRECT": int(tile.direct),
        "STEPS": steps_of(problem.k, size),
        "CHANNEL_BLOCKS": blocks,
        "M_TILES": blocks * tile.channels // ROWS,
        "RECORD": record_bytes(size),
        "QUADS": 2,
        "META_HALF": 128 if size == 1 else 0,
    }


def _mma(problem: ConvProblem) -> str:
    """mma_sparse_0 and _1: the two instructions of a step, 16 channels by 8 pixels."""
    types, k = INSTRUCTION_TYPES[problem.x.dtype]
    return "".join(
        f"__device__ __forceinline__ void mma_sparse_{half}(SUM (&d)[4], const uint4& a,"
        " const uint4& b, unsigned e) {\n"
        f'  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.row.col.{types}.'
        f"{types[:3]} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9, %10, %11}}, "
        f'{{%0, %1, %2, %3}}, %12, {_selector(problem, half)};"\n'
        f"    : {_outputs(problem, ['d[0]', 'd[1]', 'd[2]', 'd[3]'])}\n"
        '    : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w),'
        ' "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(e));\n}\n'
        for half in range(2)
    )


def wgmma_text(
    problem: ConvProblem, pixels: int, *, dense: bool = False, begins: bool = False
) -> str:
    """wgmma_sparse_0 and _1: the two instructions of a step, 64 channels by all pixels.

    Args:
        problem: for its types.
        pixels: of a block.
        dense: it is wgmma_dense instead, which a step has four of.
        begins: they have an argument more, `add`: with 0 they write products in the place of sums.
    """
    types, k = INSTRUCTION_TYPES[problem.x.dtype]
    count, sparse = pixels // 2, int(not dense)
    sums = [f"d[{i // 4}][{i % 4}]" for i in range(count)]
    places = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    # Neither operand is negated; fp16 and bf16 have B along K already.
    flags = {"int8": "", "float8e4m3fn": ", 1, 1"}.get(problem.x.dtype, ", 1, 1, 0")
    sp, e = ".sp" * sparse, " unsigned e," * sparse
    add, parameter, operand = "1", "", ""
    if begins:
        add, parameter, operand = f"%{count + 5 + sparse}", ", int add", ', "r"(add)'
    return _DESCRIPTOR + "".join(
        f"__device__ __forceinline__ void wgmma_{name}(SUM (&d)[{pixels // 8}][4],"
        f" const uint4& a,{e} unsigned long long x{parameter}) {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {add}, 0;\\n"\n'
        f'    "wgmma.mma_async{sp}.sync.aligned.m64n{pixels}k{k >> dense}.{types} "\n'
        f'    "{{{places}}}, {{{a}}}, %{count + 4}, {metadata}p{flags};\\n}}"\n'
        f"    : {_outputs(problem, sums)}\n"
        '    : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(x)'
        + ', "r"(e)' * sparse
        + f"{operand});\n}}\n"
        for name, metadata in _metadata(problem, dense, count + 5).items()
    )


def _metadata(problem: ConvProblem, dense: bool, place: int) -> dict[str, str]:
    """Names of the instructions of a step -> where they find metadata, in their text."""
    if dense:
        return {"dense": ""}
    return {f"sparse_{half}": f"%{place}, {_selector(problem, half)}, " for half in range(2)}


_DESCRIPTOR = """
// Rows of 128 bytes, 128-byte swizzle, the next 8 rows 1024 bytes further.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
  return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
"""


def _selector(problem: ConvProblem, half: int) -> int:
    """Which lanes hold the metadata, see sparse_fragments.py."""
    return half if DTYPES[problem.x.dtype] == 2 else 0


def _outputs(problem: ConvProblem, names: list[str]) -> str:
    """Sums as operands that are read and written."""
    letter = "r" if problem.x.dtype == "int8" else "f"
    return ", ".join(f'"+{letter}"({name})' for name in names)
