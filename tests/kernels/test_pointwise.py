"""Elementwise kernels: equal to quantize and dequantize bit for bit, in every form and size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.kernels.harness import targets
from tests.kernels.strided import Strided, compiled, in_parts
from twofour.core.functions import PLAIN, Activation
from twofour.core.numerics import dequantize, quantize, scale_product
from twofour.kernels.cpu.pointwise import MapConstants, MapProblem, View, emit_map
from twofour.runtime.cpu import address

TARGETS = targets()
SIZES = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 2, 16, 16), (1, 4, 17, 15), (3, 1, 1, 33), (1, 3, 65, 17)]
HALO = (1, 2, 3, 1)
FORMS = {"u8": ("nhwc", np.uint8), "f32": ("nhwc", np.float32)}
FORMS |= {k: ("nchw", np.dtype(k)) for k in ("int8", "uint8", "float32")}
CONSTANTS = MapConstants(0.05, 120, 0.11, 131, 0.021, 7, -1.25, 6.0)


@dataclass(frozen=True)
class Case:
    """One operator on tensors of these kinds; r may have one pixel an image."""

    op: str
    x: str
    y: str
    r: str = ""
    activation: str = ""
    steps: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    one_pixel: bool = False

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op, self.x, self.r, self.y, self.activation)))


CASES = [
    Case("copy", "float32", "f32"),
    Case("copy", "f32", "float32"),
    Case("copy", "int8", "u8"),
    Case("copy", "u8", "int8"),
    Case("copy", "uint8", "u8"),
    Case("copy", "u8", "uint8"),
    Case("copy", "u8", "u8", steps=(2, 2), pads=(2, 3)),
    Case("copy", "f32", "f32", steps=(2, 1), pads=(0, 1)),
    Case("convert", "float32", "u8"),
    Case("convert", "float32", "int8"),
    Case("convert", "f32", "uint8"),
    *(Case("convert", "f32", "f32", activation=name) for name in (*PLAIN, "Clip")),
    *(Case("convert", "u8", "u8", activation=name) for name in (*PLAIN, "Clip")),
    Case("convert", "float32", "float32", activation="Gelu"),
    Case("convert", "f32", "u8", activation="Silu"),
    Case("convert", "u8", "f32", activation="Gelu"),
    Case("convert", "u8", "float32"),
    Case("convert", "int8", "f32"),
    Case("add", "u8", "u8", "u8"),
    Case("add", "u8", "u8", "u8", activation="Relu"),
    Case("add", "u8", "u8", "u8", activation="HardSwish"),
    Case("add", "f32", "f32", "f32"),
    Case("mul", "u8", "u8", "u8"),
    Case("mul", "u8", "u8", "f32"),
    Case("mul", "u8", "u8", "u8", one_pixel=True),
    Case("mul", "u8", "u8", "f32", one_pixel=True),
    Case("mul", "f32", "f32", "f32", one_pixel=True),
]


def tensor(kind: str, shape: tuple[int, ...]) -> Strided:
    form, dtype = FORMS[kind]
    return Strided(shape, dtype, form, HALO if form == "nhwc" else (0, 0, 0, 0))


def fill(one: Strided, seed: int) -> None:
    random = np.random.default_rng(seed)
    if one.values.dtype == np.float32:
        one.values[...] = random.normal(scale=10, size=one.values.shape)
    else:
        info = np.iinfo(one.values.dtype)
        one.values[...] = random.integers(info.min, info.max, one.values.shape, endpoint=True)


def stored(values: np.ndarray) -> np.ndarray:
    """As kernels see it: int8 plus 128."""
    return (values.astype(np.int16) + 128).astype(np.uint8) if values.dtype == np.int8 else values


def expected(case: Case, x: np.ndarray, r: np.ndarray | None, y: Strided) -> np.ndarray:
    """The same with core.numerics."""
    c, dtype = CONSTANTS, y.values.dtype
    if case.op == "mul" and dtype != np.float32 and r is not None:
        other = r if r.dtype == np.float32 else dequantize(r, c.r_scale, c.r_zero)
        return scale_product(x, other, c.x_scale, (c.x_zero, c.y_zero))
    x = stored(x)[:, :: case.steps[0], :: case.steps[1]]
    if case.op == "copy":
        pads = ((0, 0),) * 3 + (case.pads,)
        y_value = np.pad(x, pads, constant_values=0 if x.dtype == np.float32 else c.y_zero)
    else:
        y_value = x if x.dtype == np.float32 else dequantize(x, c.x_scale, c.x_zero)
        if r is not None:
            other = r if r.dtype == np.float32 else dequantize(r, c.r_scale, c.r_zero)
            y_value = y_value * other if case.op == "mul" else y_value + other
        bounds = (c.low, c.high) if case.activation == "Clip" else ()
        activation = Activation(case.activation, *bounds)
        y_value = activation.apply(y_value, short=dtype != np.float32)
        if dtype != np.float32:
            y_value = quantize(y_value, c.y_scale, c.y_zero, np.uint8)
    return (y_value.astype(np.int16) - 128).astype(np.int8) if dtype == np.int8 else y_value


def view(one: Strided, kind: str, steps: tuple[int, int] = (1, 1)) -> View:
    image, row, pixel, channel = one.values.strides
    return View(kind, image, row * steps[0], pixel * steps[1], channel)


@dataclass(frozen=True)
class Bound:
    """A case at one size with its tensors."""

    case: Case
    x: Strided
    y: Strided
    r: Strided | None

    @staticmethod
    def of(case: Case, size: tuple[int, int, int, int]) -> Bound:
        batch, height, width, channels = size
        x = tensor(case.x, (batch, height * case.steps[0], width * case.steps[1], channels))
        y = tensor(case.y, (batch, height, width, channels + sum(case.pads)))
        r_size = (batch, 1, 1, channels) if case.one_pixel else size
        r = tensor(case.r, r_size) if case.r else None
        return Bound(case, x, y, r)

    @property
    def problem(self) -> MapProblem:
        batch, height, width, channels = self.y.values.shape
        return MapProblem(
            self.case.op,
            batch,
            height,
            width,
            channels - sum(self.case.pads),
            view(self.x, self.case.x, self.case.steps),
            view(self.y, self.case.y),
            self.r_view,
            self.case.activation,
            *self.case.pads,
        )

    @property
    def r_view(self) -> View | None:
        if self.r is None:
            return None
        found = view(self.r, self.case.r)
        return replace(found, row=0, pixel=0) if self.case.one_pixel else found

    def run(self, kernel, constants: MapConstants = CONSTANTS, parts: int = 1) -> np.ndarray:
        header, (batch, height, *_) = constants.pack(), self.y.values.shape
        r = self.r or self.y
        pointers = (self.x.address, address(header), self.y.address, r.address)
        in_parts(kernel, pointers, batch * height, 1, parts)
        return self.y.take()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_form_and_size_is_the_definition(target) -> None:
    # Compiling takes most of the time: each case at half the sizes, at one on the other targets.
    step = 2 if target == TARGETS[0] else len(SIZES)
    bound = [Bound.of(c, size) for i, c in enumerate(CASES) for size in SIZES[i % step :: step]]
    texts = {f"map{i}_": emit_map(f"map{i}_", one.problem) for i, one in enumerate(bound)}
    for one, kernel in zip(bound, compiled(texts, target, vectorize=True), strict=True):
        fill(one.x, 1)
        if one.r is not None:
            fill(one.r, 2)
        want = expected(one.case, one.x.values, one.r.values if one.r else None, one.y)
        for parts in (1, 3):
            got = one.run(kernel, parts=parts)
            assert got.dtype == want.dtype
            assert (got == want).all(), f"{one.case} {one.problem}"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_quantizing_ties_extremes_and_nan(target) -> None:
    """Halves and their neighbours; infinities saturate; NaN becomes the zero point."""
    halves = np.arange(-300, 300, 0.5, np.float32)
    up, down = (np.nextafter(halves, np.float32(to)) for to in (1e9, -1e9))
    special = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, -0.0, 1e-45], np.float32)
    x = np.concatenate([halves, up, down, special])
    size = (1, 1, 1, x.size)
    bound = [Bound.of(Case("convert", "float32", "u8"), size)]
    texts = {"q_": emit_map("q_", bound[0].problem)}
    (kernel,) = compiled(texts, target, vectorize=True)
    bound[0].x.values[...] = x
    for scale in (1.0, 0.1, 1e-30):
        for zero in (0, 5, 128, 255):
            constants = replace(CONSTANTS, y_scale=scale, y_zero=zero)
            with np.errstate(over="ignore"):
                want = quantize(x, scale, zero, np.uint8)
            assert (bound[0].run(kernel, constants).reshape(-1) == want).all()


def test_every_pair_of_bytes_is_added_exactly() -> None:
    """All 65536 sums, and the scales of a real network: none is off by a rounding."""
    a, b = (v.reshape(1, 16, 16, 256) for v in np.indices((256, 256), np.uint8))
    bound = Bound.of(Case("add", "u8", "u8", "u8"), (1, 16, 16, 256))
    (kernel,) = compiled({"a_": emit_map("a_", bound.problem)}, TARGETS[0], vectorize=True)
    assert bound.r is not None
    bound.x.values[...], bound.r.values[...] = a, b
    constants = MapConstants(0.0123, 128, 0.0217, 0, 0.0307, 128)
    got = bound.run(kernel, constants)
    real = dequantize(a, 0.0123, 128) + dequantize(b, 0.0307, 128)
    assert (got == quantize(real, 0.0217, 0, np.uint8)).all()


def test_relu_keeps_nan() -> None:
    """As ONNX Runtime does: a network that diverged must not look healthy."""
    bound = Bound.of(Case("convert", "f32", "f32", activation="Relu"), (1, 1, 1, 4))
    (kernel,) = compiled({"r_": emit_map("r_", bound.problem)}, TARGETS[0], vectorize=True)
    bound.x.values[...] = [np.nan, -np.inf, np.inf, -0.0]
    got = bound.run(kernel).reshape(-1)
    assert np.isnan(got[0])
    assert got[1:].tolist() == [0, np.inf, 0]
