"""Layer normalisation: equal to the definition bit for bit, in every form and size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.kernels.harness import targets
from tests.kernels.strided import Strided, compiled, in_parts
from twofour.core.norm import layer_norm
from twofour.core.numerics import Epilogue, dequantize, requantize
from twofour.kernels.cpu.norm import NormProblem, emit_norm, pack_norm
from twofour.kernels.cpu.pointwise import MapConstants
from twofour.runtime.cpu import address

TARGETS = targets()
EPS = 1e-5
CONSTANTS = MapConstants(0.043, 117, 0.0301, 131)
FORMS = [
    (x, float_out, quantized_out)
    for x in ("float32", "u8")
    for float_out, quantized_out in ((True, False), (False, True), (True, True))
]
# (rows, channels): fewer rows than go together and more; channels around the vector and the loop.
SIZES = [(1, 1), (3, 15), (4, 16), (5, 17), (2, 63), (9, 64), (6, 65), (4, 384), (7, 771)]


@dataclass
class Case:
    """One normalisation with tensors in guarded memory, and gaps between rows."""

    problem: NormProblem
    x: Strided
    y: Strided
    q: Strided
    gamma: np.ndarray
    beta: np.ndarray

    @staticmethod
    def of(form: tuple[str, bool, bool], size: tuple[int, int], seed: int = 0) -> Case:
        kind, float_out, quantized_out = form
        rows, channels = size
        dtype = np.float32 if kind == "float32" else np.uint8
        halo = (0, 0, 0, 2)  # a gap after each row
        x, y, q = (Strided((rows, 1, 1, channels), t, "nhwc", halo) for t in (dtype, "f4", "u1"))
        random = np.random.default_rng(seed)
        if kind == "u8":
            x.values[...] = random.integers(0, 256, x.values.shape)
        else:
            x.values[...] = random.normal(3, 2, x.values.shape)
        gamma, beta = random.normal(1, 0.3, (2, channels)).astype(np.float32)
        strides = (one.values.strides[0] for one in (x, y, q))
        problem = NormProblem(rows, channels, *strides, kind, float_out, quantized_out, EPS)
        return Case(problem, x, y, q, gamma, beta)

    def run(self, kernel, constants: MapConstants = CONSTANTS, parts: int = 1) -> list[np.ndarray]:
        """The float output, then the quantized one, those there are."""
        packed = pack_norm(self.gamma, self.beta, constants)
        outs = [self.y] * self.problem.float_out + [self.q] * self.problem.quantized_out
        pointers = (self.x.address, address(packed), outs[0].address, outs[-1].address)
        in_parts(kernel, pointers, self.problem.pieces, 1, parts)
        return [one.take() for one in outs]

    def expected(self, constants: MapConstants = CONSTANTS) -> list[np.ndarray]:
        x = self.x.values
        if self.problem.x == "u8":
            x = dequantize(x, constants.x_scale, constants.x_zero)
        y = layer_norm(x, self.gamma, self.beta, EPS)
        scale = (np.float32(1) / np.float32(constants.y_scale)).reshape(1)
        narrow = Epilogue(scale, np.zeros(1), zero_point=constants.y_zero, unsigned=True)
        return [y] * self.problem.float_out + [requantize(y, narrow)] * self.problem.quantized_out


def kernels(cases: list[Case], target) -> list:
    texts = {f"n{i}_": emit_norm(f"n{i}_", c.problem, target.isa) for i, c in enumerate(cases)}
    return compiled(texts, target, vectorize=False)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_form_and_size_is_the_definition(target) -> None:
    # Every form at a third of the sizes, each size with two forms.
    cases = [Case.of(f, s) for i, f in enumerate(FORMS) for s in SIZES[i % 3 :: 3]]
    for case, kernel in zip(cases, kernels(cases, target), strict=True):
        want = case.expected()
        for parts in (1, 3):
            for got, w in zip(case.run(kernel, parts=parts), want, strict=True):
                assert got.dtype == w.dtype
                assert (got == w).all(), case.problem


def test_bounded_results_are_the_same() -> None:
    """What is known to fit int32 takes a shorter way to the same bytes."""
    case = Case.of(("float32", True, True), (9, 80))
    case.x.values[2, ..., 7] = np.nan
    case.x.values[3], case.x.values[4] = 0.1, 1e30
    one = replace(case, problem=replace(case.problem, bounded=True))
    (kernel,) = kernels([one], TARGETS[0])
    for scale in (0.03, 1e-6):
        constants = replace(CONSTANTS, y_scale=scale)
        with np.errstate(all="ignore"):
            want = one.expected(constants)
        for got, w in zip(one.run(kernel, constants), want, strict=True):
            np.testing.assert_array_equal(got, w)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_extreme_values(target) -> None:
    """Constant rows, rows of large values, bytes all alike, results far beyond a byte, NaN."""
    case = Case.of(("float32", True, True), (6, 40))
    case.x.values[0], case.x.values[1] = 0.1, 1e18
    case.x.values[2] = np.where(np.arange(40) % 2, -3e15, 3e15)
    case.x.values[3, ..., 7] = np.nan
    case.x.values[4] *= 1e-25
    stored = Case.of(("u8", False, True), (4, 33))
    stored.x.values[0], stored.x.values[1] = 0, 255
    stored.x.values[2, ..., :32] = 0
    for one, kernel in zip((case, stored), kernels([case, stored], target), strict=True):
        for zero in (0, 128, 255):
            for scale in (0.03, 1e-20):
                constants = replace(CONSTANTS, y_scale=scale, y_zero=zero, x_zero=zero)
                with np.errstate(all="ignore"):
                    want = one.expected(constants)
                for got, w in zip(one.run(kernel, constants), want, strict=True):
                    np.testing.assert_array_equal(got, w)
