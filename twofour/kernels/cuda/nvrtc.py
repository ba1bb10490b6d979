"""CUDA C++ into machine code with NVRTC, which needs neither a GPU nor a CUDA toolkit.

The library comes with the package nvidia-cuda-nvrtc. It has no headers of CUDA: sources say what
they need in inline assembly.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

from twofour.core.errors import UnsupportedError
from twofour.kernels.cuda.kernel import EARLY_LEAST, WAIT, Compiled, NvidiaSource

_FIX = "pip install 'twofour[cuda]', which brings nvidia-cuda-nvrtc"
_PATTERNS = ("nvidia/*/lib/libnvrtc.so.*", "nvidia/*/bin/*/nvrtc64_*.dll", "nvidia/*/bin/nvrtc64_*")
_SYSTEM = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12")
_WGMMA_CAPABILITY = 90


@cache
def library() -> ctypes.CDLL:
    """NVRTC, of NVIDIA's package or of the system.

    Raises:
        UnsupportedError: there is none.
    """
    roots = [Path(entry) for entry in sys.path if entry]
    found = [path for root in roots for pattern in _PATTERNS for path in root.glob(pattern)]
    names = [str(path) for path in found if ".alt." not in path.name]
    reasons = []
    for name in [*names, *_SYSTEM]:
        try:
            for beside in Path(name).parent.glob("libnvrtc-builtins.so.*"):
                if name in names:
                    ctypes.CDLL(str(beside))  # which NVRTC looks for by name alone
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise UnsupportedError("NVRTC, which compiles CUDA C++, is not here", reasons, _FIX)


def compile_source(source: NvidiaSource, capability: int) -> Compiled:
    """Compiles a kernel.

    Args:
        source: the kernel.
        capability: of the GPU, 90 for 9.0.

    Raises:
        UnsupportedError: it cannot be compiled; the message holds the compiler's log.
    """
    cubin = cubin_of(source.text, capability)
    waits = capability >= EARLY_LEAST and WAIT in source.text
    return Compiled(cubin, source.symbol, source.threads, source.shared_bytes, nulls=0, waits=waits)


def architecture(capability: int) -> str:
    """What NVRTC calls a GPU: 9.0 with the instructions of Hopper alone, the others as they are."""
    return f"sm_{capability}{'a' * (capability == _WGMMA_CAPABILITY)}"


def cubin_of(text: str, capability: int, options: tuple[str, ...] = ()) -> bytes:
    """The object of a source.

    Args:
        text: CUDA C++.
        capability: of the GPU.
        options: further ones of NVRTC.

    Raises:
        UnsupportedError: it cannot be compiled; the message holds the compiler's log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"k.cu", 0, None, None))
    try:
        given = (f"--gpu-architecture={architecture(capability)}", "--std=c++17", *options)
        flags = (ctypes.c_char_p * len(given))(*[flag.encode() for flag in given])
        status = nvrtc.nvrtcCompileProgram(program, len(given), flags)
        if status:
            log = _read(program, "nvrtcGetProgramLog", "nvrtcGetProgramLogSize")
            reasons = log.rstrip(b"\0").decode(errors="replace").splitlines()
            what = f"NVRTC cannot compile a kernel for {given[0].partition('=')[2]}"
            raise UnsupportedError(what, reasons or [_message(status)], _FIX)
        return _read(program, "nvrtcGetCUBIN", "nvrtcGetCUBINSize")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, get: str, get_size: str) -> bytes:
    """What one of NVRTC's pairs of functions gives."""
    size = ctypes.c_size_t()
    _check(library()[get_size](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library()[get](program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    """Raises where a function of NVRTC failed."""
    if status:
        raise UnsupportedError("NVRTC failed", [_message(status)], _FIX)


def _message(status: int) -> str:
    """NVRTC's words for a status."""
    text = library().nvrtcGetErrorString
    text.restype = ctypes.c_char_p
    words: bytes = text(status)
    return words.decode()
