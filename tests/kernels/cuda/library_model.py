"""What a library's call computes, in numpy, as core/cuda_products.py defines it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.kernels.cuda.interpret import TORCH, interpret, tensor_of, values_of
from twofour.core.cuda_products import Product, read_product
from twofour.core.functions import PLAIN
from twofour.kernels.cuda.kernel import LibraryKernel, Recipe

Array = np.ndarray[Any, np.dtype[Any]]


def matrix(values: Array, rows: int, columns: int, row: int) -> Array:
    """A matrix of numbers whose rows lie `row` elements apart."""
    strides = (row * values.itemsize, values.itemsize)
    return np.lib.stride_tricks.as_strided(values, (rows, columns), strides)


def compute(product: Product, operands: Mapping[str, torch.Tensor]) -> None:
    """Writes y; the operands are flat tensors of bytes."""

    def read(role: str, dtype: str) -> Array:
        return values_of(operands[role].view(torch.uint8).view(TORCH[dtype]).clone())

    p = product
    x = matrix(read("x", p.x), p.m, p.k, p.x_row).astype(np.float64)
    w = read("w", p.x).reshape(p.n, p.k).astype(np.float64)
    v = p.alpha * (x @ w.T)
    v *= read("scale", "float32")[: p.n] if p.by_channel else 1
    v *= read("row_scale", "float32")[: p.m, None] if p.by_row else 1
    if p.beta:
        beta = read("r_scale", "float32")[: p.n] if p.r_by_channel else p.beta
        v += beta * matrix(read("r", p.r), p.m, p.n, p.r_row)
    if p.bias:
        v += read("bias", p.bias)[: p.n]
    if p.activation:
        v = PLAIN[p.activation](v.astype(np.float32)).astype(np.float64)
    v = np.minimum(v, p.upper) if p.upper else v
    if p.y in ("int8", "int32"):
        ends = (-128, 127) if p.y == "int8" else (-(2**31), 2**31 - 1)
        v = np.clip(np.rint(v), *ends)
    y = operands["y"].view(torch.uint8).view(TORCH[p.y])
    stored = tensor_of(v.astype(np.int32 if p.y == "int32" else np.float32), p.y)
    torch.as_strided(y, (p.m, p.n), (p.y_row, 1)).copy_(stored)


def run(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> None:
    """A recipe whose calls are kernels of Triton and libraries, on tensors by role."""
    tensors = dict(tensors) | {
        role: torch.from_numpy(np.array(array)).view(-1).view(torch.uint8)
        for role, array in recipe.constants.items()
    }
    tensors |= {role: torch.full((n,), 85, dtype=torch.uint8) for role, n in recipe.scratch.items()}
    for call in recipe.calls:
        if not isinstance(call, LibraryKernel):
            interpret(call, tensors)  # type: ignore[arg-type]
            continue
        product = read_product(call.settings, call.library)
        named = {role: tensors[at] for role, at in zip(product.roles, call.roles, strict=True)}
        w = named["w"]
        for role, size in zip(product.roles, product.sizes(w.nbytes), strict=True):
            assert named[role].nbytes >= size, f"{role} has {named[role].nbytes} of {size} bytes"
        compute(product, named)
