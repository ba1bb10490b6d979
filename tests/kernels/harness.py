"""Runs generated convolution kernels on strided buffers and compares them with the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from twofour.core.abi import SLACK_BYTES
from twofour.core.bfloat16 import ROUNDING, from_bf16, round_bf16, to_bf16
from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.gates import Gate
from twofour.core.masks import magnitude_mask
from twofour.core.numerics import Epilogue, Window, convolve, requantize
from twofour.core.target import ISAS, Target, detect_host, host_target, missing_features
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.problem import Config, ConvProblem, Strides, activation_of
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.runtime.cpu import Code, address, allocate

GUARD = 0xA5
MARGIN = 256


DTYPES = {
    np.dtype(np.uint8): "int8",
    np.dtype(np.uint16): "bfloat16",
    np.dtype(np.float32): "float32",
}


def real(stored: np.ndarray) -> np.ndarray:
    """What an array stands for: bits of bfloat16 as float32, all else as it is."""
    return from_bf16(stored) if stored.dtype == np.uint16 else stored


def tactic(name: str, dtype: str = "int8") -> Tactic:
    """The tactic of that name."""
    return next(t for t in tactics() if t.name == name and t.dtype == dtype)


@dataclass(frozen=True)
class Case:
    """One convolution with its data, everything as stored.

    Attributes:
        x: [batch, H, W, C] uint8, float32, or uint16 (bits of bfloat16); what lies outside the
            window's reach is not read.
        w: [N, C / groups, KH, KW] int8 or float32.
        epilogue: constants.
        window: kernel, stride, dilation; padding is part of `x`.
        groups: number of groups.
        x_zero: zero point of x as stored.
        residual: [batch, OH, OW, N] or None.
        x_gap: bytes between pixels of x that belong to nobody.
        y_gap: the same of y.
        bounded: no result leaves int32 before it is rounded.
    """

    x: np.ndarray
    w: np.ndarray
    epilogue: Epilogue
    window: Window
    groups: int = 1
    x_zero: int = 128
    residual: np.ndarray | None = None
    x_gap: int = 0
    y_gap: int = 0
    bounded: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        """(OH, OW)."""
        return self.window.output_size(self.x.shape[1], self.x.shape[2])

    @property
    def stored(self) -> np.dtype:
        """What the result is stored as."""
        if self.epilogue.bfloat16:
            return np.dtype(np.uint16)
        return np.dtype(np.float32 if self.epilogue.zero_point is None else np.uint8)

    def expected(self) -> np.ndarray:
        """The definition."""
        sums = convolve(real(self.x), self.w, self.window, self.groups, self.x_zero)
        residual = None if self.residual is None else real(self.residual)
        return requantize(sums, self.epilogue, residual)

    def problem(self) -> ConvProblem:
        """As the kernels see it."""
        batch, height, width, channels = self.x.shape
        out_h, out_w = self.out_size
        n, out = self.w.shape[0], DTYPES[self.stored]
        y = strides(out_h, out_w, n * self.stored.itemsize + self.y_gap)
        r, add = None, ""
        if self.residual is not None:
            add = DTYPES[self.residual.dtype]
            r = strides(out_h, out_w, n * self.residual.itemsize)
        return ConvProblem(
            batch,
            out_h,
            out_w,
            self.w.shape[1],
            n // self.groups,
            DTYPES[self.x.dtype],
            strides(height, width, channels * self.x.itemsize + self.x_gap),
            y,
            out,
            self.window.kernel,
            self.window.stride,
            self.window.dilation,
            self.groups,
            r,
            add,
            activation_of(self.epilogue),
            self.bounded,
            self.epilogue.gate is not None,
            add_last=self.epilogue.add_last,
        ).flattened()


def strides(height: int, width: int, pixel: int) -> Strides:
    """Of a dense image with that pixel stride."""
    return Strides(height * width * pixel, width * pixel, pixel)


def place(values: np.ndarray, gap: int) -> tuple[np.ndarray, int]:
    """The array in memory of its own, `gap` guard bytes after each pixel; memory and address."""
    rows = values.reshape(-1, values.shape[-1])
    raw = np.full((rows.shape[0], rows.shape[1] * values.itemsize + gap), GUARD, np.uint8)
    raw[:, : rows.shape[1] * values.itemsize] = rows.view(np.uint8).reshape(rows.shape[0], -1)
    memory = allocate(raw.size + SLACK_BYTES)
    memory[:] = GUARD
    memory[: raw.size] = raw.reshape(-1)
    return memory, address(memory)


def run(
    case: Case, options: list[tuple[Tactic, Config]], target: Target, parts: int = 1
) -> list[np.ndarray]:
    """The output of each option; fails if a byte outside the output changed.

    Args:
        case: the convolution.
        options: tactics with configurations.
        target: what to generate for.
        parts: the work is done in that many calls, as threads would.
    """
    problem = case.problem()
    code = Code(
        [
            compile_object(
                [
                    Source(t.kernel.emit(f"kernel{i}_", problem, c, target.isa))
                    for i, (t, c) in enumerate(options)
                ],
                target,
            )
        ]
    )
    return [
        _run_one(case, problem, code.kernel(f"kernel{i}_"), option, parts)
        for i, option in enumerate(options)
    ]


def _run_one(
    case: Case, problem: ConvProblem, kernel, option: tuple[Tactic, Config], parts: int
) -> np.ndarray:
    config, made = option[1], option[0].kernel
    packed = made.pack(case.w, problem, config, case.epilogue, case.x_zero)
    weights = allocate(packed.size + SLACK_BYTES)
    weights[: packed.size] = packed
    n = case.w.shape[0]
    kind = case.stored
    rows = case.x.shape[0] * case.out_size[0] * case.out_size[1]
    row_bytes = n * kind.itemsize + case.y_gap
    y = np.full(2 * MARGIN + rows * row_bytes, GUARD, np.uint8)
    x_memory, x_address = place(case.x, case.x_gap)
    r_memory, r_address = place(case.residual, 0) if case.residual is not None else (None, 0)
    pieces, panels = made.work(problem, config)
    for part in range(parts):
        begin, end = pieces * part // parts, pieces * (part + 1) // parts
        kernel(x_address, address(weights), address(y) + MARGIN, r_address, begin, end, 0, panels)
    body = y[MARGIN:-MARGIN].reshape(rows, row_bytes)
    used = n * kind.itemsize
    assert (y[:MARGIN] == GUARD).all(), "bytes before the output changed"
    assert (y[-MARGIN:] == GUARD).all(), "bytes after the output changed"
    assert (body[:, used:] == GUARD).all(), "bytes between pixels changed"
    del x_memory, r_memory
    shape = (case.x.shape[0], *case.out_size, n)
    return real(np.ascontiguousarray(body[:, :used]).view(kind).reshape(shape))


def make(
    rng: np.random.Generator,
    *,
    batch: int = 1,
    height: int = 5,
    width: int = 5,
    c: int = 8,
    n: int = 16,
    window: Window | None = None,
    groups: int = 1,
    add: str = "",
    pattern: str = "",
    dtype: str = "int8",
    out: str = "",
    activation: Activation = NO_ACTIVATION,
    x_zero: int = 128,
    y_zero: int = 128,
) -> Case:
    """A case with random data."""
    window = window or Window((3, 3))
    x = _stored(rng, dtype, (batch, height, width, c))
    w = _weights(rng, dtype, (n, c // groups, *window.kernel), pattern)
    scale = _scales(rng, dtype, w)
    quantized = (out or dtype) == "int8"
    wide = dtype == "int8" and not activation.clamps  # scales leave real numbers, of size 4
    scale = scale * np.float32(1 / 16) if wide else scale
    r_scale = 0.37 * (1 / 16 if wide else 1) if add else 0.0
    epilogue = Epilogue(
        scale,
        (rng.normal(size=n) - (r_scale * 128 if add == "int8" else 0)).astype(np.float32),
        r_scale,
        activation,
        y_zero if quantized else None,
        unsigned=True,
        y_factor=_steps_of_one(activation) if quantized else 1.0,
        bfloat16=(out or dtype) == "bfloat16",
    )
    case = Case(x, w, epilogue.in_stored_steps(), window, groups, x_zero)
    if not add:
        return case
    return replace(case, residual=_stored(rng, add, (batch, *case.out_size, n)))


def adding_last(case: Case, r_scale: float = 0.37, y_zero: int = 0) -> Case:
    """The same case with its residual behind the activation, and zero points there too."""
    last = replace(
        case.epilogue,
        add_last=True,
        residual_scale=float(np.float32(r_scale)),
        zero_point=None if case.epilogue.zero_point is None else y_zero,
        residual_zero=128 if case.residual.dtype == np.uint8 else 0,
    )
    return replace(case, epilogue=last)


def gated(case: Case, y_scale: float, last: tuple[float, int] | None = None) -> Case:
    """The same case with its activation done by the table for a scale of the result.

    `last`: scale (in steps of y) and zero point of a residual that is added behind it.
    """
    e = case.epilogue
    gate = Gate.of(e.activation.name, y_scale, *(last or ()))
    assert gate is not None
    step = np.float32(gate.step)
    scaled = replace(
        e,
        scale=e.scale / step,
        bias=e.bias / step,
        residual_scale=float(np.float32(e.residual_scale) / step),
        y_factor=1.0,
        gate=gate,
        add_last=last is not None,
    )
    return replace(case, epilogue=scaled)


def _steps_of_one(activation: Activation) -> float:
    """1 / y_scale, so that results of the activation spread over the range of a byte."""
    if activation.clamps:
        return 1.0
    return 101.3 if activation.name in ("Sigmoid", "HardSigmoid", "Tanh") else 13.7


def _stored(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random activations: all bytes alike, or normal floats."""
    if dtype == "int8":
        return rng.integers(0, 256, shape, np.uint8)
    values = rng.standard_normal(shape, np.float32)
    return to_bf16(values) if dtype == "bfloat16" else values


