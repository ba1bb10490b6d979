"""Convolutions with their data, for tests of kernels on GPUs: what they read, and what is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tests.kernels.cuda.interpret import tensor_of, values_of
from twofour.core.bfloat16 import ROUNDING as BF16
from twofour.core.float8 import ROUNDING as FP8
from twofour.core.numerics import Window, convolve
from twofour.kernels.cuda.problem import POINT, ConvProblem, Finish, View
from twofour.kernels.cuda.reference import conv_reference, round_to

Array = np.ndarray[Any, np.dtype[Any]]
LAST_PLACE = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2 * BF16,
    "float8e4m3fn": 2 * FP8,
}
GARBAGE = 7.0
PLAIN = Finish()


@dataclass(frozen=True)
class Size:
    """Sizes of a convolution.

    Attributes:
        batch: images.
        height: of x.
        width: of x.
        channels: of x.
        outs: channels of y.
        window: where it looks.
        groups: of channels.
        gap: elements between the pixels of x, y and r that belong to nobody.
    """

    batch: int
    height: int
    width: int
    channels: int
    outs: int
    window: Window = POINT
    groups: int = 1
    gap: int = 0

    def problem(self, x: str, y: str, r: str = "", finish: Finish = PLAIN) -> ConvProblem:
        """The problem with tensors of these types; a quantized x has a zero point of -128 or 0."""
        out = self.window.output_size(self.height, self.width)
        views = [
            View.dense(dtype, *size, channels + self.gap)
            for dtype, size, channels in (
                (x, (self.height, self.width), self.channels),
                (y, out, self.outs),
                (r, out, self.outs),
            )
        ]
        return ConvProblem(
            self.batch,
            self.height,
            self.width,
            self.channels,
            self.outs,
            views[0],
            views[1],
            self.window,
            self.groups,
            views[2] if r else None,
            finish,
            -128 if x == "int8" else 0,
        )


def strided(values: Array, view: View) -> torch.Tensor:
    """The memory of a tensor [batch, H, W, C] that lies as the view says, garbage in the gaps."""
    memory = np.full(len(values) * view.image, GARBAGE, np.float32)
    memory[places(values.shape, view)] = values.reshape(-1)
    return tensor_of(memory, view.dtype)


def places(shape: tuple[int, ...], view: View) -> Array:
    """Where the elements of a tensor [batch, H, W, C] lie, in C order."""
    strides = (view.image, view.row, view.pixel, 1)
    axes = np.ix_(*(np.arange(n) * stride for n, stride in zip(shape, strides, strict=True)))
    return sum(axes[1:], axes[0]).reshape(-1)


@dataclass(frozen=True)
class Case:
    """A problem with data.

    Attributes:
        problem: the problem.
        arrays: values by role, see `conv_reference`.
    """

    problem: ConvProblem
    arrays: Mapping[str, Array]

    @staticmethod
    def of(problem: ConvProblem, seed: int = 0) -> Case:
        """Random data; results fill the type of y."""
        rng, out = np.random.default_rng(seed), problem.out_size
        shapes = {
            "x": (problem.batch, problem.height, problem.width, problem.channels),
            "w": (problem.out_channels, problem.channels // problem.groups, *problem.window.kernel),
            "r": (problem.batch, *out, problem.out_channels),
        }
        arrays: dict[str, Array] = {}
        for role in shapes if problem.r else ("x", "w"):
            dtype = problem.r.dtype if problem.r and role == "r" else problem.x.dtype
            if dtype == "int8":
                arrays[role] = rng.integers(-127, 128, shapes[role]).astype(np.int8)
            else:
                arrays[role] = round_to(rng.standard_normal(shapes[role]).astype(np.float32), dtype)
        size = 74.0**2 if problem.x.dtype == "int8" else 1.0
        spread = 40.0 if problem.y.dtype == "int8" else 2.0
        step = spread / np.sqrt(problem.k) / size
        n = problem.out_channels
        arrays["scale"] = (step * rng.uniform(0.5, 1.5, n)).astype(np.float32)
        arrays["bias"] = rng.standard_normal(n).astype(np.float32)
        if problem.x.dtype == "int8":
            whole = arrays["w"].astype(np.int64).reshape(n, -1).sum(axis=1)
            arrays["bias"] -= (problem.x_zero * whole * arrays["scale"]).astype(np.float32)
        if problem.finish.by_rows:
            arrays["row_scale"] = rng.uniform(0.5, 2, problem.rows).astype(np.float32)
        return Case(problem, arrays)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Memory by role; y is filled with garbage."""
        problem = self.problem
        found = {"x": strided(self.arrays["x"], problem.x)}
        if problem.r is not None:
            found["r"] = strided(self.arrays["r"], problem.r)
        if problem.finish.by_rows:
            found["row_scale"] = torch.from_numpy(self.arrays["row_scale"])
        garbage = np.full(problem.batch * problem.y.image, GARBAGE, np.float32)
        return found | {"y": tensor_of(garbage, problem.y.dtype)}

    def wrong(self, y: torch.Tensor) -> str:
        """What is wrong with a result, "" for nothing.

        Integers: sums are exact, and what follows is rounded a little otherwise: hardly any result
        may differ, none by more than 1. Real numbers: a last place of y, and what sums of K
        products may lose in float32 (fp8: in sums of 14 bits, as tensor cores have them).
        """
        problem, shape = self.problem, (self.problem.batch, *self.problem.out_size)
        expected = conv_reference(problem, self.arrays)
        stored, at = values_of(y), places((*shape, problem.out_channels), problem.y)
        found = stored[at].reshape(expected.shape)
        if not (np.delete(stored, at) == GARBAGE).all():
            return "wrote between the pixels"
        error = np.abs(found.astype(np.float64) - expected)
        if problem.y.dtype == "int8":
            share = np.mean(error != 0)
            exact = problem.x.dtype == "int8"
            fine = error.max() <= (1 if exact else 2) and share <= (0.02 if exact else 0.2)
            return "" if fine else f"{share:.1%} differ, by up to {error.max()}"
        bound = LAST_PLACE[problem.y.dtype] * (np.abs(expected) + 2.0**-6) + self._lost()
        worst = np.unravel_index(np.argmax(error / bound), error.shape)
        values = f"{found[worst]} for {expected[worst]} at {worst}"
        return (
            ""
            if (error <= bound).all()
            else f"error {error[worst]}, bound {bound[worst]}: {values}"
        )

    def _lost(self) -> Array:
        """What sums of products may lose, [batch, OH, OW, N] times what follows them."""
        problem = self.problem
        if problem.x.dtype == "int8":
            return np.float64(1e-5)
        x, w = (np.abs(self.arrays[role]).astype(np.float32) for role in ("x", "w"))
        w = round_to(w, problem.x.dtype)
        plain = replace(problem, finish=Finish())
        sums = convolve(x, w, plain.window, plain.groups) * self.arrays["scale"]
        unit = 2.0**-12 if problem.x.dtype == "float8e4m3fn" else 2.0**-21
        activated = 1.2 * problem.finish.y_factor
        rows = self.arrays["row_scale"].max() if problem.finish.by_rows else 1.0
        return np.asarray(unit * sums * activated * rows + 1e-5)
