"""A kernel of Triton with all its numbers, how it becomes machine code, and what a tactic offers.

Kernels are compiled for a GPU that need not be here: Triton brings the assembler. The code that
comes out takes addresses and nothing else, so a runtime starts it without Triton.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
from numpy.typing import NDArray
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

Array = NDArray[Any]
TRITON_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8e4m3fn": "fp8e4nv",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i8",
    "int32": "i32",
    "int64": "i64",
}
"""What Triton calls the types of elements."""
SHARED_BYTES = {
    capability: 1024 * size
    for capability, size in {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
"""Shared memory that a block may use, by capability; the next lower one counts for others."""
_LANES = 32
_TRITON_POINTERS = 2
EARLY_LEAST = 90
"""The first capability whose kernels may be started before those in front of them have ended."""
WAIT = "griddepcontrol.wait;"
"""What such a kernel does before it touches what others write."""
_BEGIN = f"\tgriddepcontrol.launch_dependents;\n\t{WAIT}\n"
_ENTRY = re.compile(r"(\.visible \.entry [^{]*\{\n)")
REFUSALS = (TritonError, RuntimeError, ValueError, TypeError, IndexError, KeyError)
"""What Triton raises of a kernel that it cannot compile: its passes have errors of their own."""


@dataclass(frozen=True)
class Kernel:
    """One start of a kernel of Triton.

    The function's parameters that are no constants are pointers, in the order of `operands`. A
    pointer that a problem lacks is the constant None.

    Attributes:
        function: the kernel, as `triton.jit` gives it.
        operands: (role, type of its elements) of each pointer.
        constants: the other parameters by name: numbers, texts, None, frozen dataclasses of such.
        grid: programs along x, y and z.
        warps: of a program.
        stages: of Triton's software pipeline.
        unaligned: roles whose address may be no multiple of 16 bytes.
        own: (role, bytes a program) of scratch for what Triton's own code writes, descriptors of
            tensors; None where it writes nothing. No role may be unaligned then.
    """

    function: Any
    operands: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]
    grid: tuple[int, int, int]
    warps: int = 4
    stages: int = 3
    unaligned: tuple[str, ...] = ()
    own: tuple[str, int] | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Of its pointers, in order; scratch of Triton's own comes last."""
        roles = tuple(role for role, _ in self.operands)
        return roles if self.own is None else (*roles, self.own[0])


@dataclass(frozen=True)
class NvidiaSource:
    """A kernel in CUDA C++, compiled by NVRTC; its parameters are pointers alone, like Triton's.

    Attributes:
        text: the source.
        symbol: of the kernel, declared extern "C".
        operands: (role, type of its elements) of each pointer.
        grid: blocks along x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory.
    """

    text: str
    symbol: str
    operands: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0

    @property
    def roles(self) -> tuple[str, ...]:
        """Of its pointers, in order."""
        return tuple(role for role, _ in self.operands)


@dataclass(frozen=True)
class LibraryKernel:
    """A call of a library.

    Attributes:
        library: "cublaslt" or "cusparselt".
        settings: JSON, see runtime/cuda/.
        roles: of its operands, in the order that the library's file names them.
    """

    library: str
    settings: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One way to run an operator.

    Attributes:
        tactic: its name, that of its file; sparse ones begin with the pattern: "2:4 cusparselt".
        config: tile, stages, algorithm, in words.
        calls: in order.
        constants: role -> array that lies beside the weights, packed as the calls want it.
        scratch: role -> bytes of the arena between the calls.
    """

    tactic: str
    config: str
    calls: tuple[Kernel | NvidiaSource | LibraryKernel, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """Machine code for one GPU.

    Attributes:
        cubin: the object.
        symbol: of the kernel in it.
        threads: of a block.
        shared_bytes: dynamic shared memory.
        nulls: null pointers that follow the others.
        waits: it may be started early: it waits itself for the kernels in front of it.
    """

    cubin: bytes
    symbol: str
    threads: int
    shared_bytes: int
    nulls: int = 2
    waits: bool = False

    @property
    def name(self) -> str:
        """Of the object among those of an engine: equal code has one name."""
        return hashlib.sha256(self.cubin).hexdigest()[:24]


def compile_kernel(kernel: Kernel, capability: int) -> Compiled:
    """Compiles a kernel.

    Args:
        kernel: the kernel.
        capability: of the GPU, 90 for 9.0.

    Raises:
        triton.compiler.errors.CompilationError, OutOfResources, ValueError: it cannot be compiled
            so.
    """
    if kernel.own is not None and kernel.unaligned:
        raise ValueError(f"descriptors of tensors need aligned addresses: {kernel.unaligned}")
    names = kernel.function.arg_names
    pointers = [name for name in names if name not in kernel.constants]
    dtypes = [TRITON_DTYPES[dtype] for _, dtype in kernel.operands]
    signature = dict.fromkeys(names, "constexpr")
    signature |= {name: f"*{dtype}" for name, dtype in zip(pointers, dtypes, strict=True)}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, (role, _) in zip(pointers, kernel.operands, strict=True)
        if role not in kernel.unaligned
    }
    source = ASTSource(kernel.function, signature, constants, aligned)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, _LANES)
    with triton.knobs.compilation.scope(), _waiting(capability):
        triton.knobs.compilation.disable_line_info = True  # which names files of this machine
        made = triton.compile(source, target=target, options=options)
    meta = made.metadata
    room = of_capability(SHARED_BYTES, capability)
    if meta.shared > room:
        raise OutOfResources(meta.shared, room, "shared memory")
    own = 0 if kernel.own is None else kernel.own[1]
    if meta.global_scratch_size > own or meta.profile_scratch_size:
        raise ValueError(f"{meta.name} asks for scratch memory of its own")
    nulls = _TRITON_POINTERS - (kernel.own is not None)
    code, threads = made.asm["cubin"], _LANES * meta.num_warps
    return Compiled(code, meta.name, threads, meta.shared, nulls, WAIT in made.asm["ptx"])


@contextmanager
def _waiting(capability: int) -> Iterator[None]:
    """Kernels that are compiled meanwhile wait first of all, where the GPU and Triton allow it."""
    runtime = triton.knobs.runtime
    if capability < EARLY_LEAST or not hasattr(runtime, "add_stages_inspection_hook"):
        yield
        return
    with runtime.scope():
        runtime.add_stages_inspection_hook = _with_wait
        yield


def _with_wait(*given: Any) -> tuple[str, str] | None:
    """A stage of Triton's compiler that adds the wait; without arguments what that does to keys."""
    if not given:
        return _BEGIN, hashlib.sha256(_BEGIN.encode()).hexdigest()
    stages = given[1]
    make = stages["ptx"]
    stages["ptx"] = lambda source, metadata: _ENTRY.sub(rf"\1{_BEGIN}", make(source, metadata))
    return None


def of_capability(table: dict[int, int], capability: int) -> int:
    """The entry of a capability, or of the highest one below it."""
    known = [key for key in table if key <= capability]
    return table[max(known, default=min(table))]


def divided(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def as_bytes(array: Array) -> NDArray[np.uint8]:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