def _weights(
    rng: np.random.Generator, dtype: str, shape: tuple[int, ...], pattern: str
) -> np.ndarray:
    """Random weights, pruned to the pattern; "" for dense."""
    if dtype == "int8":
        w = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        w = rng.standard_normal(shape, np.float32)
        w = round_bf16(w) if dtype == "bfloat16" else w
    return np.where(magnitude_mask(w, pattern), w, np.zeros((), w.dtype)) if pattern else w


def _scales(rng: np.random.Generator, dtype: str, w: np.ndarray) -> np.ndarray:
    """Scales that spread the sums over the range of a byte; ones for floats."""
    if dtype != "int8":
        return np.ones(w.shape[0], np.float32)
    spread = 60.0 / (74 * 74 * w[0].size ** 0.5)
    return (spread * rng.uniform(0.5, 2, w.shape[0])).astype(np.float32)


def float_bound(case: Case) -> np.ndarray:
    """K eps sum |x w|, and a step for each operation of the epilogue.

    A result in bfloat16 may be rounded to the other side.
    """
    size = convolve(np.abs(real(case.x)), np.abs(case.w), case.window, case.groups)
    k = case.w[0].size
    extra = 8 + np.abs(case.epilogue.bias)
    bound = (k + 4) * np.finfo(np.float32).eps * (size + extra)
    return bound + 2 * ROUNDING * np.abs(case.expected()) if case.epilogue.bfloat16 else bound


def targets() -> list[Target]:
    """Every instruction set this machine can run, the best first."""
    host = detect_host()
    every = [Target(isa, host.arch, host.model) for isa in ISAS]
    return [target for target in every if not missing_features(target, host)]


def of_this_machine(dtype: str) -> list[Tactic]:
    """The tactics that this machine's best instruction set has, and no kernels of their own for."""
    isa = host_target().isa
    return [t for t in tactics() if t.dtype == dtype and not t.depthwise and t.is_for(isa)]
