"""Runs kernels of Triton in its interpreter, on the CPU; they can be compiled before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language import core  # noqa: F401  its functions are patched too
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from twofour.core.bfloat16 import from_bf16, to_bf16
from twofour.core.float8 import from_fp8, to_fp8
from twofour.kernels.cuda.kernel import Kernel, Recipe

Array = np.ndarray[Any, np.dtype[Any]]
TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}


def tensor_of(values: Array, dtype: str) -> torch.Tensor:
    """A tensor of that type with these values, rounded to it."""
    if dtype == "bfloat16":
        return torch.from_numpy(to_bf16(values).view(np.int16)).view(torch.bfloat16)
    if dtype == "float8e4m3fn":
        return torch.from_numpy(to_fp8(values)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(values)).to(TORCH[dtype])


def values_of(tensor: torch.Tensor) -> Array:
    """The inverse of `tensor_of`: float32 for all real types, else as it is."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return from_bf16(tensor.view(torch.int16).numpy().view(np.uint16))
    if tensor.dtype == torch.float8_e4m3fn:
        return from_fp8(tensor.view(torch.uint8).numpy())
    found = tensor.numpy()
    return found.astype(np.float32) if found.dtype == np.float16 else found


@contextmanager
def interpreted() -> Iterator[None]:
    """Functions that a kernel calls are interpreted too; small floats are what they should be.

    The interpreter itself cuts numbers off to bfloat16, loses carries on the way to float8, and
    multiplies matrices of bfloat16 as if their bits were integers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__call__", _call)
        patch.setattr(interpreter, "_convert_float", _converted)
        patch.setattr(interpreter, "_patch_lang_tensor", _patched)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        scope = interpreter._patch_lang(_call)  # tl, and core, which Triton's own functions call
        try:
            yield
        finally:
            scope.restore()


def _converted(values: Array, source: tl.dtype, target: tl.dtype, rounding: object) -> Array:
    """The bits of values in another type of float, rounded to even."""
    real = _real(values, source)
    if target == tl.bfloat16:
        return to_bf16(real)
    if target == tl.float8e4nv:
        return to_fp8(real)
    kind = {tl.float16: np.float16, tl.float32: np.float32}[target]
    return real.astype(kind).view(f"u{np.dtype(kind).itemsize}")


def _real(values: Array, dtype: tl.dtype) -> Array:
    """Values that the interpreter holds, as float32."""
    if dtype == tl.bfloat16:
        return from_bf16(values.view(np.uint16))
    if dtype == tl.float8e4nv:
        return from_fp8(values.view(np.uint8))
    return values.astype(np.float32)


def _dot(builder: object, a: Any, b: Any, d: Any, precision: object, imprecise: object) -> Any:
    left, right = a.data, b.data
    if a.dtype.is_floating():
        left, right = (_real(part.data, part.dtype.scalar) for part in (a, b))
    product = np.matmul(left, right, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, Triton's own among them, whose names are patched as well."""
    scope = interpreter._patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _patched(tensor: Any, scope: Any) -> None:
    """Bounds of loops: numpy makes no number of an array of one element, and Triton asks it to."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_tensor = interpreter._patch_lang_tensor


def interpret(what: Kernel | Recipe, tensors: Mapping[str, torch.Tensor]) -> None:
    """Runs a kernel, or all kernels of a recipe, on tensors by role, whatever their shapes.

    The constants and the scratch of a recipe are made here.
    """
    if isinstance(what, Recipe):
        tensors = dict(tensors) | {
            role: torch.from_numpy(np.array(array)) for role, array in what.constants.items()
        }
        tensors |= {
            role: torch.full((n,), 85, dtype=torch.uint8) for role, n in what.scratch.items()
        }
        for call in what.calls:
            assert isinstance(call, Kernel)
            interpret(call, tensors)
        return
    names = [name for name in what.function.arg_names if name not in what.constants]
    pointers = {
        name: tensors[role].view(-1).view(TORCH[dtype])
        for name, (role, dtype) in zip(names, what.operands, strict=True)
    }
    with interpreted():
        run = InterpretedFunction(what.function.fn).run
        run(**pointers, **what.constants, grid=what.grid, warmup=False)
